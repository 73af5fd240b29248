"""Score image files with rewards; the next batch is decoded while one is scored."""

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from iqareward.cli.text import printable
from iqareward.image_files import References, UnreadableImageError, open_image
from iqareward.images import to_images
from iqareward.rewards.catalog import load
from iqareward.rewards.core import collect_reasons
from iqareward.types import Reward

_READERS = 4  # threads that decode files; decoding releases the interpreter lock
_BATCH_BYTES = 512 * 2**20  # of decoded images and references; the next batch takes as much again while one is scored
_BYTES_PER_PIXEL = 12  # float32 RGB


class _Loaded(NamedTuple):
    """The pixels of a file and of its reference, or the reason why one is missing or their sizes differ."""

    path: Path
    image: Tensor | None
    reference: Tensor | None
    problem: str


class ReferenceFinder(Protocol):
    """What knows the reference of an image, such as `References`."""

    def find(self, relative: Path) -> Path:
        """The reference of an image, by its path relative to the folder that was searched."""
        ...


class Scored(NamedTuple):
    """One score per reward, NaN where there is none; `problem` says why, and is empty if there are all."""

    path: Path
    scores: list[float]
    problem: str


class Scorer:
    """Rewards by name, with the references that they need.

    Args:
        rewards: names or sums of the catalogue.
        reference: folder of references, one file for all images, or what finds them.
        device: where the rewards run.
        batch_size: maximum number of images in a batch; a batch also holds at most 512 MiB of pixels as float32.
        more: further rewards by name, whose scores follow.

    Raises:
        ValueError: a reward is unknown or given twice, references are missing, a reward needs
            prompts, or the device cannot be used.
    """

    def __init__(
        self,
        rewards: Sequence[str],
        reference: Path | ReferenceFinder | None,
        device: str,
        batch_size: int,
        *,
        more: Mapping[str, Reward] | None = None,
    ) -> None:
        self.names = [spec.strip() for spec in rewards]
        for place, name in enumerate(self.names):
            if name in self.names[:place]:
                raise ValueError(f"--reward {name} is given twice.")
        try:
            torch.zeros(1, device=device).tolist()
        except Exception as error:  # of many types: no such device, no driver, a build without it
            reason = str(error).strip().split("\n")[0].rstrip(".")
            raise ValueError(
                f"--device {device} cannot be used: {reason}. `iqareward doctor` lists the devices."
            ) from error
        self.rewards = [*(load(name, device=device) for name in self.names), *(more or {}).values()]
        self.names += more or {}
        if prompted := [reward.name for reward in self.rewards if reward.needs_prompts]:
            raise ValueError(
                f"{', '.join(prompted)} needs a prompt for each image, which commands do not take: call it in Python, "
                "load(name)(images, prompts=[...])."
            )
        needy = [reward.name for reward in self.rewards if reward.needs_references]
        if needy and reference is None:
            raise ValueError(f"{', '.join(needy)} compares with references: pass --reference FOLDER (or FILE).")
        self._shown: ReferenceFinder | None = References(reference) if isinstance(reference, Path) else reference
        self.references = self._shown if needy else None
        self._device, self._batch_size = device, batch_size

    def reference_to_show(self, relative: Path) -> Path | None:
        """The reference of an image, also if no reward needs one; None if there is none."""
        try:
            return None if self._shown is None else self._shown.find(relative)
        except (OSError, ValueError):
            return None

    def score(self, files: Mapping[Path, Path]) -> Iterator[list[Scored]]:
        """Batches of scored files, which are given with their paths relative to the folder that was searched."""
        for batch in read_ahead(files, self.references, device=self._device, batch_size=self._batch_size):
            yield self._score(batch)

    def _score(self, batch: Sequence[_Loaded]) -> list[Scored]:
        scores = [[math.nan] * len(self.rewards) for _ in batch]
        problems: list[list[str]] = [[loaded.problem] if loaded.problem else [] for loaded in batch]
        for column, reward in enumerate(self.rewards):
            chosen = {
                row: loaded
                for row, loaded in enumerate(batch)
                if loaded.image is not None and (loaded.reference is not None or not reward.needs_references)
            }
            with collect_reasons():
                values = _call(reward, list(chosen.values())) if chosen else []
            for (row, loaded), value in zip(chosen.items(), values, strict=True):
                scores[row][column] = value
                if math.isnan(value):
                    with collect_reasons() as reasons:  # alone, each part of a sum says what it misses
                        _call(reward, [loaded])
                    problems[row] += reasons or [f"{reward.name}: it has no value for this image"]
        return [
            Scored(loaded.path, values, printable("; ".join(reasons)))
            for loaded, values, reasons in zip(batch, scores, problems, strict=True)
        ]


def _call(reward: Reward, batch: Sequence[_Loaded]) -> list[float]:
    images = [loaded.image for loaded in batch if loaded.image is not None]
    references = [loaded.reference for loaded in batch if loaded.reference is not None]
    return reward(images, references=references if reward.needs_references else None).tolist()


def progress_bar(messages: Console, *, shown: bool = True) -> Progress:
    """A bar that counts files, on standard error if that is a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    return Progress(*columns, console=messages, transient=True, disable=not (shown and messages.is_terminal))


def read_ahead(
    files: Mapping[Path, Path],
    references: ReferenceFinder | None,
    *,
    device: str,
    batch_size: int,
    batch_bytes: int = _BATCH_BYTES,
) -> Iterator[list[_Loaded]]:
    """Batches of decoded files, each with its path relative to the folder that was searched.

    A batch takes at most `batch_bytes` as float32 RGB, references included; a larger image is a batch of its own.
    """
    batches = _batches(files, references, batch_size, batch_bytes)
    with ThreadPoolExecutor(_READERS) as pool:

        def start() -> list[Future[_Loaded]]:
            return [pool.submit(_read, *paths, device) for paths in next(batches, [])]

        pending = start()
        while pending:
            batch = [future.result() for future in pending]
            pending = start()  # only now, so that no more than two batches are in memory
            yield batch


def _batches(
    files: Mapping[Path, Path], references: ReferenceFinder | None, batch_size: int, batch_bytes: int
) -> Iterator[list[tuple[Path, Path | None, str]]]:
    """A file, its reference and the reason why it has none; cut by the sizes in the files' headers."""
    batch: list[tuple[Path, Path | None, str]] = []
    room = batch_bytes
    for path, relative in files.items():
        reference, problem = None, ""
        try:
            reference = None if references is None else references.find(relative)
        except (OSError, ValueError) as error:
            problem = f"not compared: {error}"
        needed = sum(_decoded_bytes(file) for file in (path, reference) if file is not None)
        if batch and (len(batch) == batch_size or needed > room):
            yield batch
            batch, room = [], batch_bytes
        batch.append((path, reference, problem))
        room -= needed
    if batch:
        yield batch


def _decoded_bytes(path: Path) -> int:
    try:
        with open_image(path) as image:
            return _BYTES_PER_PIXEL * image.width * image.height
    except UnreadableImageError:  # it takes no room, and reading it says why
        return 0


def _read(path: Path, reference_path: Path | None, problem: str, device: str) -> _Loaded:
    try:
        image = _pixels(path, device)
    except ValueError as error:
        reason = error.reason if isinstance(error, UnreadableImageError) else error
        return _Loaded(path, None, None, f"not read: {reason}")
    if reference_path is None:
        return _Loaded(path, image, None, problem)
    try:
        reference = _pixels(reference_path, device)
        if image.shape != reference.shape:
            sizes = (f"{tensor.shape[2]}x{tensor.shape[1]}" for tensor in (image, reference))
            raise ValueError("it is {}, its reference {}".format(*sizes))
    except ValueError as error:
        return _Loaded(path, image, None, f"not compared: {error}")
    return _Loaded(path, image, reference, "")


def _pixels(path: Path, device: str) -> Tensor:
    """`[3, H, W]` in [0, 1]."""
    return to_images(path, value_range=(0, 1), device=device)[0]
