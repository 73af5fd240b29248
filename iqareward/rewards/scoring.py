"""Helpers for scoring: torch modes, clean pixels, and the warning when a reward scores no image."""

import inspect
import math
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iqareward.functional._fused import clean
from iqareward.types import Images, Scores

# Decoders overshoot [0, 1] a little, and such images are clamped. Images that leave it by more than this were never
# in [0, 1] (a forgotten [-1, 1] or [0, 255]); they are not scored, because a clamped one would get a plausible wrong
# number.
RANGE_SLACK = 0.25

_reasons: ContextVar[list[str] | None] = ContextVar("reasons", default=None)


class UnscoredWarning(RuntimeWarning):
    """A reward scored no image of a batch, so that a trainer would learn nothing from it."""


@contextmanager
def collect_reasons() -> Generator[list[str]]:
    """Within the block, a reward that scores no image of a batch adds the reason to a list, in place of the warning.

    Every call is looked at, on any device, and each reward of a sum speaks for itself. Score an image alone to learn
    why it has no score.

    Yields:
        The reasons so far, each `"<name of the reward>: <reason>"`.

    Example:
        >>> import iqareward
        >>> with collect_reasons() as reasons:
        ...     score = iqareward.load("piqe")(torch.zeros(1, 3, 4, 4))
        >>> score, reasons
        (tensor([nan]), ['piqe: the image has a side shorter than 16 pixels'])
    """
    reasons: list[str] = []
    token = _reasons.set(reasons)
    try:
        yield reasons
    finally:
        _reasons.reset(token)


@final
class UnscoredWatch:
    """Warns once per reward that it scored no image, and why: most often a forgotten conversion of pixels.

    Looking at scores waits for their device. On a CPU that costs nothing, so every call is looked at; on other devices
    only the first one is.
    """

    def __init__(self) -> None:
        self._has_looked = self._has_warned = False

    def __reduce__(self) -> tuple[type["UnscoredWatch"], tuple[()]]:
        return UnscoredWatch, ()

    def look(
        self,
        name: str,
        scores: Scores,
        images: Images,
        references: Images | None = None,
        inputs: Images | None = None,
        *,
        min_side: int = 1,
        otherwise: str = "it has no finite value for these images",
    ) -> None:
        """Warn if all scores are NaN; `otherwise` is the reason if the pixels do not show one."""
        if scores.shape[0] == 0 or torch.compiler.is_compiling():
            return
        reasons = _reasons.get()
        if reasons is None and (self._has_warned or (self._has_looked and scores.device.type != "cpu")):
            return
        self._has_looked = True
        if bool(scores.isnan().all()):
            why = "; ".join(why_unscored(images, references=references, inputs=inputs, min_side=min_side)) or otherwise
            if reasons is not None:
                reasons.append(f"{name}: {why}")
                return
            self._has_warned = True
            warnings.warn(f"{name} scored no image of this batch: {why}.", UnscoredWarning, _first_foreign_frame())


def why_unscored(images: Images, *, min_side: int = 1, **others: Images | None) -> Iterator[str]:
    """The reasons, found in the pixels, why images cannot be scored; waits for their device."""
    num_small = sum(min(row.shape[-2:]) < min_side for row in images)
    if num_small:
        yield f"{_some(num_small, len(images), 'images', 'has', 'have')} a side shorter than {min_side} pixels"
    for argument, rows in {"images": images, **others}.items():
        if rows is None:
            continue
        pixels = [row.detach().float() for row in rows]
        spans: list[list[float]] = torch.stack([torch.stack((row.amin(), row.amax())) for row in pixels]).tolist()
        finite = [(low, high) for low, high in spans if math.isfinite(low) and math.isfinite(high)]
        if len(finite) < len(spans):
            num_broken = len(spans) - len(finite)
            yield f"{_some(num_broken, len(spans), argument, 'has', 'have')} NaN or infinite pixels"
        outside = [(low, high) for low, high in finite if low < -RANGE_SLACK or high > 1 + RANGE_SLACK]
        if outside:
            low, high = min(low for low, _ in outside), max(high for _, high in outside)
            looks, value_range = _likely_range(low, high)
            yield (
                f"{_some(len(outside), len(spans), argument, 'lies', 'lie')} outside [0, 1]: values span {low:.4g} to "
                f"{high:.4g}{looks}; convert them with iqareward.to_images({argument}, value_range={value_range})"
            )


def _some(count: int, total: int, argument: str, has: str, have: str) -> str:
    return f"the {argument.removesuffix('s')} {has}" if total == 1 else f"{count} of {total} {argument} {have}"


def _likely_range(low: float, high: float) -> tuple[str, str]:
    """What values from `low` to `high` look like, a decoder's overshoot allowed for, and the range to state."""
    if low >= -0.6 and high <= 1.6:
        return ", which looks like [-1, 1] or like a sampler that overshoots (then clamp)", "(-1, 1)"
    if low >= -1.5 and high <= 1.5:
        return ", which looks like [-1, 1]", "(-1, 1)"
    if low >= -64 and 16 < high <= 320:
        return ", which looks like [0, 255]", "(0, 255)"
    return "", "(black, white)"


def _first_foreign_frame() -> int:
    """The `stacklevel` that makes a warning point at the code that called this package."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "iqareward":
        frame, level = frame.f_back, level + 1
    return level


@contextmanager
def reward_mode(*, differentiable: bool, device_type: str = "cpu") -> Generator[None]:
    """Compute as a reward must: no autocast, no inference mode, a graph exactly when `differentiable`.

    Grad mode and autocast are thread-local, and trainers call rewards from thread pools, so a reward sets both itself.
    Autocast is off on the CPU, on CUDA, since images and weights may be on either, and on the device type named.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(differentiable))
        for kind in dict.fromkeys(("cpu", "cuda", device_type)):
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def sanitize(images: Tensor) -> tuple[Tensor, Tensor]:
    """Make a batch safe to score, and say which of its images may be scored.

    Args:
        images: `[B, 3, H, W]`, any floating dtype.

    Returns:
        Float32 images in [0, 1], mid-grey where not valid; and `[B]` bool: all pixels finite and within `RANGE_SLACK`
        of [0, 1]. Gradients reach the pixels of valid images that lie in [0, 1], bounds included.
    """
    (cleaned,), valid = clean([images], -RANGE_SLACK, 1 + RANGE_SLACK)
    return cleaned, valid[0]


def recomputed(score: Callable[..., Tensor], *inputs: Any) -> Any:
    """`score(*inputs)`, which is called again in the backward pass, so that its graph is not kept until then."""
    # autograd saves no inference tensors, not even for a graph that is never used
    saved = (each.clone() if isinstance(each, Tensor) and each.is_inference() else each for each in inputs)
    return checkpoint(score, *saved, use_reentrant=False)
