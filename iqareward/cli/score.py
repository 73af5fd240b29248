"""Score image files in batches, reading the next batch while one is scored."""

import io
import math
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

import iqareward
from iqareward.cli.reading import Loaded, read_ahead
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
)
from iqareward.cli.text import printable, say
from iqareward.image_files import References, find_images
from iqareward.rewards.catalog import load, published
from iqareward.rewards.scoring import collect_reasons
from iqareward.types import Reward

WHOLE = 100_000  # columns: in a file or pipe no line of a table is cut or folded
SUFFIXES = {".csv": "csv", ".json": "json", ".jsonl": "json"}


class Job(NamedTuple):
    """The arguments of `iqareward score`."""

    paths: Sequence[str]
    rewards: Sequence[str]
    reference: Path | None
    format: str | None
    output: Path | None
    overwrite: bool
    summary: Path | None
    published: bool
    device: str
    batch_size: int


class Column(NamedTuple):
    """A column of results: `scale * score + offset`, of one of the rewards."""

    name: str
    reward: int
    scale: float = 1.0
    offset: float = 0.0


def run(job: Job, messages: Console) -> bool:
    """Do the job; returns whether every picture has every score, and says on `messages` why not.

    Raises:
        ValueError: it cannot be done; nothing has been written then.
    """
    if job.summary is not None and job.summary.suffix.lower() not in (".csv", ".json"):
        raise ValueError(f"--summary {job.summary}: give it the suffix .csv or .json.")
    columns = _columns(job)
    names = [column.name for column in columns]
    form = _form(job, names)
    check_device(job.device)
    check_outputs(job.output, job.summary)
    rewards = [load(spec, device=job.device) for spec in job.rewards]
    references = find_references(rewards, job.reference)
    files, problems = find_images(job.paths)
    facts = {file: _facts(file, relative, references) for file, relative in files.items()}
    if references is not None and not any(reference for reference, _ in facts.values()):
        raise ValueError(f"none of {len(files)} pictures has a reference in {job.reference}: they need the same paths.")
    with ExitStack() as stack:
        rows, stream = stack.enter_context(_results(job, form, facts, messages))
        if form is None:
            width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else WHOLE
            stack.callback(lambda: rows and show(Console(width=width), summarize(names, rows.values()), rows.values()))
        for path, problem in problems.items():
            say(messages, f"{path}: {problem}", label="skipped", style="yellow")
        todo = {file: relative for file, relative in files.items() if file not in rows}
        shown = stream is None or not stream.isatty()  # rows on the terminal would be written behind the bar
        progress = stack.enter_context(progress_bar(messages, shown=shown))
        task = progress.add_task("scoring", total=len(todo))
        for batch in read_ahead(todo, references, device=job.device, batch_size=job.batch_size):
            for loaded, (scores, problem) in zip(batch, score_loaded(rewards, batch), strict=True):
                values = [column.scale * scores[column.reward] + column.offset for column in columns]
                row = rows[loaded.path] = Row(str(loaded.path), values, problem, *facts[loaded.path])
                if form is not None and stream is not None:
                    stream.write(form.dump(row))
                    stream.flush()
                if problem:
                    label = "no score" if all(map(math.isnan, scores)) else "incomplete"
                    say(messages, f"{row.path}: {problem}", label=label, style="yellow")
            progress.advance(task, len(batch))
    summary = summarize(names, rows.values())
    if form is not None:
        show(messages, summary, ())
    if job.summary is not None:
        write_summary(summary, job.summary)
    num_complete = sum(not row.problem for row in rows.values())
    written = ", ".join(str(path) for path in (job.output, job.summary) if path is not None)
    say(
        messages,
        f"{num_complete} of {len(files)} pictures have every score.{f' Written: {written}' if written else ''}",
    )
    return num_complete == len(files) and not problems


def check_device(device: str) -> None:
    """Compute something there.

    Raises:
        ValueError: that fails; the message is one line.
    """
    try:
        torch.zeros(1, device=device).tolist()
    except Exception as error:  # of many types: no such device, no driver, a build without it
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"--device {device} cannot be used: {reason}. `iqareward doctor` lists the devices."
        ) from error


def check_outputs(*files: Path | None) -> None:
    """Make the folders of results, and find out before anything is scored whether files can be written there.

    Args:
        files: result files to be written; None = not wanted.

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


def find_references(rewards: Sequence[Reward], path: Path | None) -> References | None:
    """Where the references are, or None if no reward compares with any.

    Raises:
        ValueError: there is no such file or folder, or a reward needs one and `path` is None.
    """
    needy = [reward.name for reward in rewards if reward.needs_references]
    if path is None and needy:
        raise ValueError(f"{', '.join(needy)} compares with references: pass --reference FOLDER (or FILE).")
    references = None if path is None else References(path)
    return references if needy else None


def score_loaded(rewards: Sequence[Reward], batch: Sequence[Loaded]) -> list[tuple[list[float], str]]:
    """One score per reward for each file, NaN where there is none, and the reasons for these; "" = it has all."""
    scores = [[math.nan] * len(rewards) for _ in batch]
    problems: list[list[str]] = [[loaded.problem] if loaded.problem else [] for loaded in batch]
    for place, reward in enumerate(rewards):
        chosen = [
            (row, loaded.image, loaded.reference)
            for row, loaded in enumerate(batch)
            if loaded.image is not None and (loaded.reference is not None or not reward.needs_references)
        ]
        if not chosen:
            continue
        with collect_reasons():
            values = _scores(reward, chosen)
        for item, value in zip(chosen, values, strict=True):
            row = item[0]
            scores[row][place] = value
            if math.isnan(value):
                with collect_reasons() as reasons:  # alone, each part of a sum says what it misses
                    _scores(reward, [item])
                problems[row] += reasons or [f"{reward.name}: it has no value for this image"]
    return [(row, printable("; ".join(reasons))) for row, reasons in zip(scores, problems, strict=True)]


def _scores(reward: Reward, chosen: Sequence[tuple[int, Tensor, Tensor | None]]) -> list[float]:
    references = [reference for _, _, reference in chosen if reference is not None]
    return reward(
        [image for _, image, _ in chosen], references=references if reward.needs_references else None
    ).tolist()


def progress_bar(messages: Console, *, shown: bool = True) -> Progress:
    """Of files, on standard error if that is a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    return Progress(*columns, console=messages, transient=True, disable=not (shown and messages.is_terminal))


def _columns(job: Job) -> list[Column]:
    """Those of the rewards, each followed by what papers print if that is something else."""
    specs = [spec.strip() for spec in job.rewards]
    columns: list[Column] = []
    for place, spec in enumerate(specs):
        if spec in specs[:place]:
            raise ValueError(f"--reward {spec} is given twice.")
        columns.append(Column(spec, place))
        scale, offset = published(spec) or (1.0, 0.0)
        if job.published and (scale, offset) != (1.0, 0.0):
            columns.append(Column(f"{spec} published", place, scale, offset))
    return columns


def _form(job: Job, names: Sequence[str]) -> Rows | None:
    """How to write rows: as `format` says, else as the suffix of `output` does; None = a table on the terminal."""
    name = job.format or "table"
    if job.output is not None:
        suffix = SUFFIXES.get(job.output.suffix.lower())
        name = job.format or suffix
        if name is None:
            raise ValueError(f"--output {job.output}: give it the suffix .csv or .jsonl, or pass --format csv or json.")
        if name == "table":
            raise ValueError("a table is for reading: use --format csv or json with --output.")
        if suffix not in (None, name):
            raise ValueError(f"--output {job.output} and --format {name} contradict each other. Leave out --format.")
    return None if name == "table" else CsvRows(names) if name == "csv" else JsonRows(names)


def _facts(file: Path, relative: Path, references: References | None) -> tuple[str, str]:
    """The reference of a picture, and what tells that the picture, its reference or this package has changed."""
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
def _results(
    job: Job, form: Rows | None, facts: Mapping[Path, tuple[str, str]], messages: Console
) -> Generator[tuple[dict[Path, Row], IO[str] | None]]:
    """Rows that are there already, and where to write the others; None = nowhere."""
    if form is None:
        yield {}, None
    elif job.output is None:
        stream = _data_output()
        stream.write(form.head)
        yield {}, stream
    else:
        with locked(job.output):
            known = {} if job.overwrite else read_rows(job.output, form)
            mine = {Path(path): row for path, row in known.items() if Path(path) in facts}
            rows = _up_to_date(job, mine, facts)
            kept = [row for path, row in known.items() if Path(path) not in mine or Path(path) in rows]
            write_rows(job.output, form, kept)
            if mine:
                again = f"; {len(mine) - len(rows)} have changed or lack a score" if len(mine) > len(rows) else ""
                say(messages, f"{len(rows)} of {len(facts)} pictures are scored already{again}.")
            with job.output.open("a", encoding="utf-8", errors="surrogateescape", newline="") as stream:
                yield rows, stream


def _up_to_date(job: Job, known: Mapping[Path, Row], facts: Mapping[Path, tuple[str, str]]) -> dict[Path, Row]:
    """The rows that scoring again would not change.

    Raises:
        ValueError: they were compared with the references of another folder.
    """
    for row in known.values():
        if row.reference and job.reference and not _is_within(Path(row.reference), job.reference):
            raise ValueError(
                f"{job.output} compares {row.path} with {row.reference}, which is not in {job.reference}. "
                "Choose another --output, or pass --overwrite to lose it."
            )
    return {
        path: row
        for path, row in known.items()
        if row.inputs and not row.problem and (row.reference, row.inputs) == facts[path]
    }


def _is_within(file: Path, folder: Path) -> bool:
    return file.resolve().is_relative_to(folder.resolve())


def _data_output() -> IO[str]:
    """Standard output for data: UTF-8 wherever it is not a terminal, and names of files byte by byte."""
    if isinstance(sys.stdout, io.TextIOWrapper) and not sys.stdout.isatty():
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    return sys.stdout
