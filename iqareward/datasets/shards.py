"""Find the shards of a data set: pieces that are scored as a whole."""

import hashlib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from iqareward.datasets.stores import damage, filesystem, find, parse_errors, patiently, url, version
from iqareward.image_files import SUFFIXES
from iqareward.optional import require

SHARD_ROWS = 2000  # about as many are lost when a process dies, and as many wait for one process at the end
_LISTERS = 32  # threads that ask a store for the facts of files
_PARQUET, _TAR = (".parquet", ".pq"), (".tar", ".tar.gz", ".tgz")
_SAVED = ("state.json", "dataset_dict.json")  # of what Hugging Face's `save_to_disk` writes


@dataclass(frozen=True)
class Shard:
    """A piece of a data set.

    Attributes:
        path: the file, folder or data set that it is a piece of.
        kind: how it is read.
        start: its first row group, file or row in `path`.
        stop: where it ends.
        rows: number of rows; None = unknown before it is read.
        version: changes if the content may have changed.
        files: the image files, of a folder.
        source: the data set, if it is an object in memory.
    """

    path: str
    kind: str
    start: int = 0
    stop: int = 0
    rows: int | None = None
    version: str = ""
    files: tuple[str, ...] = field(default=(), repr=False)
    source: Any = field(default=None, repr=False, compare=False)

    @property
    def place(self) -> str:
        """Stands for where its rows come from, whatever they are."""
        return _digest(self.kind, self.path)

    @property
    def name(self) -> str:
        """A name for its results: the place, and what stands for the content."""
        return f"{self.place}-{_digest(self.version, f'{self.start} {self.stop}', *self.files)}"


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def is_dataset(path: str) -> bool:
    """Whether a path is a URL, a parquet file, an archive, a folder of these, or of Hugging Face's `save_to_disk`."""
    if "://" in path or path.lower().endswith((*_PARQUET, *_TAR)):
        return True
    names = os.listdir(path) if os.path.isdir(path) else []
    return any(name in _SAVED or name.lower().endswith((*_PARQUET, *_TAR)) for name in names)


def find_shards(data: Any, output: str = "") -> list[Shard]:
    """The shards of everything that was named.

    Args:
        data: a path, glob or URL of parquet files, tar archives, image files, folders of these, or of what Hugging
            Face's `save_to_disk` wrote; such a data set itself; or a list of these.
        output: where results are written, which is not searched.

    Raises:
        ValueError: a path matches nothing, is named twice, or a folder holds several kinds of data.
        TypeError: a data set that cannot be read by row number.
    """
    items = list(data) if isinstance(data, (list, tuple)) else [data]
    shards = list[Shard]()
    for number, each in enumerate(items):
        if isinstance(each, (str, Path)):
            shards += _of_path(str(each), output)
        else:
            shards += _of_dataset(each, "memory" if len(items) == 1 else f"memory/{number}")
    places = Counter(place for shard in shards for place in shard.files or (f"{shard.path} {shard.start}",))
    if twice := [place for place, count in places.items() if count > 1]:
        raise ValueError(f"{twice[0]} is named twice, so its rows would be doubled. Name it once.")
    return shards


def _of_path(path: str, output: str) -> list[Shard]:
    fs, inner = filesystem(path)
    if fs.isfile(inner):
        found = {inner: fs.info(inner)}
    elif saved := [name for name in _SAVED if fs.exists(f"{inner.rstrip('/')}/{name}")]:
        return _saved_dataset(url(fs, inner.rstrip("/")), several=saved == ["dataset_dict.json"])
    elif fs.isdir(inner):
        found = _visible(find(fs, inner), inner, url(fs, ""), output)
    else:
        found = {name: info for name, info in fs.glob(inner, detail=True).items() if info["type"] != "directory"}
        found = {name: info for name, info in found.items() if not _is_below(url(fs, name), output)}
    kinds: dict[str, dict[str, Any]] = {"parquet": {}, "tar": {}, "images": {}}
    for name, info in sorted(found.items()):
        if kind := _kind(name):
            kinds[kind][name] = info
    present = {kind: files for kind, files in kinds.items() if files}
    if not present:
        raise ValueError(f"'{path}' matches no parquet files, tar archives or images.")
    if len(present) > 1:
        counts = ", ".join(f"{len(files)} {kind}" for kind, files in present.items())
        raise ValueError(f"{path} holds files of several kinds ({counts}). Name those you mean with a glob.")
    ((kind, files),) = present.items()
    if kind == "images":
        return _image_shards(url(fs, inner), fs, files)
    if kind == "tar":
        return [Shard(url(fs, name), "tar", version=version(fs, name, info)) for name, info in files.items()]
    with ThreadPoolExecutor(_LISTERS) as pool:
        listed = pool.map(lambda item: patiently(partial(_parquet_shards, fs, *item)), files.items())
        return [shard for part in listed for shard in part]


def _visible(found: dict[str, Any], folder: str, root: str, output: str) -> dict[str, Any]:
    """Without our own results, and without what programs keep beside data under names with `_` or `.`."""
    return {
        name: info
        for name, info in found.items()
        if not _is_below(root + name, output)
        and not any(part.startswith(("_", ".")) for part in PurePosixPath(name[len(folder) :]).parts)
    }


def _is_below(name: str, folder: str) -> bool:
    return bool(folder) and name.startswith(f"{folder.rstrip('/')}/")


def _kind(name: str) -> str | None:
    lower = name.lower()
    if lower.endswith(_PARQUET):
        return "parquet"
    if lower.endswith(_TAR):
        return "tar"
    return "images" if PurePosixPath(lower).suffix in SUFFIXES else None


def _image_shards(path: str, fs: Any, files: dict[str, Any]) -> list[Shard]:
    names = list(files)
    shards: list[Shard] = []
    for start in range(0, len(names), SHARD_ROWS):
        part = names[start : start + SHARD_ROWS]
        versions, urls = _digest(*(version(fs, name, files[name]) for name in part)), tuple(url(fs, n) for n in part)
        shards.append(Shard(path, "images", start, start + len(part), len(part), versions, urls))
    return shards


def open_parquet(file: IO[bytes]) -> Any:
    """A parquet file whose row groups are read piece by piece: one may not fit into memory."""
    pq = require("pyarrow.parquet", extra="data", purpose="Reading parquet files")
    return pq.ParquetFile(file, buffer_size=2**23, pre_buffer=False)


def check_footer(fs: Any, name: str) -> None:
    """Parse the footer of a parquet file."""
    with fs.open(name, "rb") as file:
        open_parquet(file)


def _parquet_shards(fs: Any, name: str, info: dict[str, Any]) -> list[Shard]:
    """Runs of row groups of about `SHARD_ROWS` rows; a file whose footer is damaged is one shard."""
    whole = Shard(url(fs, name), "parquet", version=version(fs, name, info))
    try:
        with fs.open(name, "rb") as file:
            metadata = open_parquet(file).metadata
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except parse_errors() as error:
        damage(fs, name, error, check_footer)
        return [whole]  # reading it will say why
    shards, start, rows = list[Shard](), 0, 0
    for group, count in enumerate(counts):
        if rows and rows + count > SHARD_ROWS:
            shards.append(replace(whole, start=start, stop=group, rows=rows))
            start, rows = group, 0
        rows += count
    return [*shards, replace(whole, start=start, stop=len(counts), rows=rows)] if rows else shards


def _saved_dataset(path: str, *, several: bool) -> list[Shard]:
    datasets = require("datasets", extra="data", purpose=f"Reading {path}")
    loaded = datasets.load_from_disk(path)
    parts = {f"{path.rstrip('/')}/{split}": part for split, part in loaded.items()} if several else {path: loaded}
    return [shard for name, part in parts.items() for shard in _of_dataset(part, name)]


def _of_dataset(source: Any, path: str) -> list[Shard]:
    if isinstance(source, dict):  # a DatasetDict
        return [shard for split, part in source.items() for shard in _of_dataset(part, f"{path}/{split}")]
    if not (hasattr(source, "_fingerprint") and hasattr(source, "__len__") and hasattr(source, "column_names")):
        raise TypeError(
            f"expected paths or a datasets.Dataset, got {type(source).__name__}. Of a streaming data set name the "
            "files, such as hf://datasets/USER/NAME/**/*.parquet."
        )
    length = len(source)
    return [
        Shard(path, "dataset", start, min(start + SHARD_ROWS, length), min(SHARD_ROWS, length - start),
              source._fingerprint, source=source)
        for start in range(0, length, SHARD_ROWS)
    ]  # fmt: skip
