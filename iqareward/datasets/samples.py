"""Decode images and score them in batches; the next batch is decoded while one is scored."""

import errno
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
from iqareward.types import Reward, needs

BATCH_BYTES = 512 * 2**20  # of decoded images; the next batch takes as much again while one is scored
DECODERS = 4  # threads; decoding releases the interpreter lock
_BYTES_PER_PIXEL = 12  # float32 RGB
_OF_THE_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.EINVAL)
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
        stops_if_store_fails: whether a disk or network that fails is an error, instead of an image that is not read.
    """

    def __init__(
        self,
        rewards: Sequence[Reward],
        *,
        device: str,
        batch_size: int,
        decoders: int = DECODERS,
        stops_if_store_fails: bool = False,
    ) -> None:
        self.rewards = list(rewards)
        self._device, self._batch_size, self._decoders = device, batch_size, decoders
        self._stops_if_store_fails = stops_if_store_fails
        self._has_scored = [False] * len(self.rewards)

    def score(self, samples: Iterable[Sample]) -> Iterator[list[Scored]]:
        """Batches of results, in the order of the samples.

        Raises:
            Exception: whatever a reward raised, unless it scores other images: then the image has no score.
        """
        options: dict[str, Any] = {"device": self._device, "batch_size": self._batch_size, "decoders": self._decoders}
        for batch in read_ahead(samples, **options, stops_if_store_fails=self._stops_if_store_fails):
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
            found = _scores(reward, batch)
        except Exception as error:
            if is_of_the_device(error):
                raise
            found = (
                [_score_or_error(reward, sample) for sample in batch] if len(batch) > 1 else [_failed(reward, error)]
            )
            if all(math.isnan(value) for value, _ in found) and not self._has_scored[column]:
                raise  # nothing says that it is the images' fault
        self._has_scored[column] |= not all(math.isnan(value) for value, _ in found)
        return found


def _scores(reward: Reward, batch: Sequence[Decoded]) -> list[tuple[float, str]]:
    with collect_reasons():
        values = _call(reward, batch)
    return [
        (value, "") if math.isfinite(value) else (math.nan, _why_unscored(reward, sample, value))
        for value, sample in zip(values, batch, strict=True)
    ]


def _score_or_error(reward: Reward, sample: Decoded) -> tuple[float, str]:
    try:
        return _scores(reward, [sample])[0]
    except Exception as error:
        if is_of_the_device(error):
            raise
        return _failed(reward, error)


def _failed(reward: Reward, error: Exception) -> tuple[float, str]:
    return math.nan, f"{reward.name} raised {type(error).__name__}: {error}"


def _why_unscored(reward: Reward, sample: Decoded, value: float) -> str:
    if math.isinf(value):
        return f"{reward.name}: its score is infinite"
    with collect_reasons() as reasons:  # alone, each part of a sum says what it misses
        _call(reward, [sample])
    return "; ".join(reasons) or f"{reward.name}: it has no value for this image"


def is_of_the_device(error: Exception) -> bool:
    """Whether a device cannot be used any more by this process."""
    return isinstance(error, getattr(torch, "AcceleratorError", ())) or "CUDA error" in str(error)


def _has_needs(reward: Reward, sample: Decoded) -> bool:
    found = {"references": sample.reference, "inputs": sample.input, "prompts": sample.prompt}
    return sample.image is not None and not any(needs(reward, name) and found[name] is None for name in found)


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
    stops_if_store_fails: bool = False,
) -> Iterator[list[Decoded]]:
    """Batches of decoded samples.

    A batch takes at most `batch_bytes` as float32 RGB, references included; a larger image is a batch of its own.
    """
    batches = _batches(samples, batch_size, batch_bytes)
    with ThreadPoolExecutor(decoders) as pool:

        def start() -> list[Future[Decoded]]:
            return [pool.submit(_decode, sample, device, stops_if_store_fails) for sample in next(batches, [])]

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


def _decode(sample: Sample, device: str, stops_if_store_fails: bool) -> Decoded:
    """The pixels of a sample, or as many as can be read and the reason why others cannot."""
    image = reference = given = None
    try:
        image = _pixels(sample.image, device)
    except (ValueError, TypeError) as error:
        if stops_if_store_fails:
            _raise_if_of_the_store(error)
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
        if stops_if_store_fails:
            _raise_if_of_the_store(error)
        return Decoded(image, None, None, sample.prompt, f"not compared: {error}")
    return Decoded(image, reference, given, sample.prompt, problem)


def _raise_if_of_the_store(error: Exception) -> None:
    """Raise what the system said, unless it is about the file itself."""
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None and cause.errno not in _OF_THE_FILE:
        raise cause


def _reason(error: Exception) -> object:
    return error.reason if isinstance(error, UnreadableImageError) else error


def _pixels(source: Source | None, device: str) -> Tensor | None:
    """`[3, H, W]` in [0, 1]."""
    if source is None:
        return None
    if isinstance(source, (list, tuple)) or getattr(source, "ndim", 3) > 3:
        raise ValueError("expected one image, got several. Make a row of each")
    return to_images(read_image(source) if isinstance(source, bytes) else source, value_range=(0, 1), device=device)[0]
