"""Read the samples of a shard, and the columns to keep; what is damaged is a row with the reason."""

import itertools
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from iqareward.datasets.columns import Columns
from iqareward.datasets.samples import Sample
from iqareward.datasets.shards import Shard, check_footer, open_parquet
from iqareward.datasets.stores import damage, filesystem, first_line, is_local, parse_errors
from iqareward.optional import require

READ_ROWS = 32  # rows of a parquet file, or files of a store, that are in memory at a time
_MOST_BYTES = 2**30  # of one file in a tar archive
_TAR_BLOCK = 512
_FETCHERS = 16  # threads that read files from a store


class Read(NamedTuple):
    """A row of a shard: its number in the file, and its sample."""

    row: int
    sample: Sample


class Kept:
    """Columns to keep, in Arrow's own types: Python has no value for some of what they hold."""

    def __init__(self) -> None:
        self._pa = require("pyarrow", extra="data", purpose="Scoring data sets")
        self._types: dict[str, Any] = {}
        self._parts: dict[str, list[Any]] = {}

    def expect(self, types: dict[str, Any]) -> None:
        """Keep these columns."""
        self._types = types
        self._parts = {name: [] for name in types}

    def add(self, columns: dict[str, Any]) -> None:
        """Rows with values of all columns."""
        for name, values in columns.items():
            self._parts[name].append(values)

    def add_texts(self, texts: dict[str, str | None]) -> None:
        """One row of texts; a file name that is not UTF-8 gets escapes."""
        found = {name: None if text is None else text.encode("utf-8", "backslashreplace").decode()
                 for name, text in texts.items()}  # fmt: skip
        self.add({name: self._pa.array([text], self._pa.string()) for name, text in found.items()})

    def columns(self) -> dict[str, Any]:
        """The columns of all rows so far."""
        return {name: self._pa.chunked_array(parts, self._types[name]) for name, parts in self._parts.items()}

    def add_lost(self, count: int) -> None:
        """Rows that cannot be read."""
        self.add({name: self._pa.nulls(count, kind) for name, kind in self._types.items()})


def read(shard: Shard, columns: Columns, keep: Sequence[str] | None, kept: Kept) -> Iterator[Read]:
    """The rows of a shard in order; fills `kept`.

    Raises:
        ValueError: it lacks a column that is wanted.
        OSError: the store fails.
    """
    return _READERS[shard.kind](shard, columns, keep, kept)


def _lost(rows: range, reason: str, kept: Kept) -> Iterator[Read]:
    kept.add_lost(len(rows))
    return (Read(row, Sample(None, problem=f"not read: the file is damaged here: {reason}")) for row in rows)


def _read_parquet(shard: Shard, columns: Columns, keep: Sequence[str] | None, kept: Kept) -> Iterator[Read]:
    fs, name = filesystem(shard.path)
    try:
        with fs.open(name, "rb") as file:
            table = open_parquet(file)
            if shard.rows is None:
                raise OSError(f"{shard.path}: its end could not be read when it was listed, and can now.")
            counts = (table.metadata.row_group(group).num_rows for group in range(shard.stop))
            starts = [0, *itertools.accumulate(counts)]
            types = _kept_types(table.schema_arrow, keep)
            kept.expect(types)
            columns.check_names(table.schema_arrow.names)
            for group in range(shard.start, shard.stop):
                rows = range(starts[group], starts[group + 1])
                yield from _read_group(shard, table, rows, group, columns, list(types), kept)
    except parse_errors() as error:
        if shard.rows is not None:
            raise OSError(f"{shard.path}: {first_line(error)}") from error  # it could be listed
        yield from _lost(range(1), damage(fs, name, error, check_footer), kept)


def _read_group(
    shard: Shard, table: Any, rows: range, group: int, columns: Columns, keys: list[str], kept: Kept
) -> Iterator[Read]:
    fs, name = filesystem(shard.path)
    folder = Path(name).parent if is_local(fs) else None
    wanted = list(columns.names & {*table.schema_arrow.names})
    row = rows.start
    try:
        for batch in table.iter_batches(READ_ROWS, row_groups=[group], columns=[*{*wanted, *keys}]):
            content = {name: batch.column(name).to_pylist() for name in wanted}
            kept.add({name: batch.column(name) for name in keys})
            for sample in columns.samples(content, folder):
                yield Read(row, sample)
                row += 1
    except parse_errors() as error:

        def check(fs: Any, name: str) -> None:
            with fs.open(name, "rb") as file:
                for _ in open_parquet(file).iter_batches(READ_ROWS, row_groups=[group], columns=[*{*wanted, *keys}]):
                    pass

        yield from _lost(range(row, rows.stop), damage(fs, name, error, check), kept)


def _kept_types(schema: Any, keep: Sequence[str] | None) -> dict[str, Any]:
    """Arrow types of the columns to keep: those named, else all that are flat and no binary content."""
    if keep is None:
        return {each.name: each.type for each in schema if _is_plain(each.type)}
    if missing := [name for name in keep if name not in schema.names]:
        raise ValueError(f"expected the columns {missing} to keep, got {schema.names}.")
    return {name: schema.field(name).type for name in keep}


def _is_plain(kind: Any) -> bool:
    types = require("pyarrow.types", extra="data", purpose="Scoring data sets")
    if hasattr(kind, "storage_type"):  # an extension
        return _is_plain(kind.storage_type)
    if types.is_dictionary(kind):
        return _is_plain(kind.value_type)
    complex_kinds = (
        types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary, types.is_nested
    )  # fmt: skip
    return not any(is_kind(kind) for is_kind in complex_kinds)


def _read_dataset(shard: Shard, columns: Columns, keep: Sequence[str] | None, kept: Kept) -> Iterator[Read]:
    datasets = require("datasets", extra="data", purpose="Reading a data set")
    pa = require("pyarrow", extra="data", purpose="Reading a data set")
    source = shard.source.with_format(None)
    for name, feature in source.features.items():
        if isinstance(feature, datasets.Image):
            source = source.cast_column(name, datasets.Image(decode=False))  # what is decoded has lost bits
    types = _kept_types(source.features.arrow_schema, keep)
    kept.expect(types)
    columns.check_names(source.column_names)
    wanted = columns.names & {*source.column_names}
    values = source.select_columns(list(wanted))
    keys = source.select_columns(list(types)).with_format("arrow") if types else None
    for start in range(shard.start, shard.stop, READ_ROWS):
        stop = min(start + READ_ROWS, shard.stop)
        if keys is not None:
            part = keys[start:stop]
            kept.add({name: pa.concat_arrays(part.column(name).chunks) for name in types})
        for place, sample in enumerate(columns.samples(values[start:stop])):
            yield Read(start + place, sample)


def _read_images(shard: Shard, columns: Columns, keep: Sequence[str] | None, kept: Kept) -> Iterator[Read]:
    if keep or columns.references or columns.inputs or columns.prompts:
        raise ValueError(
            f"{shard.path} is a folder of images, which has no columns for references, inputs, prompts or keep. "
            "`iqareward score --reference FOLDER --output FILE.csv` compares folders."
        )
    kept.expect({"path": require("pyarrow", extra="data", purpose="Scoring data sets").string()})
    fs, _ = filesystem(shard.path)
    for start in range(0, len(shard.files), READ_ROWS):
        files = shard.files[start : start + READ_ROWS]
        for row, (file, content) in enumerate(zip(files, _contents(fs, files), strict=True), shard.start + start):
            kept.add_texts({"path": file})
            yield Read(row, Sample(content, problem="" if content is not None else "not read: the file is missing"))


def _contents(fs: Any, files: Sequence[str]) -> list[Any]:
    """What decoders can open: paths of local files, the content of others, read at the same time; None = missing.

    Raises:
        OSError: the store fails, in whatever way its package says so.
    """
    if is_local(fs):
        return [Path(file) for file in files]

    def fetch(file: str) -> bytes | None:
        try:
            return fs.cat_file(fs._strip_protocol(file))
        except FileNotFoundError:
            return None
        except Exception as error:  # such as aiohttp's, which are no OSError
            raise OSError(f"{file}: {first_line(error)}") from error

    with ThreadPoolExecutor(_FETCHERS) as pool:
        return list(pool.map(fetch, files))


def _read_tar(shard: Shard, columns: Columns, keep: Sequence[str] | None, kept: Kept) -> Iterator[Read]:
    fs, name = filesystem(shard.path)
    columns = replace(columns, **{role: ";".join(map(_suffix, names)) for role, names in columns.named()})
    keys = [_suffix(each) for each in keep or ()]
    text = require("pyarrow", extra="data", purpose="Scoring data sets").string()
    kept.expect(dict.fromkeys(["__key__", *keys], text))
    row, has_images, seen = 0, False, set[str]()
    try:
        with _opened(fs, name) as file:
            for key, content, problem in _tar_samples(file, {*columns.names, *keys}, seen):
                (sample,) = columns.samples({suffix: [content.get(suffix)] for suffix in columns.names})
                has_images |= sample.image is not None or bool(problem)
                texts = {each: content[each].decode("utf-8", "replace") if each in content else None for each in keys}
                kept.add_texts({"__key__": key} | texts)
                yield Read(row, sample._replace(image=None, problem=problem) if problem else sample)
                row += 1
    except parse_errors() as error:

        def check(fs: Any, name: str) -> None:
            with _opened(fs, name) as file:
                for _ in _tar_samples(file, columns.names, set()):
                    pass

        yield from _lost(range(row, row + 1), damage(fs, name, error, check), kept)
        return
    if lacking := [each for each in keys if each not in seen]:
        raise ValueError(f"{shard.path}: expected files named {lacking} to keep, got {', '.join(sorted(seen))}.")
    if row and not has_images:
        raise ValueError(
            f"{shard.path}: expected images named {columns.images}, got files named {', '.join(sorted(seen))}. "
            "Name them: images=..."
        )


def _suffix(name: str) -> str:
    return name.lower().lstrip(".")


def _opened(fs: Any, name: str) -> Any:
    return fs.open(name, "rb", compression="gzip" if name.lower().endswith(("gz", ".tgz")) else None)


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
                if member.isdir() or not (stem and dot):
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
                elif not member.isreg() or member.issparse():
                    problem = f"not read: {base} is no plain file in the archive, but a link or the like"
                elif member.size > _MOST_BYTES:
                    problem = f"not read: {base} has {member.size} bytes, more than {_MOST_BYTES}"
                else:
                    content[suffix] = _content(file, member)
            except parse_errors() as error:
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
