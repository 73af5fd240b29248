"""A file or folder is the old one or the new one, whatever happens to the writer."""

import os

import pytest

from iqareward.atomic import atomic_folder, atomic_write, remove_parts, write_text


def fail(opened, path):
    """Write a part of the new content, then break."""
    with opened(path) as target:
        if opened is atomic_folder:
            write_text(target / "weights", "new")
        else:
            target.write(b"new")
        raise OSError("disk full")


def test_a_writer_that_fails_changes_nothing(tmp_path):
    """The old content stays and nothing is left beside it, for a file and for a folder."""
    file, folder = tmp_path / "scores.csv", tmp_path / "model"
    write_text(file, "old")
    with atomic_folder(folder) as part:
        write_text(part / "weights", "old")
    for opened, path in ((atomic_write, file), (atomic_folder, folder)):
        with pytest.raises(OSError, match="disk full"):
            fail(opened, path)
    assert file.read_text() == (folder / "weights").read_text() == "old"
    assert sorted(os.listdir(tmp_path)) == ["model", "scores.csv"]


def test_the_new_content_replaces_the_old_as_a_whole(tmp_path):
    """Until the block ends a reader sees the old; a folder keeps nothing of the old one; a link is followed."""
    file, folder, link = tmp_path / "scores.csv", tmp_path / "model", tmp_path / "link.csv"
    write_text(file, "old")
    link.symlink_to(file)
    with atomic_write(link) as stream:
        stream.write("größer".encode())
        assert file.read_text() == "old"
    assert link.is_symlink()
    assert file.read_text(encoding="utf-8") == "größer"
    for name in ("first", "second"):
        with atomic_folder(folder) as part:
            write_text(part / name, name)
    assert os.listdir(folder) == ["second"]


def test_what_is_no_file_is_written_to_directly(tmp_path):
    """/dev/null stays a device."""
    write_text(os.devnull, "nothing")
    assert not os.path.isfile(os.devnull)


def test_parts_of_killed_writers_can_be_removed(tmp_path):
    """What is half written when the power fails; whole files stay."""
    write_text(tmp_path / "whole.txt", "whole")
    with atomic_write(tmp_path / "half.txt") as stream:
        stream.write(b"half")
        assert len(os.listdir(tmp_path)) == 2
        remove_parts(tmp_path)
        assert os.listdir(tmp_path) == ["whole.txt"]
        write_text(stream.name, "again")  # so that the block can end
