"""Score image files in batches, reading the next batch while one is scored."""

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from iqareward.cli.files import find_images, find_reference
from iqareward.cli.results import CsvWriter, JsonWriter, TableWriter, Writer, scored_paths
from iqareward.images import to_images
from iqareward.rewards.catalog import load
from iqareward.rewards.compose import evaluate
from iqareward.types import Reward

READERS = 4  # threads that decode files; decoding releases the interpreter lock


class Job(NamedTuple):
    """The arguments of `iqareward score`."""

    paths: Sequence[str]
    rewards: Sequence[str]
    reference: Path | None
    format: str
    output: Path | None
    device: str
    batch_size: int


class Loaded(NamedTuple):
    """A file as read: its images, or why not."""

    path: Path
    image: Tensor | None
    reference: Tensor | None
    problem: str


def run(job: Job, messages: Console) -> int:
    """Do the job; returns how many files could not be scored (each is reported on `messages`)."""
    rewards = [load(spec, device=job.device) for spec in job.rewards]
    if job.reference is None and (needy := [reward.name for reward in rewards if reward.needs_references]):
        raise ValueError(f"{', '.join(needy)} compares with references: pass --reference FOLDER.")
    files = find_images(job.paths)
    names = [reward.name for reward in rewards]
    done = scored_paths(job.output, names) if job.output else set()
    todo = {file: relative for file, relative in files.items() if str(file) not in done}
    if done:
        messages.print(f"{len(files) - len(todo)} of {len(files)} are scored already; going on.")
    failures = 0
    with ExitStack() as stack:
        writer = _open_writer(job, names, stack, fresh=not done)
        stack.callback(writer.close)
        progress = stack.enter_context(_progress_bar(messages))
        task = progress.add_task("scoring", total=len(todo))
        for batch in _read_ahead(todo, job):
            readable = [loaded for loaded in batch if loaded.image is not None]
            for loaded, scores in zip(readable, _score(rewards, readable), strict=True):
                writer.write(str(loaded.path), dict(zip(names, scores, strict=True)))
            for loaded in batch:
                if loaded.image is None:
                    failures += 1
                    messages.print(f"[yellow]skipped[/] {loaded.path}: {loaded.problem}", soft_wrap=True)
            progress.advance(task, len(batch))
    if failures:
        messages.print(f"{failures} of {len(todo)} files could not be scored.")
    return failures


def _score(rewards: Sequence[Reward], batch: Sequence[Loaded]) -> list[list[float]]:
    """One row of scores per image."""
    if not batch:
        return []
    images = [loaded.image for loaded in batch if loaded.image is not None]
    references = [loaded.reference for loaded in batch if loaded.reference is not None]
    columns = evaluate(rewards, images, references or None).values()
    return [list(row) for row in zip(*(column.tolist() for column in columns), strict=True)]


def _read_ahead(todo: dict[Path, Path], job: Job) -> Iterator[list[Loaded]]:
    """Batches of files, the next one being decoded while the caller scores this one."""

    def read(item: tuple[Path, Path]) -> Loaded:
        return _read(*item, job)

    with ThreadPoolExecutor(READERS) as pool:
        items = iter(todo.items())
        pending = [pool.submit(read, item) for item in islice(items, job.batch_size)]
        while pending:
            upcoming = [pool.submit(read, item) for item in islice(items, job.batch_size)]
            yield [future.result() for future in pending]
            pending = upcoming


def _read(path: Path, relative: Path, job: Job) -> Loaded:
    try:
        image = _pixels(path, job.device)
        reference = None
        if job.reference is not None:
            reference_path = find_reference(job.reference, relative)
            reference = _pixels(reference_path, job.device)
            if reference.shape != image.shape:
                sizes = (f"{tensor.shape[2]}x{tensor.shape[1]}" for tensor in (image, reference))
                raise ValueError("it is {}, its reference {}".format(*sizes))
    except UnidentifiedImageError:
        return Loaded(path, None, None, "not an image that Pillow can read")
    except (OSError, ValueError, TypeError, SyntaxError, Image.DecompressionBombError) as error:
        return Loaded(path, None, None, str(error))  # SyntaxError: what Pillow raises for some broken PNGs
    return Loaded(path, image, reference, "")


def _pixels(path: Path, device: str) -> Tensor:
    return to_images(path, value_range=(0, 1), device=device)[0]


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


def _progress_bar(messages: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=messages, transient=True)
