"""Write files and folders atomically: a reader finds the old content or the new, even if the writer is killed."""

import os
import secrets
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PART = ".part"  # suffix of unfinished files and folders


@contextmanager
def atomic_write(path: Path | str) -> Generator[BinaryIO]:
    """Open a binary file, for writing and reading, that replaces `path` when the block ends.

    If the block raises or the process dies, `path` stays what it was. A link is followed; a device or pipe, such as
    /dev/stdout, is written to directly.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    part = _beside(path)
    try:
        with part.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_text(path: Path | str, text: str) -> None:
    """Write `text` in UTF-8 with `atomic_write`."""
    with atomic_write(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_folder(path: Path | str) -> Generator[Path]:
    """Make an empty folder that replaces `path` when the block ends."""
    path = Path(os.path.realpath(path))
    part, old = _beside(path), _beside(path)
    part.mkdir()
    try:
        yield part
        for item in (*part.rglob("*"), part):
            if item.is_dir():
                _sync_folder(item)
            else:
                _sync(item, os.O_RDWR)
        if path.exists():
            path.replace(old)
        part.replace(path)
    finally:
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)
    _sync_folder(path.parent)


def remove_parts(folder: Path) -> None:
    """Remove the unfinished files of killed writers from `folder`, while nobody else writes there."""
    for part in folder.glob(f"*{PART}"):
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}{PART}")


def _sync_folder(folder: Path) -> None:
    """Flush the new name to the disk; where folders cannot be opened, as on Windows, the system does it by itself."""
    if hasattr(os, "O_DIRECTORY"):
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
