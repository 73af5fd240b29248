"""Make a reward from a metric: a function from image batches to `[B]` numbers."""

from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any, final

from torch import Tensor

from iqareward.rewards.core import ImageReward
from iqareward.types import Bounds


@dataclass(frozen=True)
class _MetricReward(ImageReward):
    """A reward that calls a metric function, with or without references."""

    metric: Callable[..., Tensor]
    _: KW_ONLY
    higher_is_better: bool
    name: str = ""
    bounds: Bounds = (None, None)
    min_side: int = 1
    differentiable: bool = False
    batch_size: int | None = None
    bytes_per_pixel: float = 1024

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or _metric_name(self.metric))

    def score_batch(self, images: Tensor, *others: Any, **columns: Any) -> Tensor:
        """The metric, turned so that higher is better."""
        values = self.metric(images, *columns.values())
        return values if self.higher_is_better else -values


@final
class FullReference(_MetricReward):
    """Make a reward from any full-reference metric, which says how close each image is to its reference.

    Args:
        metric: `metric(images, references) -> [B]` on float32 `[B, 3, H, W]` in [0, 1], each image on its own. A
            module-level function or a picklable callable, so that the reward can be sent to workers.
        higher_is_better: direction of the metric; if False the reward is its negative.
        name: Name of the reward; by default the metric's `__name__`.
        bounds: The lowest and highest score of the reward, that is after the sign.
        min_side: images with a shorter side give NaN.
        differentiable: keep the graph from scores to pixels.
        batch_size: images per call of the metric; None = chosen by `bytes_per_pixel`.
        bytes_per_pixel: working memory on a device for each pixel of an image, beside the images given: the peak of one
            call divided by its pixels. With `differentiable=True` what is kept for the gradient counts as well.

    Example:
        >>> import torch
        >>> from iqareward.functional import ssim
        >>> reward = FullReference(ssim, higher_is_better=True, min_side=11)
        >>> images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> reward(images, references=images)
        tensor([1., 1.])
    """

    needs_references = True


@final
class NoReference(_MetricReward):
    """Make a reward from any no-reference metric, which scores each image on its own.

    Args:
        metric: `metric(images) -> [B]`; otherwise as in `FullReference`.
        higher_is_better: direction of the metric; if False the reward is its negative.
        name: Name of the reward; by default the metric's `__name__`.
        bounds: The lowest and highest score of the reward, that is after the sign.
        min_side: images with a shorter side give NaN.
        differentiable: keep the graph from scores to pixels.
        batch_size: images per call of the metric; None = chosen by `bytes_per_pixel`.
        bytes_per_pixel: working memory on a device for each pixel of an image, beside the images given: the peak of one
            call divided by its pixels. With `differentiable=True` what is kept for the gradient counts as well.

    Example:
        >>> import torch
        >>> def brightness(images):
        ...     return images.mean(dim=(1, 2, 3))
        >>> reward = NoReference(brightness, higher_is_better=True, bounds=(0.0, 1.0))
        >>> reward(torch.full((2, 3, 8, 8), 0.25))
        tensor([0.2500, 0.2500])
    """


def _metric_name(metric: Callable[..., Tensor]) -> str:
    name = getattr(metric, "__name__", None)  # functools.partial and callable objects have none
    if name is None:
        raise ValueError(f"the metric {metric!r} has no __name__; pass name=... so that its scores can be told apart.")
    return name
