"""Score batches of columns, for `datasets.Dataset.map`, `ray.data.Dataset.map_batches` and the like."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from PIL import Image

from iqareward.datasets.samples import Sample, SampleScorer, Source
from iqareward.rewards.catalog import load
from iqareward.types import Reward, needs

IMAGE_COLUMNS = "image;jpg;jpeg;png;webp"
PROBLEM = "problem"
_IMPORTED_IN = os.getpid()


@dataclass(frozen=True)
class Columns:
    """Which columns hold what rewards need; names with `;` between them are tried in this order for each sample.

    Args:
        images: the images to be scored.
        references: the ground truth; None = there is none.
        inputs: the degraded images that were restored; None = there are none.
        prompts: texts; None = there are none.
    """

    images: str = IMAGE_COLUMNS
    references: str | None = None
    inputs: str | None = None
    prompts: str | None = None

    def check(self, rewards: Sequence[Reward]) -> None:
        """Refuse rewards that need what no column is named for.

        Raises:
            ValueError: a reward needs references, inputs, prompts, ids or tasks that it cannot get.
        """
        for name in ("references", "inputs", "prompts"):
            needy = [reward.name for reward in rewards if needs(reward, name)]
            if needy and getattr(self, name) is None:
                raise ValueError(
                    f"{', '.join(needy)} needs {name}: name the column that has them, {name}=... (--{name} NAME)."
                )
        if grouped := [reward.name for reward in rewards if needs(reward, "ids") or needs(reward, "tasks")]:
            raise ValueError(f"{', '.join(grouped)} compares rollouts or tasks, which rows of a data set are not.")

    @property
    def names(self) -> set[str]:
        """Every column that may be read."""
        return {name for _, names in self.named() for name in names}

    def check_names(self, present: Sequence[str]) -> None:
        """Refuse columns without one of the names that are wanted.

        Raises:
            ValueError: there are no images, references, inputs or prompts by the names given.
        """
        for role, names in self.named():
            if not {*names} & {*present}:
                raise ValueError(
                    f"expected {role} in a column named {' or '.join(names)}, got the columns {', '.join(present)}. "
                    f"Name the one that has them: {role}=..."
                )

    def named(self) -> Iterator[tuple[str, list[str]]]:
        """Each of the four that is given, with its names."""
        for role in ("images", "references", "inputs", "prompts"):
            text: str | None = getattr(self, role)
            if text is not None:
                yield role, [name.strip() for name in text.split(";") if name.strip()]

    def samples(self, batch: Mapping[str, Sequence[Any]], folder: Path | None = None) -> Iterator[Sample]:
        """The samples of a batch; relative paths in it start at `folder`.

        Raises:
            ValueError: the batch has no column of a name that is wanted.
        """
        self.check_names(list(batch))
        found: dict[str, list[Any]] = {}
        for role, names in self.named():
            present = [batch[name] for name in names if name in batch]
            found[role] = [next((value for value in row if value is not None), None) for row in zip(*present)]
        for row, image in enumerate(found["images"]):
            reference, given = (found[role][row] if role in found else None for role in ("references", "inputs"))
            prompt = found["prompts"][row] if "prompts" in found else None
            problem = [f"{role}: none here" for role in found if found[role][row] is None and role != "images"]
            if prompt is not None and _text(prompt) is None:
                problem.append(f"prompts: expected one text, got {type(prompt).__name__}")
            yield Sample(
                _source(image, folder), _source(reference, folder), _source(given, folder), _text(prompt),
                "; ".join(problem),
            )  # fmt: skip


def _source(value: Any, folder: Path | None) -> Source | None:
    """What a column holds, as an image that can be decoded: Hugging Face keeps `{"bytes", "path"}`."""
    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytearray, memoryview)):
        return bytes(value)
    if isinstance(value, str):
        return Path(value) if folder is None else folder / value
    return value


def _text(value: Any) -> str | None:
    """A prompt; None if it is missing, as pandas writes it too."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else None


def load_rewards(rewards: str | Reward | Sequence[str | Reward], device: str) -> dict[str, Reward]:
    """Rewards by the names of their columns.

    Raises:
        ValueError: there is none, or one is unknown or given twice.
    """
    given: Sequence[str | Reward] = rewards if isinstance(rewards, (list, tuple)) else [rewards]  # pyright: ignore
    found: dict[str, Reward] = {}
    for each in given:
        name = each.strip() if isinstance(each, str) else each.name
        if name in found or name == PROBLEM:
            raise ValueError(f"expected rewards with different names, got {name!r} twice or as a name of our own.")
        found[name] = load(name, device=device) if isinstance(each, str) else each
    if not found:
        raise ValueError("expected at least one reward, got none. `iqareward list` shows their names.")
    return found


@final
class ScoreColumns:
    """Score the images of a batch of columns, for the batched `map` of Hugging Face data sets and of Ray Data.

    Args:
        rewards: names or sums of the catalogue, or rewards; one or several, which share the decoding of the images.
        images: column of images: encoded files, Hugging Face's `{"bytes", "path"}`, paths, PIL images, or arrays
            `[H, W, C]` (floats in [0, 1]). Names with `;` between them are tried in this order.
        references: column of references; None = there is none.
        inputs: column of the degraded images; None = there is none.
        prompts: column of texts; None = there is none.
        keep: columns of the batch to be returned as well. Hugging Face's `map` keeps all by itself, Ray Data none.
        device: where rewards with weights are loaded, and images scored.
        batch_size: maximum number of images in a batch; fewer if they exceed 512 MiB.

    Raises:
        ValueError: a reward is unknown, or needs a column that is not named.

    Example:
        >>> images = [np.full((32, 32, 3), value, dtype=np.uint8) for value in (0, 64)] + [b"damaged"]
        >>> scored = ScoreColumns("psnr", references="clean")({"image": images, "clean": [images[0]] * 3})
        >>> scored["psnr"].round(1).tolist(), scored["problem"][2]
        ([100.0, 12.0, nan], 'not read: it is empty, damaged, or of a kind that is not read')
    """

    def __init__(
        self,
        rewards: str | Reward | Sequence[str | Reward],
        *,
        images: str = IMAGE_COLUMNS,
        references: str | None = None,
        inputs: str | None = None,
        prompts: str | None = None,
        keep: Sequence[str] = (),
        device: str = "cpu",
        batch_size: int = 32,
    ) -> None:
        self.columns = Columns(images, references, inputs, prompts)
        self._made_from = rewards
        self.rewards = load_rewards(rewards, device)
        self.columns.check(list(self.rewards.values()))
        self.keep = tuple(keep)
        if both := {*self.keep} & {*self.rewards, PROBLEM}:
            raise ValueError(f"keep={sorted(both)} are columns of results. Rename them in the data set first.")
        self.device, self.batch_size = device, batch_size

    def __reduce__(self) -> tuple[Any, ...]:
        # names stay names, so that Hugging Face's cache knows the function again after rewards have loaded weights
        columns = {role: getattr(self.columns, role) for role in ("images", "references", "inputs", "prompts")}
        options = {"keep": self.keep, "device": self.device, "batch_size": self.batch_size}
        return partial(ScoreColumns, self._made_from, **columns, **options), ()

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Score a batch.

        Args:
            batch: columns of equal length.

        Returns:
            A column of float32 scores for each reward, higher is better, NaN = not scored; `problem`, the reasons for
            missing scores; and the columns to keep.

        Raises:
            ValueError: the batch lacks a column.
        """
        if any(isinstance(batch.get(name), (bytes, str, Mapping, Image.Image)) for name in self.columns.names):
            raise TypeError("ScoreColumns expected batches of rows, got one row. Pass batched=True to `map`.")
        if os.getpid() != _IMPORTED_IN:
            # `map(num_proc=...)` forks: the threads of torch's pool are missing there, and a call would wait for them
            torch.set_num_threads(1)
        scorer = SampleScorer(list(self.rewards.values()), device=self.device, batch_size=self.batch_size)
        results = [each for part in scorer.score(self.columns.samples(batch)) for each in part]
        table = np.array([scores for scores, _ in results], dtype=np.float32).reshape(len(results), len(self.rewards))
        scored = {name: table[:, place] for place, name in enumerate(self.rewards)}
        problems = np.array([problem for _, problem in results], dtype=object)
        return {name: batch[name] for name in self.keep} | scored | {PROBLEM: problems}
