"""Every row of every kind of data set is read once, and what is damaged is a row with the reason."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from iqareward.datasets import shards as module
from iqareward.datasets.columns import Columns
from iqareward.datasets.reading import Kept
from iqareward.datasets.reading import read as read_shard
from iqareward.datasets.shards import find_shards
from iqareward.datasets.stores import filesystem
from tests.datasets.levels import folder, parquet, png, tar

IMAGE = Columns()


def read(data, columns=IMAGE, keep=None):
    """All rows: (file, row, keys, whether there is an image, problem)."""
    found = []
    for shard in find_shards(data):
        kept = Kept()
        rows = list(read_shard(shard, columns, keep, kept))
        values = {name: column.to_pylist() for name, column in kept.columns().items()}
        assert all(len(column) == len(rows) for column in values.values())
        for place, (row, sample) in enumerate(rows):
            keys = {name: column[place] for name, column in values.items()}
            found.append((Path(shard.path).name, row, keys, sample.image is not None, sample.problem))
    return found


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(module, "SHARD_ROWS", 20)


def test_parquet_is_cut_at_row_groups(tmp_path):
    """Shards have whole row groups; rows count through the file; flat columns are kept and no content of images."""
    parquet(tmp_path / "a.parquet", range(50), group=8, text=[f"text {i}" for i in range(50)])
    found = find_shards(tmp_path)
    assert [(shard.start, shard.stop, shard.rows) for shard in found] == [(0, 2, 16), (2, 4, 16), (4, 7, 18)]
    assert len({shard.name for shard in found}) == 3
    rows = read(tmp_path)
    assert [row for _, row, *_ in rows] == list(range(50))
    assert rows[7][2] == {"id": 7, "text": "text 7"}
    assert read(tmp_path, keep=["text"])[7][2] == {"text": "text 7"}


def test_the_types_of_keys_stay(tmp_path):
    """An unsigned byte does not become a float."""
    path = parquet(tmp_path / "a.parquet", range(3), when=pa.array([1, 2, None], pa.timestamp("ms")))
    kept = Kept()
    (shard,) = find_shards(path)
    list(read_shard(shard, IMAGE, None, kept))
    assert {name: column.type for name, column in kept.columns().items()} == {
        "id": pa.uint8(),
        "when": pa.timestamp("ms"),
    }


@pytest.mark.parametrize("part", ["footer", "middle", "cut"])
def test_damaged_parquet(tmp_path, part):
    """Rows of a damaged row group have a reason, others are read; of a damaged footer there is one row."""
    path = parquet(tmp_path / "a.parquet", range(60), group=10)
    content = bytearray(path.read_bytes())
    if part == "middle":
        offset = pq.ParquetFile(path).metadata.row_group(2).column(0).data_page_offset
        content[offset : offset + 64] = bytes(64)
    path.write_bytes(content[:-3] if part == "cut" else content[:-8] + bytes(8) if part == "footer" else content)
    rows = read(path)
    if part == "middle":
        assert [row for _, row, *_ in rows] == list(range(60))
        assert {row for _, row, _, has_image, _ in rows if not has_image} == {*range(20, 30)}
    else:
        assert len(rows) == 1
    assert all(problem.startswith("not read: the file is damaged here") for *_, ok, problem in rows if not ok)


@pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
@pytest.mark.parametrize("failures", [1, 2, 1000])
def test_a_store_that_fails_is_not_damage(tmp_path, monkeypatch, name, failures):
    """Bytes that do not arrive are an error, which is tried again, and no rows without scores."""
    path = parquet(tmp_path / name, range(20)) if name == "a.parquet" else tar(tmp_path / name, samples())
    (shard,) = find_shards(path)
    fs, _ = filesystem(str(path))
    real = type(fs)._open
    left = [failures]

    def refuse(*_):
        raise OSError("connection reset")

    def failing(self, *arguments, **options):
        file = real(self, *arguments, **options)
        if left[0]:
            left[0] -= 1
            monkeypatch.setattr(
                file, "read", lambda *_: (_ for _ in ()).throw(OSError("connection reset")), raising=False
            )
        return file

    monkeypatch.setattr(type(fs), "_open", failing)
    with pytest.raises(OSError, match="connection reset"):
        list(read_shard(shard, IMAGE, None, Kept()))


def samples(count=12):
    return [item for i in range(count) for item in ((f"x/{i:04}.PNG", png(i)), (f"x/{i:04}.txt", f"text {i}".encode()))]


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz"])
def test_web_dataset_archives(tmp_path, name):
    """Files with one name up to the first dot are a sample; suffixes are read in any case."""
    path = tar(tmp_path / name, samples(), mode="w" if name == "a.tar" else "w:gz")
    rows = read(path, Columns(prompts="txt"), keep=["txt"])
    assert [(row, keys) for _, row, keys, *_ in rows] == [
        (i, {"__key__": f"x/{i:04}", "txt": f"text {i}"}) for i in range(12)
    ]
    assert all(has_image and not problem for *_, has_image, problem in rows)


def test_an_archive_cut_anywhere(tmp_path):
    """No sample vanishes in silence: all are there, or the last row says that some may be missing."""
    whole = tar(tmp_path / "a.tar", samples(3)).read_bytes()
    for length in range(0, len(whole), 97):
        path = tmp_path / "cut.tar"
        path.write_bytes(whole[:length])
        *rows, last = read(path)
        complete = len(rows) == 2 and last[3]
        assert complete or last[4].startswith("not read: the file is damaged here"), length


def test_a_damaged_header_and_joined_archives(tmp_path):
    """Python's tarfile takes both for the end."""
    one, two = (tar(tmp_path / f"{name}.tar", samples(3)).read_bytes() for name in "ab")
    (tmp_path / "joined.tar").write_bytes(one + two)
    assert "further files behind its end" in read(tmp_path / "joined.tar")[-1][4]
    damaged = bytearray(one)
    damaged[4 * 512 : 4 * 512 + 100] = b"?" * 100  # the third file's header
    (tmp_path / "damaged.tar").write_bytes(damaged)
    assert "header of a file is not valid" in read(tmp_path / "damaged.tar")[-1][4]
    packed = gzip.compress(one)
    (tmp_path / "cut.tar.gz").write_bytes(packed[: len(packed) // 2])
    assert "damaged here" in read(tmp_path / "cut.tar.gz")[-1][4]


def test_links_in_an_archive(tmp_path):
    """tar stores the second name of a file as a link, which is a row with a reason."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("a.png", tarfile.REGTYPE), ("b.png", tarfile.LNKTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname, member.size = kind, "a.png", 0 if kind == tarfile.LNKTYPE else len(png(1))
            archive.addfile(member, io.BytesIO(png(1)) if member.size else None)
    assert [(ok, problem) for *_, ok, problem in read(tmp_path / "a.tar")] == [
        (True, ""),
        (False, "not read: b.png is no plain file in the archive, but a link or the like"),
    ]


def test_odd_samples_of_archives(tmp_path):
    """A file twice, and a sample without an image, are rows; an archive without any image is an error."""
    path = tar(tmp_path / "a.tar", [("a.png", png(1)), ("a.png", png(2)), ("b.txt", b"text"), ("c.png", png(3))])
    assert [(keys["__key__"], ok, problem) for _, _, keys, ok, problem in read(path)] == [
        ("a", False, "not read: there are two files a.png"),
        ("b", False, ""),
        ("c", True, ""),
    ]
    with pytest.raises(ValueError, match=r"named tiff, got files named png, txt.*images="):
        read(path, Columns(images="tiff"))


def test_a_folder_of_images(tmp_path):
    """Files are rows in the order of their names, and a changed file changes its shard."""
    folder(tmp_path / "images", range(25))
    rows = read(tmp_path / "images")
    assert [Path(keys["path"]).name for _, _, keys, *_ in rows] == [f"{i:03}.png" for i in range(25)]
    before = [shard.name for shard in find_shards(tmp_path / "images")]
    (tmp_path / "images" / "024.png").write_bytes(png(1, size=48))
    after = [shard.name for shard in find_shards(tmp_path / "images")]
    assert before[0] == after[0]
    assert before[1].partition("-")[0] == after[1].partition("-")[0]
    assert before[1] != after[1]


def test_hugging_face_data_sets(tmp_path):
    """An object, its splits, and what `save_to_disk` wrote; images are not decoded on the way."""
    datasets = pytest.importorskip("datasets")
    table = {"image": [{"bytes": png(i), "path": None} for i in range(25)], "id": list(range(25))}
    made = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).shuffle(seed=0)
    made.save_to_disk(tmp_path / "saved")
    order = made["id"]
    for source in (made, tmp_path / "saved", datasets.DatasetDict(train=made)):
        assert [keys["id"] for _, _, keys, *_ in read(source)] == order
    with pytest.raises(TypeError, match="streaming data set"):
        find_shards(made.to_iterable_dataset())


def test_urls(tmp_path):
    """A store of fsspec is read like a folder."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    store.pipe({f"/bucket/{i}.png": png(i) for i in range(3)} | {"/bucket/deep/3.png": png(3)})
    store.pipe("/sets/a.parquet", parquet(tmp_path / "a.parquet", range(5)).read_bytes())
    assert [keys["path"] for _, _, keys, *_ in read("memory://bucket")] == [
        *(f"memory:///bucket/{i}.png" for i in range(3)),
        "memory:///bucket/deep/3.png",
    ]
    assert [row for _, row, *_ in read("memory://sets/*.parquet")] == list(range(5))


@pytest.mark.parametrize(
    ("files", "message"),
    [({}, "matches no parquet files"), ({"a.png": b"", "b.parquet": b""}, r"several kinds \(1 parquet, 1 images\)")],
)
def test_folders_that_say_nothing(tmp_path, files, message):
    """They are refused before anything is scored."""
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        find_shards(tmp_path)


def test_links_and_results_of_our_own(tmp_path):
    """Links are followed, each folder once; results in the data set, and hidden folders, are not read."""
    folder(tmp_path / "elsewhere", range(3))
    (tmp_path / "data" / ".cache").mkdir(parents=True)
    (tmp_path / "data" / "out").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "data")
    (tmp_path / "data" / ".cache" / "x.png").write_bytes(png(1))
    parquet(tmp_path / "data" / "out" / "part.parquet", range(3))
    (shard,) = find_shards(tmp_path / "data", str(tmp_path / "data" / "out"))
    assert [Path(file).name for file in shard.files] == ["000.png", "001.png", "002.png"]
    before = shard.name
    (tmp_path / "elsewhere" / "001.png").write_bytes(png(7, size=48))
    (shard,) = find_shards(tmp_path / "data", str(tmp_path / "data" / "out"))
    assert shard.name != before


def test_names_that_are_no_text(tmp_path):
    """They get escapes, and cost no other row its score."""
    folder(tmp_path / "images", range(2))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/images/\xff.png")).write_bytes(png(2))
    assert [Path(keys["path"]).name for _, _, keys, *_ in read(tmp_path / "images")][-1] == "\\udcff.png"


def test_a_path_named_twice(tmp_path):
    """Its rows would be doubled."""
    path = parquet(tmp_path / "a.parquet", range(5))
    with pytest.raises(ValueError, match="named twice"):
        find_shards([path, str(path)])


def test_a_column_that_is_missing(tmp_path):
    """The error names the columns that there are."""
    path = parquet(tmp_path / "a.parquet", range(5), other=np.arange(5))
    with pytest.raises(ValueError, match="named photo, got the columns image, id, other"):
        read(path, Columns(images="photo"))
