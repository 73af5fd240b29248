"""Decode images and score them in batches; the next batch is decoded while one is scored."""

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, final

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from iqareward.image_files import UnreadableImageError, open_image, read_image
from iqareward.images import to_images
from iqareward.rewards.core import collect_reasons
from iqareward.types import Reward

BATCH_BYTES = 512 * 2**20  # of decoded images; the next batch takes as much again while one is scored
DECODERS = 4  # threads; decoding releases the interpreter lock
_BYTES_PER_PIXEL = 12  # float32 RGB
_IMAGES = ("image", "reference", "input")

Source: TypeAlias = Any
"""An image that is not decoded yet: the content of a file, its path, a PIL image, an ndarray or a tensor."""


class Sample(NamedTuple):
    """What a reward may need to score one image; `problem` says what is missing and why."""

    image: Source | None
    reference: Source | None = None
    input: Source | None = None
    prompt: str | None = None
    problem: str = ""


class Decoded(NamedTuple):
    """A sample with pixels `[3, H, W]` in [0, 1], or with the reason why it has none."""

    image: Tensor | None
    reference: Tensor | None
    input: Tensor | None
    prompt: str | None
    problem: str


class Scored(NamedTuple):
    """One score per reward, NaN where there is none; `problem` says why, and is empty if there are all."""

    scores: list[float]
    problem: str


@final
class SampleScorer:
    """Score any number of samples with several rewards, decoding each image once.

    Args:
        rewards: rewards or functions with their contract.
        device: where images are scored.
        batch_size: maximum number of images in a batch; a batch also holds at most 512 MiB of pixels as float32.
        decoders: number of threads that decode.
    """

    def __init__(self, rewards: Sequence[Reward], *, device: str, batch_size: int, decoders: int = DECODERS) -> None:
        self.rewards = list(rewards)
        self._device, self._batch_size, self._decoders = device, batch_size, decoders
        self._has_scored = [False] * len(self.rewards)

    def score(self, samples: Iterable[Sample]) -> Iterator[list[Scored]]:
        """Batches of results, in the order of the samples.

        Raises:
            Exception: whatever a reward raised, unless it scores other images: then the image has no score.
        """
        for batch in read_ahead(samples, device=self._device, batch_size=self._batch_size, decoders=self._decoders):
            yield self._score(batch)

    def _score(self, batch: Sequence[Decoded]) -> list[Scored]:
        scores = [[math.nan] * len(self.rewards) for _ in batch]
        problems: list[list[str]] = [[sample.problem] if sample.problem else [] for sample in batch]
        for column, reward in enumerate(self.rewards):
            chosen = {row: sample for row, sample in enumerate(batch) if _has_needs(reward, sample)}
            if not chosen:
                continue
            for row, (value, problem) in zip(chosen, self._column(column, list(chosen.values())), strict=True):
                scores[row][column] = value
                if problem:
                    problems[row].append(problem)
        return [Scored(values, "; ".join(reasons)) for values, reasons in zip(scores, problems, strict=True)]

    def _column(self, column: int, batch: Sequence[Decoded]) -> list[tuple[float, str]]:
        """The score of each sample, or the reason why it has none."""
        reward = self.rewards[column]
        try:
            with collect_reasons():
                values = _call(reward, batch)
        except Exception as error:
            if is_of_the_device(error) or (len(batch) == 1 and not self._has_scored[column]):
                raise
            return self._one_by_one(column, batch, error)
        self._has_scored[column] |= not all(map(math.isnan, values))
        return [
            (value, _why_unscored(reward, sample) if math.isnan(value) else "")
            for value, sample in zip(values, batch, strict=True)
        ]

    def _one_by_one(self, column: int, batch: Sequence[Decoded], error: Exception) -> list[tuple[float, str]]:
        """Find the images on which a reward raises; if that is each of several, the fault is not theirs."""
        name = self.rewards[column].name
        if len(batch) == 1:
            return [(math.nan, f"{name} raised {type(error).__name__}: {error}")]
        found: list[tuple[float, str]] = []
        for sample in batch:
            try:
                with collect_reasons() as reasons:
                    (value,) = _call(self.rewards[column], [sample])
                found.append((value, "; ".join(reasons)))
            except Exception as own:
                if is_of_the_device(own):
                    raise
                found.append((math.nan, f"{name} raised {type(own).__name__}: {own}"))
        if all(" raised " in problem for _, problem in found):
            raise error
        self._has_scored[column] = True
        return found


def is_of_the_device(error: Exception) -> bool:
    """Whether a device cannot be used any more by this process."""
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)


def _has_needs(reward: Reward, sample: Decoded) -> bool:
    found = {"references": sample.reference, "inputs": sample.input, "prompts": sample.prompt}
    return sample.image is not None and not any(needs(reward, name) and found[name] is None for name in found)


def needs(reward: Reward, column: str) -> bool:
    """Whether a reward needs `references`, `inputs`, `prompts`, `ids` or `tasks`; it may lack the later ones."""
    return bool(getattr(reward, f"needs_{column}", False))


def _why_unscored(reward: Reward, sample: Decoded) -> str:
    with collect_reasons() as reasons:  # alone, each part of a sum says what it misses
        _call(reward, [sample])
    return "; ".join(reasons) or f"{reward.name}: it has no value for this image"


def _call(reward: Reward, batch: Sequence[Decoded]) -> list[float]:
    def column(name: str, wanted: bool) -> Any:
        return [getattr(sample, name) for sample in batch] if wanted else None

    return reward(
        column("image", True),
        references=column("reference", needs(reward, "references")),
        inputs=column("input", needs(reward, "inputs")),
        prompts=column("prompt", needs(reward, "prompts")),
    ).tolist()


def read_ahead(
    samples: Iterable[Sample],
    *,
    device: str,
    batch_size: int,
    batch_bytes: int = BATCH_BYTES,
    decoders: int = DECODERS,
) -> Iterator[list[Decoded]]:
    """Batches of decoded samples.

    A batch takes at most `batch_bytes` as float32 RGB, references included; a larger image is a batch of its own.
    """
    batches = _batches(samples, batch_size, batch_bytes)
    with ThreadPoolExecutor(decoders) as pool:

        def start() -> list[Future[Decoded]]:
            return [pool.submit(_decode, sample, device) for sample in next(batches, [])]

        pending = start()
        while pending:
            batch = [future.result() for future in pending]
            pending = start()  # only now, so that no more than two batches are in memory
            yield batch


def _batches(samples: Iterable[Sample], batch_size: int, batch_bytes: int) -> Iterator[list[Sample]]:
    """Cut by the sizes in the headers of the images."""
    batch: list[Sample] = []
    room = batch_bytes
    for sample in samples:
        needed = sum(_decoded_bytes(getattr(sample, name)) for name in _IMAGES)
        if batch and (len(batch) == batch_size or needed > room):
            yield batch
            batch, room = [], batch_bytes
        batch.append(sample)
        room -= needed
    if batch:
        yield batch


def _decoded_bytes(source: Source | None) -> int:
    if isinstance(source, (str, Path, bytes)):
        try:
            with open_image(source) as image:
                return _BYTES_PER_PIXEL * image.width * image.height
        except UnreadableImageError:  # it takes no room, and reading it says why
            return 0
    if isinstance(source, Image.Image):
        return _BYTES_PER_PIXEL * source.width * source.height
    return 4 * int(np.prod(source.shape)) if isinstance(source, (np.ndarray, Tensor)) else 0


def _decode(sample: Sample, device: str) -> Decoded:
    """The pixels of a sample, or as many as can be read and the reason why others cannot."""
    image = reference = given = None
    try:
        image = _pixels(sample.image, device)
    except (ValueError, TypeError) as error:
        return Decoded(None, None, None, sample.prompt, f"not read: {_reason(error)}")
    problem = sample.problem
    if image is None:
        return Decoded(None, None, None, sample.prompt, problem or "not read: there is no image")
    try:
        reference = _pixels(sample.reference, device)
        if reference is not None and image.shape != reference.shape:
            sizes = (f"{tensor.shape[2]}x{tensor.shape[1]}" for tensor in (image, reference))
            raise ValueError("it is {}, its reference {}".format(*sizes))
        given = _pixels(sample.input, device)
    except (ValueError, TypeError) as error:
        return Decoded(image, None, None, sample.prompt, f"not compared: {error}")
    return Decoded(image, reference, given, sample.prompt, problem)


def _reason(error: Exception) -> object:
    return error.reason if isinstance(error, UnreadableImageError) else error


def _pixels(source: Source | None, device: str) -> Tensor | None:
    """`[3, H, W]` in [0, 1]."""
    if source is None:
        return None
    return to_images(read_image(source) if isinstance(source, bytes) else source, value_range=(0, 1), device=device)[0]
