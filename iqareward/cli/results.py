"""Result files: rows that are written one by one, so that a killed run loses nothing, and read again to go on."""

import csv
import io
import json
import math
import os
import re
import statistics
from collections.abc import Collection, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout
from rich.console import Console
from rich.table import Table

from iqareward.atomic import atomic_write, write_text
from iqareward.cli.text import plain

_FACTS = ("problem", "reference", "inputs")  # columns after the scores
_UNQUOTED = re.compile(r"[\w ./\\:-]*")  # what no program takes for a separator or quote
_FORMULA = re.compile("[=+@\t\r\n\uff1d\uff0b\uff0d\uff20-]")  # how it begins, also in full width


@dataclass(frozen=True)
class Row:
    """The result of one image.

    Attributes:
        path: path of the image, as the command found it.
        scores: one per column; NaN = not scored.
        problem: why scores are missing; empty if none is.
        reference: path of its reference; empty if there is none.
        inputs: sizes and times of the files, and the version; if they change, the scores are out of date.
    """

    path: str
    scores: Sequence[float]
    problem: str = ""
    reference: str = ""
    inputs: str = ""


class CsvRows:
    """Rows `path,<reward>,...,problem,reference,inputs` below a header; NaN is an empty cell."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)
        self.head = csv_line(["path", *columns, *_FACTS])

    def dump(self, row: Row) -> str:
        scores = ("" if math.isnan(score) else repr(score) for score in row.scores)
        return csv_line([no_formula(row.path), *scores, row.problem, no_formula(row.reference), row.inputs])

    def load(self, text: str) -> list[Row]:
        """The rows of a file, without an incomplete last one; raises anything if another program has written it."""
        whole = io.StringIO(text[: _end_of_rows(text)], newline="")
        header, *lines = (line for line in csv.reader(whole, strict=True) if line)
        names = header[1 : -len(_FACTS)]
        if header != ["path", *names, *_FACTS]:
            raise ValueError(header)
        _check_columns(names, self.columns)
        rows: list[Row] = []
        for path, *cells, problem, reference, inputs in lines:
            scores = [float(cell or "nan") for _, cell in zip(names, cells, strict=True)]
            rows.append(Row(str(Path(path)), scores, problem, str(Path(reference)) if reference else "", inputs))
        return rows


class JsonRows:
    """One JSON object a line; NaN is null."""

    head = ""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = list(columns)

    def dump(self, row: Row) -> str:
        scores = [None if math.isnan(score) else score for score in row.scores]
        facts = {"problem": row.problem, "reference": row.reference, "inputs": row.inputs}
        line = {"path": row.path, "scores": dict(zip(self.columns, scores, strict=True)), **facts}
        return json.dumps(line, allow_nan=False) + "\n"

    def load(self, text: str) -> list[Row]:
        rows: list[Row] = []
        for line in filter(str.strip, text[: text.rfind("\n") + 1].split("\n")):
            row = json.loads(line)
            _check_columns(list(row["scores"]), self.columns)
            scores = [math.nan if score is None else float(score) for score in row["scores"].values()]
            rows.append(Row(row["path"], scores, row["problem"], row["reference"], row["inputs"]))
        return rows


Rows = CsvRows | JsonRows


class _OtherColumnsError(Exception):
    pass


def _check_columns(found: list[str], expected: list[str]) -> None:
    if found != expected:
        raise _OtherColumnsError(", ".join(found))


def csv_line(cells: Iterable[str]) -> str:
    """A line of CSV; text is quoted wherever a program could take part of it for a separator, be it `;` or a tab."""
    return ",".join(cell if _UNQUOTED.fullmatch(cell) else '"' + cell.replace('"', '""') + '"' for cell in cells) + "\n"


def no_formula(path: str) -> str:
    """A path as a cell; what a spreadsheet would take for a formula gets `./` in front, which is the same file."""
    return f"./{path}" if _FORMULA.match(path) else path


def _end_of_rows(text: str) -> int:
    """End of the last complete line; a newline within quotes ends none."""
    end, quoted = 0, False
    for match in re.finditer('["\n]', text):
        if match[0] == '"':
            quoted = not quoted
        elif not quoted:
            end = match.end()
    return end


@contextmanager
def locked(file: Path) -> Generator[None]:
    """Keep other runs from writing to `file` within the block; its folder is made if it is missing.

    Raises:
        ValueError: another run writes there, or it is not a regular file.
    """
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not a regular file. Leave out --output to print the scores.")
    real = file.resolve()  # runs that reach it by different links share one lock
    real.parent.mkdir(parents=True, exist_ok=True)
    path = real.with_name(f".{real.name}.lock")
    try:
        with FileLock(path, timeout=0):
            try:
                yield
            finally:
                with suppress(OSError):  # Windows does not remove open files
                    path.unlink()  # while it is locked, so that a run that has it open already is refused
    except Timeout as error:
        raise ValueError(f"another run writes to {file}. Wait for its end, or choose another --output.") from error


def read_rows(file: Path, rows: Rows) -> dict[str, Row]:
    """The rows of a results file by path, the last one of each; none if it is missing or empty.

    Raises:
        ValueError: it holds other columns, or something else.
    """
    text = file.read_bytes().decode("utf-8", "surrogateescape") if file.exists() else ""
    ways_out = "Choose another --output, or pass --overwrite to replace it."
    try:
        return {row.path: row for row in rows.load(text)} if text else {}
    except _OtherColumnsError as error:
        raise ValueError(
            f"{file} holds scores of {error}, not of {', '.join(rows.columns)} as asked for. {ways_out}"
        ) from error
    except Exception as error:  # whatever the parsers make of a foreign file
        raise ValueError(f"{file} was not written by this command. {ways_out}") from error


def write_rows(file: Path, rows: Rows, known: Iterable[Row]) -> None:
    """Replace the content of `file` by these rows, at once."""
    with atomic_write(file) as stream:
        for text in (rows.head, *map(rows.dump, known)):
            stream.write(text.encode("utf-8", "surrogateescape"))


class Summary(NamedTuple):
    """Mean and standard deviation (divided by n - 1) of the scores in one column; None where there are too few."""

    name: str
    mean: float | None
    std: float | None
    scored: int
    images: int


def summarize(columns: Sequence[str], rows: Collection[Row]) -> list[Summary]:
    """The summary of each column, without what was not scored."""
    found: list[Summary] = []
    for place, name in enumerate(columns):
        scores = [row.scores[place] for row in rows if not math.isnan(row.scores[place])]
        mean = statistics.fmean(scores) if scores else None
        std = statistics.stdev(scores) if len(scores) > 1 else None
        found.append(Summary(name, mean, std, len(scores), len(rows)))
    return found


def write_summary(summary: Sequence[Summary], file: Path) -> None:
    """Write a summary as CSV, or as JSON if the suffix says so."""
    if file.suffix.lower() == ".csv":
        cells = [["" if cell is None else str(cell) for cell in column] for column in summary]
        write_text(file, "".join(map(csv_line, [Summary._fields, *cells])))
    else:
        write_text(file, json.dumps([column._asdict() for column in summary], indent=2) + "\n")


def show(console: Console, summary: Sequence[Summary], rows: Collection[Row]) -> None:
    """Print a table with a line for each row, and below it the mean, the standard deviation and the count."""
    folder, names = _short_names(rows)
    table = Table(title=plain(folder), title_justify="left", show_edge=False)
    table.add_column("image" if rows else "", overflow="fold")
    for column in summary:
        table.add_column(plain(column.name), justify="right", overflow="fold")
    for name, row in zip(names, rows, strict=True):
        table.add_row(plain(name), *map(_number, row.scores))
    table.add_section()
    table.add_row("mean", *(_number(column.mean) for column in summary))
    table.add_row("std", *(_number(column.std) for column in summary))
    table.add_row("scored", *(f"{column.scored} of {column.images}" for column in summary))
    console.print(table)


def _short_names(rows: Collection[Row]) -> tuple[str, list[str]]:
    """The folder that holds all images, and their paths in it."""
    paths = [Path(row.path) for row in rows]
    try:
        folder = Path(os.path.commonpath([path.parent for path in paths]))
        return "" if folder == Path() else f"{folder}{os.sep}", [str(path.relative_to(folder)) for path in paths]
    except ValueError:  # none, or some from the root and some from here
        return "", [row.path for row in rows]


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.4f}"
