"""Files of this machine and of object stores, and whether a file that cannot be parsed is damaged or did not arrive."""

import os
import tarfile
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from iqareward.optional import require

T = TypeVar("T")
Check = Callable[[Any, str], object]
"""Parses a file of a file system, and raises what the parser raises."""

_ATTEMPTS = 3
_CHUNK = 2**24


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path within it.

    Raises:
        ImportError: a package for that kind of store is missing.
        ValueError: the kind of store is unknown.
    """
    fsspec = require("fsspec", extra="data", purpose=f"Reading {path}")
    if "://" not in path:  # a name may hold what means something in a URL
        return fsspec.filesystem("file"), os.path.abspath(path)
    return fsspec.core.url_to_fs(path)


def is_local(fs: Any) -> bool:
    """Whether a file system is of this machine."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def url(fs: Any, name: str) -> str:
    """The path or URL by which another process finds the file."""
    return name if is_local(fs) else fs.unstrip_protocol(name)


def find(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """All files below a folder with their facts; links are followed, each folder once."""
    if not is_local(fs):
        return fs.find(folder, detail=True)
    found: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        found |= {os.path.join(parent, name): {} for name in names}
    return found


def version(fs: Any, name: str, info: dict[str, Any]) -> str:
    """What changes if the content of a file may have changed; of a link, that of its target."""
    if is_local(fs):
        try:
            facts = os.stat(name)
        except OSError:  # a link that leads nowhere: reading it will say so
            return ""
        return f"{facts.st_size} {facts.st_mtime_ns}"
    known = (
        "size",
        "mtime",
        "ETag",
        "etag",
        "md5Hash",
        "LastModified",
        "last_modified",
        "updated",
        "created",
        "blob_id",
    )
    return " ".join(str(info[key]) for key in known if info.get(key) is not None)


def parse_errors() -> tuple[type[Exception], ...]:
    """What readers raise if the content is wrong, or if a store fails."""
    pyarrow = require("pyarrow", extra="data", purpose="Scoring data sets")
    return OSError, EOFError, tarfile.TarError, zlib.error, pyarrow.lib.ArrowException


def damage(fs: Any, name: str, error: Exception, check: Check) -> str:
    """What is wrong with the content of a file that could not be parsed, once a complete copy of it cannot be either.

    Raises:
        OSError: the file is missing, does not arrive as a whole, or its copy can be parsed: the store failed, and may
            work again.
    """
    if isinstance(error, (FileNotFoundError, PermissionError)):
        raise error
    expected, size = fs.info(name)["size"] if not is_local(fs) else os.stat(name).st_size, 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, name.rpartition("/")[2])  # its suffix says how it is compressed
        with fs.open(name, "rb") as source, copy.open("wb") as target:
            while chunk := source.read(_CHUNK):
                size += target.write(chunk)
        if size != expected:
            raise OSError(f"{name}: {size} of its {expected} bytes arrived.") from error
        try:
            check(filesystem("x")[0], str(copy))
        except parse_errors() as again:
            return first_line(again)
    raise OSError(f"{name}: it could be parsed in a second attempt; before: {first_line(error)}") from error


def patiently(work: Callable[[], T]) -> T:
    """The result of work that is tried again if a store fails."""
    for attempt in range(1, _ATTEMPTS):
        try:
            return work()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            time.sleep(2.0**attempt)
    return work()


def first_line(error: Exception) -> str:
    """The first line of a message, or the name of an error without one."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]
