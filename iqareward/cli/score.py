"""The command `iqareward score`: score image files into a table or a results file, and go on where a run stopped."""

import io
import math
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from rich.console import Console

import iqareward
from iqareward.cli.results import (
    CsvRows,
    JsonRows,
    Row,
    Rows,
    locked,
    read_rows,
    show,
    summarize,
    write_rows,
    write_summary,
)  # fmt: skip
from iqareward.cli.scoring import ReferenceFinder, Scorer, progress_bar
from iqareward.cli.text import say
from iqareward.image_files import find_images
from iqareward.rewards.catalog import published

_UNLIMITED = 100_000  # columns: in a file or pipe no line of a table is cut or folded
_FORMATS = {".csv": "csv", ".json": "json", ".jsonl": "json"}


class Job(NamedTuple):
    """The arguments of `iqareward score`."""

    paths: list[str]
    reward: list[str]
    reference: Path | None
    format: str | None
    output: Path | None
    overwrite: bool
    summary: Path | None
    published: bool
    device: str
    batch_size: int


class Column(NamedTuple):
    """A column of results: `scale * score + offset` of one of the rewards."""

    name: str
    reward: int
    scale: float = 1.0
    offset: float = 0.0


def run(job: Job, messages: Console) -> bool:
    """Score the files; returns whether every image has every score, and says on `messages` why not.

    Raises:
        ValueError: it cannot be done; nothing has been written then.
    """
    if job.summary is not None and job.summary.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"--summary {job.summary}: give it the suffix .csv or .json.")
    scorer = Scorer(job.reward, job.reference, job.device, job.batch_size)
    columns = _columns(scorer.names, job.published)
    names = [column.name for column in columns]
    form = file_form(job, names)
    check_outputs(job.output, job.summary)
    files, problems = find_images(job.paths)
    facts = facts_of(files, scorer.references)
    if scorer.references is not None and not any(reference for reference, _ in facts.values()):
        raise ValueError(f"none of {len(files)} images has a reference in {job.reference}: they need the same paths.")
    with ExitStack() as stack:
        rows, stream = stack.enter_context(results(job, form, facts, messages))
        if form is None:
            width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _UNLIMITED
            stack.callback(lambda: rows and show(Console(width=width), summarize(names, rows.values()), rows.values()))
        for path, problem in problems.items():
            say(messages, f"{path}: {problem}", label="skipped", style="yellow")
        score_rest(rows, stream, form, files, facts, scorer, columns, messages)
    summary = summarize(names, rows.values())
    if form is not None:
        show(messages, summary, ())
    if job.summary is not None:
        write_summary(summary, job.summary)
    complete = sum(not row.problem for row in rows.values())
    written = ", ".join(str(path) for path in (job.output, job.summary) if path is not None)
    say(messages, f"{complete} of {len(files)} images have every score.{f' Written: {written}' if written else ''}")
    return complete == len(files) and not problems


def score_rest(
    rows: dict[Path, Row],
    stream: IO[str] | None,
    form: Rows | None,
    files: Mapping[Path, Path],
    facts: Mapping[Path, tuple[str, str]],
    scorer: Scorer,
    columns: Sequence[Column],
    messages: Console,
) -> None:
    """Score the files that have no row yet, add their rows, and write them to `stream`, if there is one."""
    todo = {file: relative for file, relative in files.items() if file not in rows}
    shown = stream is None or not stream.isatty()  # rows on the terminal would be written behind the bar
    with progress_bar(messages, shown=shown) as progress:
        task = progress.add_task("scoring", total=len(todo))
        for batch in scorer.score(todo):
            for path, scores, problem in batch:
                values = [column.scale * scores[column.reward] + column.offset for column in columns]
                row = rows[path] = Row(str(path), values, problem, *facts[path])
                if form is not None and stream is not None:
                    stream.write(form.dump(row))
                    stream.flush()
                if problem:
                    label = "no score" if all(map(math.isnan, scores)) else "incomplete"
                    say(messages, f"{row.path}: {problem}", label=label, style="yellow")
            progress.advance(task, len(batch))


def check_outputs(*files: Path | None) -> None:
    """Make the folders of result files, and refuse before anything is scored what cannot be written.

    Raises:
        ValueError: two are the same file, one is a folder, or a folder cannot be written to.
    """
    places: set[str] = set()
    for file in filter(None, files):
        if os.path.realpath(file) in places:
            raise ValueError(f"{file} cannot hold two kinds of results. Choose another file for one of them.")
        places.add(os.path.realpath(file))
        if file.is_dir():
            raise ValueError(f"{file} is a folder. Name a file in it.")
        file.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(file.parent, os.W_OK):
            raise ValueError(f"{file} cannot be written: no permission for its folder. Choose another place.")


def _columns(names: list[str], with_published: bool) -> list[Column]:
    """A column per reward, followed if wanted by what papers print where that is another number."""
    columns: list[Column] = []
    for place, name in enumerate(names):
        columns.append(Column(name, place))
        scale, offset = published(name) or (1.0, 0.0)
        if with_published and (scale, offset) != (1.0, 0.0):
            columns.append(Column(f"{name} published", place, scale, offset))
    return columns


def file_form(job: Job, names: list[str]) -> Rows | None:
    """The file format that --format or the suffix of --output names; None = a table on the terminal."""
    name = job.format or "table"
    if job.output is not None:
        suffix = _FORMATS.get(job.output.suffix.lower())
        name = job.format or suffix
        if name is None:
            raise ValueError(f"--output {job.output}: give it the suffix .csv or .jsonl, or pass --format csv or json.")
        if name == "table":
            raise ValueError("a table is for reading: use --format csv or json with --output.")
        if suffix not in (None, name):
            raise ValueError(f"--output {job.output} and --format {name} contradict each other. Leave out --format.")
    return None if name == "table" else CsvRows(names) if name == "csv" else JsonRows(names)


def facts_of(files: Mapping[Path, Path], references: ReferenceFinder | None) -> dict[Path, tuple[str, str]]:
    """For each file its reference; and sizes, times and version, which change if its scores may change."""
    return {file: _facts(file, relative, references) for file, relative in files.items()}


def _facts(file: Path, relative: Path, references: ReferenceFinder | None) -> tuple[str, str]:
    reference = None
    try:
        if references is not None:
            reference = references.find(relative)
        stats = [path.stat() for path in (file, reference) if path is not None]
    except (OSError, ValueError):
        return "", ""  # reading it will say why
    marks = (f"{stat.st_size}:{stat.st_mtime_ns}" for stat in stats)
    return str(reference or ""), " ".join(["iqareward", iqareward.__version__, *marks])


@contextmanager
def results(
    job: Job, form: Rows | None, facts: Mapping[Path, tuple[str, str]], messages: Console
) -> Generator[tuple[dict[Path, Row], IO[str] | None]]:
    """Rows that an earlier run has written, and where to write the others; None = nowhere."""
    if form is None:
        yield {}, None
    elif job.output is None:
        if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():  # data, in any locale
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
        sys.stdout.write(form.head)
        yield {}, sys.stdout
    else:
        with locked(job.output):
            known = {} if job.overwrite else read_rows(job.output, form)
            mine = {Path(path): row for path, row in known.items() if Path(path) in facts}
            _check_references(job, mine)
            rows = {
                path: row
                for path, row in mine.items()
                if row.inputs and not row.problem and (row.reference, row.inputs) == facts[path]
            }
            stale = mine.keys() - rows.keys()
            write_rows(job.output, form, [row for path, row in known.items() if Path(path) not in stale])
            if mine:
                again = f"; {len(stale)} have changed or lack a score" if stale else ""
                say(messages, f"{len(rows)} of {len(facts)} images are scored already{again}.")
            with job.output.open("a", encoding="utf-8", errors="surrogateescape", newline="") as stream:
                yield rows, stream


def _check_references(job: Job, known: Mapping[Path, Row]) -> None:
    """Refuse to go on with rows that were compared with the references of another folder."""
    for row in known.values():
        if not (row.reference and job.reference):
            continue
        if not Path(row.reference).resolve().is_relative_to(job.reference.resolve()):
            raise ValueError(
                f"{job.output} compares {row.path} with {row.reference}, which is not in {job.reference}. "
                "Choose another --output, or pass --overwrite to replace it."
            )
