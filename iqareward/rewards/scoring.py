"""The reward contract, once: every reward of this library scores its images through `score_images`.

It turns a function on clean batches into one that keeps the contract: it checks shapes, groups mixed sizes by shape,
splits into micro-batches, computes in float32 whatever the caller's autocast, grad or inference mode is, and answers
NaN for an image that cannot be scored without touching the others. Nothing here reads a pixel value on the host.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from iqareward.functional._chunks import rows_in_cache
from iqareward.functional._gradients import clamp
from iqareward.rewards.batches import shape_buckets
from iqareward.types import Images, Scores

# Decoders overshoot [0, 1] a little, and such images are clamped. Images that leave it by more than this were never
# in [0, 1] (a forgotten [-1, 1] or [0, 255]); they are not scored, because a clamped one would get a plausible wrong
# number.
RANGE_SLACK = 0.25

# 32 images of 1024 x 1024: a few GB for the classical metrics.
DEVICE_PIXELS_PER_CALL = 32 * 1024 * 1024


@contextmanager
def reward_mode(device_type: str, *, differentiable: bool) -> Generator[None]:
    """Compute as a reward must: no autocast, no inference mode, a graph exactly when `differentiable`.

    Grad mode and autocast are thread-local, and trainers call rewards from thread pools, so a reward sets both itself.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(differentiable))
        stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def sanitize(images: Tensor) -> tuple[Tensor, Tensor]:
    """Make a batch safe to score, and say which of its images may be scored.

    Args:
        images: `[B, 3, H, W]`, any floating dtype.

    Returns:
        Float32 images in [0, 1], mid-grey where not valid; and `[B]` bool: all pixels finite and within `RANGE_SLACK`
        of [0, 1]. Gradients reach the pixels of valid images that lie in [0, 1], bounds included.
    """
    images = images.float()
    pixels = images.detach().flatten(1)
    low, high = pixels.amin(1), pixels.amax(1)  # aminmax is ten times slower on a CPU (torch 2.15)
    valid = (low >= -RANGE_SLACK) & (high <= 1 + RANGE_SLACK)  # comparisons with NaN are False
    return torch.where(valid[:, None, None, None], clamp(images, 0, 1), 0.5), valid


def score_images(
    score_batch: Callable[..., Tensor],
    images: Images,
    references: Images | None = None,
    *,
    name: str,
    needs_references: bool,
    differentiable: bool,
    min_side: int = 1,
    batch_size: int | None = None,
) -> Scores:
    """Score images of any number and sizes by a function on clean batches, under the reward contract.

    Args:
        score_batch: `score_batch(images)` or, with `needs_references`, `score_batch(images, references)`, on float32
            `[b, 3, H, W]` in [0, 1]; returns `[b]`, higher is better. An image's score must not depend on its batch.
        images: `[B, 3, H, W]` float RGB in [0, 1] on any device, or a sequence of `[3, H, W]`.
        references: of the same shapes and device as `images`.
        name: of the reward, for error messages.
        needs_references: whether to pass references on; if not, they are ignored.
        differentiable: whether to keep the graph to the pixels; otherwise none is built.
        min_side: images with a shorter side are not scored.
        batch_size: images per call of `score_batch`; None = by pixels, so that a call stays in a CPU's cache or well
            within a GPU's memory.

    Returns:
        `[B]` float32 on the device of `images`; NaN where an image (or its reference) is too small, has a non-finite
        pixel, lies outside [0, 1] by more than `RANGE_SLACK`, or where the score itself is not finite.

    Raises:
        TypeError: images are not floating-point tensors.
        ValueError: shapes are wrong, or references are missing or do not match.
    """
    if needs_references and references is None:
        raise ValueError(f"{name} expected `references` (it is a full-reference reward), got None. Pass references=...")
    with torch.inference_mode(False), torch.set_grad_enabled(differentiable):  # stacking a list is part of the graph
        buckets, order = shape_buckets(name, images, references if needs_references else None)
    if not buckets:
        device = images.device if isinstance(images, Tensor) else None
        return torch.zeros(0, dtype=torch.float32, device=device)
    with reward_mode(buckets[0][0].device.type, differentiable=differentiable):
        scores = [
            _score_clean(score_batch, name, min_side, piece)
            for bucket in buckets
            for piece in _split(bucket, batch_size)
        ]
        merged = scores[0] if len(scores) == 1 else torch.cat(scores)
        if order is None:
            return merged
        rows = merged.unbind(0)  # views, so that restoring the order copies no index to the device
        return torch.stack([rows[i] for i in order])


def _split(bucket: tuple[Tensor, ...], batch_size: int | None) -> Iterator[tuple[Tensor, ...]]:
    """Micro-batches of a bucket of one shape."""
    first = bucket[0]
    if batch_size is None:
        limit = max(1, DEVICE_PIXELS_PER_CALL // (first.shape[2] * first.shape[3]))
        batch_size = min(limit, rows_in_cache(first, first.device))
    if first.shape[0] <= batch_size:
        yield bucket
    else:
        yield from zip(*(tensor.split(batch_size) for tensor in bucket), strict=True)


def _score_clean(score_batch: Callable[..., Tensor], name: str, min_side: int, piece: tuple[Tensor, ...]) -> Tensor:
    """Sanitise one micro-batch, score it, and mask what was not valid."""
    count = piece[0].shape[0]
    if min(piece[0].shape[2:]) < min_side:
        return torch.full((count,), torch.nan, dtype=torch.float32, device=piece[0].device)
    cleaned = [sanitize(tensor) for tensor in piece]
    scores = score_batch(*(clean for clean, _ in cleaned))
    if scores.shape != (count,):
        raise ValueError(
            f"{name} expected its metric to return one score per image, shape [{count}], got {list(scores.shape)}. "
            "Reduce over channels and pixels, never over the batch."
        )
    valid = torch.stack([valid for _, valid in cleaned]).all(0) & scores.isfinite()
    return torch.where(valid, scores.float(), torch.nan)
