"""Score image files with rewards, and show how far a command is."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from iqareward.cli.text import printable
from iqareward.datasets.samples import Sample, SampleScorer
from iqareward.image_files import References
from iqareward.rewards.catalog import load
from iqareward.types import Reward


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
        self._scorer = SampleScorer(self.rewards, device=device, batch_size=batch_size)

    def reference_to_show(self, relative: Path) -> Path | None:
        """The reference of an image, also if no reward needs one; None if there is none."""
        try:
            return None if self._shown is None else self._shown.find(relative)
        except (OSError, ValueError):
            return None

    def score(self, files: Mapping[Path, Path]) -> Iterator[list[Scored]]:
        """Batches of scored files, which are given with their paths relative to the folder that was searched."""
        paths = iter(files)
        for batch in self._scorer.score(samples_of(files, self.references)):
            yield [
                Scored(path, scores, printable(problem))
                for path, (scores, problem) in zip(islice(paths, len(batch)), batch, strict=True)
            ]


def samples_of(files: Mapping[Path, Path], references: ReferenceFinder | None) -> Iterator[Sample]:
    """Files with their references, or with the reason why one has none."""
    for path, relative in files.items():
        reference, problem = None, ""
        try:
            reference = None if references is None else references.find(relative)
        except (OSError, ValueError) as error:
            problem = f"not compared: {error}"
        yield Sample(path, reference, problem=problem)


def progress_bar(messages: Console, *, shown: bool = True) -> Progress:
    """A bar that counts files, on standard error if that is a terminal."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    return Progress(*columns, console=messages, transient=True, disable=not (shown and messages.is_terminal))
