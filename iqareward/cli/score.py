"""Score image files in batches, reading the next batch while one is scored."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iqareward.cli.reading import Loaded, read_ahead
from iqareward.cli.results import CsvWriter, JsonWriter, TableWriter, Writer, scored_paths
from iqareward.cli.text import say
from iqareward.image_files import References, find_images
from iqareward.rewards.catalog import load
from iqareward.rewards.compose import evaluate
from iqareward.types import Reward


class Job(NamedTuple):
    """The arguments of `iqareward score`."""

    paths: Sequence[str]
    rewards: Sequence[str]
    reference: Path | None
    format: str
    output: Path | None
    device: str
    batch_size: int


def run(job: Job, messages: Console) -> int:
    """Do the job; returns how many files could not be scored (each is reported on `messages`)."""
    rewards = [load(spec, device=job.device) for spec in job.rewards]
    if job.reference is None and (needy := [reward.name for reward in rewards if reward.needs_references]):
        raise ValueError(f"{', '.join(needy)} compares with references: pass --reference FOLDER.")
    references = References(job.reference) if job.reference is not None else None
    files, problems = find_images(job.paths)
    names = [reward.name for reward in rewards]
    done = scored_paths(job.output, names) if job.output else set()
    todo = {file: relative for file, relative in files.items() if str(file) not in done}
    if done:
        messages.print(f"{len(files) - len(todo)} of {len(files)} are scored already; going on.")
    failures = len(problems)
    for path, problem in problems.items():
        say(messages, f"{path}: {problem}", label="skipped", style="yellow")
    with ExitStack() as stack:
        writer = _open_writer(job, names, stack, fresh=not done)
        stack.callback(writer.close)
        progress = stack.enter_context(progress_bar(messages))
        task = progress.add_task("scoring", total=len(todo))
        for batch in read_ahead(todo, references, device=job.device, batch_size=job.batch_size):
            readable = [loaded for loaded in batch if loaded.image is not None]
            for loaded, scores in zip(readable, score_loaded(rewards, readable), strict=True):
                writer.write(str(loaded.path), dict(zip(names, scores, strict=True)))
            for loaded in batch:
                if loaded.image is None:
                    failures += 1
                    say(messages, f"{loaded.path}: {loaded.problem}", label="skipped", style="yellow")
            progress.advance(task, len(batch))
    if failures:
        messages.print(f"{failures} of {len(todo) + len(problems)} files could not be scored.")
    return failures


def score_loaded(rewards: Sequence[Reward], batch: Sequence[Loaded]) -> list[list[float]]:
    """One row of scores per image, for files that could be read."""
    if not batch:
        return []
    images = [loaded.image for loaded in batch if loaded.image is not None]
    references = [loaded.reference for loaded in batch if loaded.reference is not None]
    columns = evaluate(rewards, images, references or None).values()
    return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _open_writer(job: Job, names: Sequence[str], stack: ExitStack, *, fresh: bool) -> Writer:
    if job.format == "table":
        if job.output is not None:
            raise ValueError("a table is for reading: use --format csv or json with --output.")
        return TableWriter(names)
    stream = sys.stdout
    if job.output is not None:
        job.output.parent.mkdir(parents=True, exist_ok=True)
        stream = stack.enter_context(job.output.open("a", newline=""))
    return CsvWriter(stream, names, header=fresh) if job.format == "csv" else JsonWriter(stream)


def progress_bar(messages: Console) -> Progress:
    """Of files, on standard error."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=messages, transient=True)
