"""Rewards as metrics of torchmetrics, for validation loops that use it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iqareward.adapters._core import UNIT, Scorer, ValueRange
from iqareward.images import ImageLike
from iqareward.optional import require
from iqareward.rewards.calls import COLUMNS
from iqareward.rewards.specs import Spec
from iqareward.types import Bounds, Reward

__all__ = ["RewardMetric"]

_torchmetrics: Any = require("torchmetrics", extra="metrics", purpose="RewardMetric")


class RewardMetric(_torchmetrics.Metric):
    """The mean score of a reward over all images since the last reset, on all processes.

    An image without a score is counted, and is no part of the mean: see `count_unscored`. Sums are kept in float64,
    whatever precision the model around the metric is set to. The reward is no part of `state_dict`, and `.to(device)`
    moves the sums only: the reward computes where its weights are, or where the images are.

    In a `MetricCollection` each reward is computed on its own. Give the columns by name, `metrics(images,
    references=...)`: every metric takes those that it needs.

    Args:
        reward: A name or sum of the catalogue, or any reward that scores each image on its own.
        value_range: (black, white) of floating-point pixels.
        device: Where a reward of the catalogue loads its weights; None = where the first images are.
        **settings: Those of every `torchmetrics.Metric`, such as `dist_sync_on_step` and `process_group`.

    Attributes:
        higher_is_better: True, of every reward.
        is_differentiable: Whether the value that `forward` returns has a graph to the pixels.
        plot_lower_bound, plot_upper_bound: The reward's bounds.

    Raises:
        ValueError: The reward compares the rollouts of an input, or torchmetrics does not know a setting.

    Example:
        >>> metric = RewardMetric("ssim")
        >>> for seed in range(3):  # the batches of a validation set
        ...     clean = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        ...     metric.update(0.9 * clean, clean)
        >>> metric.compute() > 0.9, metric.count_unscored()
        (tensor(True), 0)
    """

    higher_is_better = True
    full_state_update = False  # the sums of a batch are added to those so far

    total: Tensor
    counts: Tensor

    def __init__(
        self,
        reward: Spec | Reward,
        *,
        value_range: ValueRange = UNIT,
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(**settings)
        sources = dict.fromkeys((name for name in COLUMNS if name != "ids"), True)
        self._scorer = Scorer(
            reward, who="RewardMetric", sources=sources, value_range=value_range, on_nan="nan", policies=("nan",),
            device=device,
        )  # fmt: skip
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")  # scored, not scored
        # A collection lets metrics of equal states share one, and two rewards that scored nothing yet would be equal;
        # NaN never is.
        self.add_state("unequal", torch.tensor(torch.nan), dist_reduce_fx="sum")

    @property
    def reward(self) -> Reward:
        """The reward whose scores are averaged."""
        return self._scorer.reward

    @property
    def is_differentiable(self) -> bool:
        return self.reward.differentiable

    @property
    def plot_lower_bound(self) -> float | None:
        return self._bounds[0]

    @property
    def plot_upper_bound(self) -> float | None:
        return self._bounds[1]

    @property
    def _bounds(self) -> Bounds:
        return getattr(self.reward, "bounds", (None, None))

    def update(
        self,
        images: ImageLike,
        references: ImageLike | None = None,
        inputs: ImageLike | None = None,
        prompts: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
    ) -> None:
        """Score a batch; what the reward does not need is not looked at.

        Args:
            images: `[B, 3, H, W]` in `value_range`, or anything else that `iqareward.to_images` reads.
            references: The ground truth, one for each image.
            inputs: The degraded images that were restored, one for each image.
            prompts: One text for each image.
            tasks: What is to be restored in each image, such as "deblur".

        Raises:
            ValueError: A column that the reward needs is missing or does not match the images.
        """
        scores = self._scorer(images, references=references, inputs=inputs, prompts=prompts, tasks=tasks)
        scored = scores.isfinite()
        self.total = self.total + torch.where(scored, scores, 0.0).double().sum().to(self.total.device)
        self.counts = self.counts + torch.stack([scored.sum(), (~scored).sum()]).to(self.counts.device)

    def compute(self) -> Tensor:
        """The mean over the images that have a score, a float32 scalar; NaN if none has."""
        return (self.total / self.counts[0]).float()

    def count_unscored(self) -> int:
        """How many images since the last reset have no score, on all processes; all of them must call it."""
        with self.sync_context(dist_sync_fn=self.dist_sync_fn, should_sync=self.sync_on_compute):
            return int(self.counts[1])

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """A figure of the mean, or of several values; needs matplotlib."""
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Any = "") -> Any:
        # `model.to(torch.bfloat16)` would take the sums along
        return super()._apply(lambda state: state.to(fn(state).device), exclude_state)
