"""Rewards made of rewards: evaluate many, sum them, take the worst, limit the batch."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from iqareward.rewards._names import exact
from iqareward.rewards.calls import Call
from iqareward.rewards.core import Combined, Wrapper, check_names
from iqareward.rewards.scoring import recomputed
from iqareward.types import Bounds, Images, Reward, Scores


def evaluate(
    rewards: Sequence[Reward],
    images: Images,
    references: Images | None = None,
    *,
    inputs: Images | None = None,
    prompts: Sequence[str] | None = None,
) -> dict[str, Scores]:
    """Each reward's own score of each image, by name: what to log, and what to combine.

    Args:
        rewards: with unique names.
        images: `[B, 3, H, W]` float RGB in [0, 1], or a sequence of `[3, H, W]`.
        references: of the same shapes, for rewards that need them.
        inputs: the degraded pictures, for rewards that need them.
        prompts: one per image, for rewards that need them.

    Returns:
        name -> unweighted `[B]` float32, higher is better, NaN = not scored.

    Raises:
        ValueError: two rewards have the same name.

    Example:
        >>> import torch, iqareward
        >>> images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> scores = iqareward.evaluate([iqareward.load("psnr"), iqareward.load("ssim")], images, references=images)
        >>> {name: score.tolist() for name, score in scores.items()}
        {'psnr': [100.0, 100.0], 'ssim': [1.0, 1.0]}
    """
    check_names("evaluate", rewards)
    call = Call(images, references, inputs, prompts)
    return {reward.name: call.score(reward) for reward in rewards}


@final
class WeightedSum(Combined):
    """The weighted sum of several rewards, `sum_k weight_k * score_k`; NaN where any of them is NaN.

    Scores are added as they are. Different rewards have different scales (PSNR spans tens, SSIM one): bring them to one
    scale with `Calibrated`, or the widest decides alone. `load` refuses a sum whose parts do not share a scale. This
    class checks nothing, because rewards of your own need not declare bounds.

    Args:
        terms: (weight, reward) pairs; the names of the rewards must be unique.
        name: default: the formula, e.g. `"0.7*qalign + 0.3*ssim"`.

    Raises:
        ValueError: no terms, two rewards of the same name, or a weight that is not finite in float32.

    Example:
        >>> import torch, iqareward
        >>> psnr = iqareward.Calibrated(iqareward.load("psnr"), iqareward.AffineMap(10.0, 50.0))
        >>> reward = iqareward.WeightedSum([(0.5, psnr), (0.5, iqareward.load("ssim"))])
        >>> images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reward(images, references=images)
        tensor([1.])
    """

    def __init__(self, terms: Sequence[tuple[float, Reward]], *, name: str | None = None) -> None:
        pairs = list(terms)
        self.weights = tuple(float(weight) for weight, _ in pairs)
        parts = [reward for _, reward in pairs]
        check_names("WeightedSum", parts)
        if not all(abs(weight) <= torch.finfo(torch.float32).max for weight in self.weights):
            raise ValueError(f"WeightedSum expected weights that are finite in float32, got {list(self.weights)}.")
        formula = " + ".join(f"{exact(weight)}*{reward.name}" for weight, reward in zip(self.weights, parts))
        lows, highs = zip(*(_scaled(weight, reward.bounds) for weight, reward in zip(self.weights, parts)))
        super().__init__(parts, name=name or formula, bounds=(_total(lows), _total(highs)))

    def combine_rows(self, rows: Tensor) -> Scores:
        """The weighted sum of each image."""
        return torch.stack([weight * row for weight, row in zip(self.weights, rows.unbind(), strict=True)]).sum(0)


@final
class SoftMin(Combined):
    """The worst of several rewards, smoothly, so that no judge can be traded against another; NaN where any is NaN.

    `-T log(mean_k exp(-score_k / T))`: it lies between the smallest and the mean of the scores. The scores must share a
    scale; use `Calibrated`.

    Args:
        rewards: with unique names.
        temperature: T > 0 in units of the scores; towards 0 it becomes the plain minimum.
        name: default: from the parts.

    Raises:
        ValueError: no rewards, two of the same name, or a temperature that is not positive.

    Example:
        >>> import torch, iqareward
        >>> judges = [iqareward.load("ssim"), iqareward.load("haarpsi")]
        >>> images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> iqareward.SoftMin(judges, temperature=0.1)(images, references=images)
        tensor([1.])

    References:
        Boyd and Vandenberghe, "Convex Optimization", 2004, section 3.1.5 (log-sum-exp),
        https://web.stanford.edu/~boyd/cvxbook/
    """

    def __init__(self, rewards: Sequence[Reward], *, temperature: float, name: str | None = None) -> None:
        check_names("SoftMin", rewards)
        if not temperature > 0:
            raise ValueError(f"SoftMin expected `temperature` > 0 in units of the scores, got {temperature}.")
        self.temperature = temperature
        lows, highs = zip(*(reward.bounds for reward in rewards), strict=True)
        low, total = None if None in lows else min(lows), _total(highs)
        high = None if total is None else total / len(highs)  # never above the mean
        formula = f"softmin({', '.join(reward.name for reward in rewards)})"
        super().__init__(rewards, name=name or formula, bounds=(low, high))

    def combine_rows(self, rows: Tensor) -> Scores:
        """The soft minimum of each image."""
        return -self.temperature * (torch.logsumexp(rows / -self.temperature, dim=0) - math.log(len(rows)))


@final
class Chunked(Wrapper):
    """The same reward, called with at most `batch_size` images at a time: a bound on its memory.

    Our own rewards limit their batches themselves; this is for others. With `differentiable=True` and more images than
    that, each part is scored again in the backward pass, so that the graph of one part is kept at a time.

    Args:
        reward: any reward.
        batch_size: images per call, >= 1.

    Raises:
        ValueError: `batch_size` is below 1.

    Example:
        >>> import torch, iqareward
        >>> def brightness(images):
        ...     print(len(images), "images")
        ...     return images.mean((1, 2, 3))
        >>> reward = iqareward.Chunked(iqareward.NoReference(brightness, higher_is_better=True), batch_size=2)
        >>> reward(torch.ones(3, 3, 8, 8))
        2 images
        1 images
        tensor([1., 1., 1.])
    """

    def __init__(self, reward: Reward, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"Chunked expected `batch_size` >= 1, got {batch_size}.")
        super().__init__(reward)
        self.batch_size = batch_size

    def score_call(self, call: Call) -> Scores:
        starts = range(0, max(1, len(call)), self.batch_size)  # an empty batch is still one call
        score: Callable[..., Any] = self._score_part
        if self.differentiable and len(starts) > 1:
            score = partial(recomputed, score)
        # slices and the concatenation are part of the graph; the reward sets its own modes for its own devices
        with torch.inference_mode(False), torch.set_grad_enabled(self.differentiable):
            parts = [call.rows(slice(start, start + self.batch_size)) for start in starts]
            # column by column, because only a tensor argument is known to the recomputation
            return torch.cat([score(part.images, part.references, part.inputs, part.prompts) for part in parts])

    def _score_part(self, *columns: Any) -> Tensor:
        return Call(*columns).score(self.reward)


def _scaled(weight: float, bounds: Bounds) -> Bounds:
    """Bounds of `weight * score`."""
    if weight == 0:
        return (0.0, 0.0)
    low, high = (None if bound is None else weight * bound for bound in bounds)
    return (low, high) if weight > 0 else (high, low)


def _total(bounds: Sequence[float | None]) -> float | None:
    known = [bound for bound in bounds if bound is not None]
    return sum(known) if len(known) == len(bounds) else None
