"""Find the shards of a data set, pieces that are scored as a whole, and read their samples."""

import hashlib
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from iqareward.datasets.columns import Columns
from iqareward.datasets.samples import Sample
from iqareward.image_files import SUFFIXES
from iqareward.optional import require

SHARD_ROWS = 2000  # about as many are lost when a process dies, and as many wait for one process at the end
READ_ROWS = 32  # rows of a parquet file, or files of a store, that are in memory at a time
_MOST_BYTES = 2**30  # of one file in a tar archive
_TAR_BLOCK = 512
_LISTERS = 32  # threads that ask a store for the facts of files
_PARQUET, _TAR = (".parquet", ".pq"), (".tar", ".tar.gz", ".tgz")
_SAVED = ("state.json", "dataset_dict.json")  # of what Hugging Face's `save_to_disk` writes

Keys = dict[str, Any]


class Read(NamedTuple):
    """A row of a shard: its number in the file, the columns to keep, and its sample."""

    row: int
    keys: Keys
    sample: Sample


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
    def name(self) -> str:
        """A name for its results: the first half stands for the place, the second for the content."""
        place = f"{self.kind} {self.path} {self.start} {self.stop}"
        return f"{_digest(place)}-{_digest(self.version, *self.files)}"

    def read(self, columns: Columns, keep: Sequence[str] | None, types: dict[str, Any]) -> Iterator[Read]:
        """Its rows in order; what is damaged is a row with the reason. Fills `types` with Arrow types of the keys.

        Raises:
            ValueError: it lacks a column that is wanted.
            OSError: the bytes cannot be read.
        """
        return _READERS[self.kind](self, columns, keep, types)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path or URL, and the path within it.

    Raises:
        ImportError: a package for that kind of store is missing.
        ValueError: the kind of store is unknown.
    """
    fsspec = require("fsspec", extra="data", purpose=f"Reading {path}")
    return fsspec.core.url_to_fs(path)


def is_dataset(path: str) -> bool:
    """Whether a path is a URL, a parquet file, an archive, or what Hugging Face's `save_to_disk` wrote."""
    return (
        "://" in path or path.lower().endswith((*_PARQUET, *_TAR)) or any(Path(path, name).exists() for name in _SAVED)
    )


def find_shards(data: Any, columns: Columns) -> list[Shard]:
    """The shards of everything that was named.

    Args:
        data: a path, glob or URL of parquet files, tar archives, image files, folders of these, or of what Hugging
            Face's `save_to_disk` wrote; such a data set itself; or a list of these.
        columns: which columns are wanted.

    Raises:
        ValueError: a path matches nothing, or a folder holds several kinds of data.
        TypeError: a data set that cannot be read by row number.
    """
    shards = list[Shard]()
    for each in data if isinstance(data, (list, tuple)) else [data]:
        shards += _of_path(str(each)) if isinstance(each, (str, Path)) else _of_dataset(each, "memory")
    names = [shard.name for shard in shards]
    if len({*names}) < len(names):
        twice = next(shard.path for shard in shards if names.count(shard.name) > 1)
        raise ValueError(f"{twice} is named twice, so its rows would be doubled. Name it once.")
    return shards


def _of_path(path: str) -> list[Shard]:
    fs, inner = filesystem(path)
    if fs.isfile(inner):
        found = {inner: fs.info(inner)}
    elif saved := [name for name in _SAVED if fs.exists(f"{inner.rstrip('/')}/{name}")]:
        return _saved_dataset(path, several=saved == ["dataset_dict.json"])
    elif fs.isdir(inner):
        found = fs.find(inner, detail=True)
    else:
        found = {name: info for name, info in fs.glob(inner, detail=True).items() if info["type"] == "file"}
    kinds: dict[str, dict[str, Any]] = {"parquet": {}, "tar": {}, "images": {}}
    for name, info in sorted(found.items()):
        if kind := _kind(PurePosixPath(name).name, only=len(found) == 1):
            kinds[kind][name] = info
    present = {kind: files for kind, files in kinds.items() if files}
    if not present:
        raise ValueError(f"'{path}' matches no parquet files, tar archives or images.")
    if len(present) > 1:
        counts = ", ".join(f"{len(files)} {kind}" for kind, files in present.items())
        raise ValueError(f"{path} holds files of several kinds ({counts}). Name those you mean with a glob.")
    ((kind, files),) = present.items()
    if kind == "images":
        return _image_shards(path, fs, files)
    if kind == "tar":
        return [Shard(_url(fs, name), "tar", version=_version(info)) for name, info in files.items()]
    with ThreadPoolExecutor(_LISTERS) as pool:
        return [shard for part in pool.map(lambda item: _parquet_shards(fs, *item), files.items()) for shard in part]


def is_local(fs: Any) -> bool:
    """Whether a file system is of this machine."""
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _url(fs: Any, name: str) -> str:
    return name if is_local(fs) else fs.unstrip_protocol(name)


def _kind(name: str, only: bool) -> str | None:
    lower = name.lower()
    if lower.startswith(("_", ".")) and not only:
        return None  # what other programs leave beside data
    if lower.endswith(_PARQUET):
        return "parquet"
    if lower.endswith(_TAR):
        return "tar"
    return "images" if PurePosixPath(lower).suffix in SUFFIXES else None


def _version(info: dict[str, Any]) -> str:
    changes = (info.get(key) for key in ("size", "mtime", "ETag", "etag", "LastModified", "last_modified", "blob_id"))
    return " ".join(str(change) for change in changes if change is not None)


def _image_shards(path: str, fs: Any, files: dict[str, Any]) -> list[Shard]:
    names = list(files)
    shards: list[Shard] = []
    for start in range(0, len(names), SHARD_ROWS):
        part = names[start : start + SHARD_ROWS]
        version, urls = _digest(*(_version(files[name]) for name in part)), tuple(_url(fs, name) for name in part)
        shards.append(Shard(path, "images", start, start + len(part), len(part), version, urls))
    return shards


def _parquet_shards(fs: Any, name: str, info: dict[str, Any]) -> list[Shard]:
    """Runs of row groups of about `SHARD_ROWS` rows; a file whose footer is damaged is one shard."""
    whole = Shard(_url(fs, name), "parquet", version=_version(info))
    try:
        with fs.open(name, "rb") as file:
            metadata = _parquet(file).metadata
            counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    except _parse_errors() as error:
        _damage(fs, name, error)
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


def _parse_errors() -> tuple[type[Exception], ...]:
    """What readers raise if the content is wrong, or if a store fails."""
    pyarrow = require("pyarrow", extra="data", purpose="Scoring data sets")
    return OSError, EOFError, tarfile.TarError, zlib.error, pyarrow.lib.ArrowException


def _damage(fs: Any, name: str, error: Exception) -> str:
    """What is wrong with a file that could not be parsed.

    Raises:
        OSError: it is missing, or some of its bytes cannot be read: the store failed, and may work again.
    """
    if isinstance(error, (FileNotFoundError, PermissionError)):
        raise error
    missing = fs.info(name)["size"]
    with fs.open(name, "rb") as file:
        while chunk := file.read(2**24):
            missing -= len(chunk)
    if missing:
        raise OSError(f"{name}: {missing} of its bytes cannot be read.") from error
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _lost(rows: range, damage: str) -> Iterator[Read]:
    """Rows that cannot be read."""
    return (Read(row, {}, Sample(None, problem=f"not read: the file is damaged here: {damage}")) for row in rows)


def _parquet(file: IO[bytes]) -> Any:
    pq = require("pyarrow.parquet", extra="data", purpose="Reading parquet files")
    return pq.ParquetFile(file, buffer_size=2**23, pre_buffer=False)  # a row group may not fit into memory


def _read_parquet(shard: Shard, columns: Columns, keep: Sequence[str] | None, types: dict[str, Any]) -> Iterator[Read]:
    fs, name = filesystem(shard.path)
    try:
        with fs.open(name, "rb") as file:
            table = _parquet(file)
            groups = [table.metadata.row_group(group).num_rows for group in range(table.metadata.num_row_groups)]
            types |= _kept(table.schema_arrow, keep)
            columns.check_names(table.schema_arrow.names)
            for group in range(shard.start, shard.stop):
                first = sum(groups[:group])
                yield from _read_group(
                    shard, fs, name, table, range(first, first + groups[group]), group, columns, types
                )
    except _parse_errors() as error:
        yield from _lost(range(1), _damage(fs, name, error))


def _read_group(
    shard: Shard, fs: Any, name: str, table: Any, rows: range, group: int, columns: Columns, types: dict[str, Any]
) -> Iterator[Read]:
    folder = None if "://" in shard.path else Path(name).parent
    wanted = [*{*columns.names, *types} & {*table.schema_arrow.names}]
    row = rows.start
    try:
        for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=wanted):
            content = {name: batch.column(name).to_pylist() for name in wanted}
            for place, sample in enumerate(columns.samples(content, folder)):
                yield Read(row, {name: content[name][place] for name in types}, sample)
                row += 1
    except _parse_errors() as error:
        yield from _lost(range(row, rows.stop), _damage(fs, name, error))


def _kept(schema: Any, keep: Sequence[str] | None) -> dict[str, Any]:
    """Arrow types of the columns to keep: those named, else all that are flat and no binary content."""
    types = require("pyarrow.types", extra="data", purpose="Reading parquet files")
    if keep is None:
        binary = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_nested
        return {each.name: each.type for each in schema if not any(is_kind(each.type) for is_kind in binary)}
    if missing := [name for name in keep if name not in schema.names]:
        raise ValueError(f"expected the columns {missing} to keep, got {schema.names}.")
    return {name: schema.field(name).type for name in keep}


def _read_dataset(shard: Shard, columns: Columns, keep: Sequence[str] | None, types: dict[str, Any]) -> Iterator[Read]:
    datasets = require("datasets", extra="data", purpose="Reading a data set")
    source = shard.source.with_format(None)
    for name, feature in source.features.items():
        if isinstance(feature, datasets.Image):
            source = source.cast_column(name, datasets.Image(decode=False))  # what is decoded has lost bits
    types |= _kept(source.features.arrow_schema, keep)
    source = source.select_columns([*{*columns.names, *types} & {*source.column_names}])
    for start in range(shard.start, shard.stop, READ_ROWS):
        content = source[start : min(start + READ_ROWS, shard.stop)]
        for place, sample in enumerate(columns.samples(content)):
            yield Read(start + place, {name: content[name][place] for name in types}, sample)


def _read_images(shard: Shard, columns: Columns, keep: Sequence[str] | None, types: dict[str, Any]) -> Iterator[Read]:
    if keep or columns.references or columns.inputs or columns.prompts:
        raise ValueError(
            f"{shard.path} is a folder of images, which has no columns for references, inputs, prompts or keep. "
            "`iqareward score --reference FOLDER --output FILE.csv` compares folders."
        )
    types["path"] = require("pyarrow", extra="data", purpose="Scoring data sets").string()
    fs, _ = filesystem(shard.path)
    for start in range(0, len(shard.files), READ_ROWS):
        files = shard.files[start : start + READ_ROWS]
        for row, (file, content) in enumerate(zip(files, _contents(fs, files), strict=True), shard.start + start):
            problem = f"not read: {_first_line(content)}" if isinstance(content, Exception) else ""
            yield Read(row, {"path": file}, Sample(None if problem else content, problem=problem))


def _contents(fs: Any, files: Sequence[str]) -> list[Any]:
    """What decoders can open: paths of local files, the content of others, which are read at the same time."""
    if is_local(fs):
        return [Path(file) for file in files]
    inner = [fs._strip_protocol(file) for file in files]
    found = fs.cat(inner, on_error="return")
    contents = [found[name] for name in inner]
    for content in contents:
        if isinstance(content, OSError) and not isinstance(content, (FileNotFoundError, PermissionError)):
            raise content  # the store failed, not the image
    return contents


def _read_tar(shard: Shard, columns: Columns, keep: Sequence[str] | None, types: dict[str, Any]) -> Iterator[Read]:
    fs, name = filesystem(shard.path)
    types |= dict.fromkeys(
        ["__key__", *(keep or ())], require("pyarrow", extra="data", purpose="tar archives").string()
    )
    row, has_images, seen = 0, False, set[str]()
    try:
        with fs.open(name, "rb", compression="infer" if not name.endswith(".tgz") else "gzip") as file:
            for key, content, problem in _tar_samples(file, {*columns.names, *types}, seen):
                (sample,) = columns.samples({suffix: [content.get(suffix)] for suffix in columns.names})
                has_images |= sample.image is not None
                texts = {each: content[each].decode("utf-8", "replace") for each in types if each in content}
                yield Read(
                    row, texts | {"__key__": key}, sample._replace(image=None, problem=problem) if problem else sample
                )
                row += 1
    except _parse_errors() as error:
        yield from _lost(range(row, row + 1), _damage(fs, name, error))
        return
    if row and not has_images:
        raise ValueError(
            f"{shard.path}: expected images named {columns.images}, got files named {', '.join(sorted(seen))}. "
            "Name them: images=..."
        )


def _tar_samples(file: IO[bytes], wanted: set[str], seen: set[str]) -> Iterator[tuple[str, dict[str, bytes], str]]:
    """WebDataset's samples: neighbours with the same name up to the first dot. `seen` gets the rests of the names."""
    current, content, problem, end = None, dict[str, bytes](), "", None
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while True:
            try:
                member = archive.next()
                if member is None:
                    _check_end(file, archive.offset)
                    break
                vars(archive)["members"] = []  # a list of everything so far
                folder, _, base = member.name.rpartition("/")
                stem, dot, suffix = base.partition(".")
                if not (member.isfile() and stem and dot):
                    continue
                key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
                if key != current:
                    if current is not None:
                        yield current, content, problem
                    current, content, problem = key, {}, ""
                seen.add(suffix)
                if suffix not in wanted:
                    continue
                if suffix in content:
                    problem = f"not read: there are two files {key}.{suffix}"
                elif member.size > _MOST_BYTES:
                    problem = f"not read: {base} has {member.size} bytes, more than {_MOST_BYTES}"
                else:
                    content[suffix] = _content(file, member)
            except _parse_errors() as error:
                end = error
                break
    if current is not None:
        yield current, content, problem
    if end is not None:  # after the sample before the damage
        raise end


def _content(file: IO[bytes], member: tarfile.TarInfo) -> bytes:
    file.seek(member.offset_data)
    content = file.read(member.size)
    if len(content) != member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _check_end(file: IO[bytes], offset: int) -> None:
    """tarfile takes damaged headers, and an archive cut between two files, for the end."""
    file.seek(offset)
    end = file.read(_TAR_BLOCK)
    if len(end) < _TAR_BLOCK:
        raise tarfile.ReadError("it ends without the mark of an archive's end, so files may be missing")
    if any(end):
        raise tarfile.ReadError("the header of a file is not valid; the files from there on are not known")
    while block := file.read(2**20):
        if any(block):
            raise tarfile.ReadError("there are further files behind its end, as if archives had been joined")


_READERS = {"parquet": _read_parquet, "tar": _read_tar, "images": _read_images, "dataset": _read_dataset}
