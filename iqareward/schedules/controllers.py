"""Weightings that steer themselves: by the RL share they give, or by how noisy the two gradients are."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from iqareward.groups import check_rows, is_distributed
from iqareward.types import Groups
from iqareward.weighting import LossWeights, mix

LOG_FLOOR = math.log(1e-6)  # smallest difficulty told apart


@dataclass
class TargetTracking:
    """A sigmoid in log-difficulty whose centre moves so that the mean RL share stays at a target (after AdaRFT).

    w = sigmoid(kappa * (log d - centre)), and after each step
    centre <- clip(centre + eta * tanh(alpha * (mean w - target)), low, high). AdaRFT moves a target difficulty so and
    trains on the samples nearest to it; the soft share of RL is ours. It never hands over to SFT.

    Args:
        centre: first centre, a log-difficulty.
        target: mean RL share to hold, in (0, 1).
        kappa: steepness.
        eta: largest move of the centre per step.
        alpha: sensitivity.
        low: smallest centre.
        high: largest centre.

    Example:
        >>> weighter = TargetTracking(centre=0.0, eta=0.2)
        >>> for _ in range(200):
        ...     weighter.update(torch.tensor([0.1]))
        >>> weighter(torch.tensor([0.1])).rl
        tensor([0.5000])

    References:
        Shi et al., Efficient Reinforcement Finetuning via Adaptive Curriculum Learning, 2025,
        https://arxiv.org/abs/2504.05520
    """

    centre: float | Tensor
    target: float = 0.5
    kappa: float = 2.0
    eta: float = 0.05
    alpha: float = 2.0
    low: float = -20.0
    high: float = 20.0

    signal: Literal["difficulty"] = field(default="difficulty", init=False, repr=False)

    def __call__(
        self,
        difficulty: Tensor,
        *,
        bucket: Groups | None = None,
        active: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LossWeights:
        """The weights of the rows; a difficulty that is NaN, infinite or negative gets SFT, `bucket` is not used."""
        return mix(self._share(difficulty)[0], active=active, valid=valid)

    def update(self, difficulty: Tensor, bucket: Groups | None = None) -> None:
        """Move the centre by the mean share of these rows, over all processes; every process calls it."""
        share, counted = self._share(difficulty)
        sums = torch.stack([share.sum(), counted.sum().to(share.dtype)])
        if is_distributed():
            dist.all_reduce(sums)
        excess = (sums[0] / sums[1] - self.target).nan_to_num(nan=0.0)
        self.centre = (self.centre + self.eta * torch.tanh(self.alpha * excess)).clamp(self.low, self.high)

    def state_dict(self) -> dict[str, Any]:
        """The centre."""
        return {"centre": self.centre}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the centre of `state_dict()`."""
        self.centre = state["centre"]

    def _share(self, difficulty: Tensor) -> tuple[Tensor, Tensor]:
        logs = check_rows("TargetTracking", difficulty).log().clamp(min=LOG_FLOOR)  # NaN of negative numbers stays
        log_difficulty = logs.float()  # whoever calls first, the centre is fp32
        usable = log_difficulty.isfinite()
        share = torch.sigmoid(self.kappa * (log_difficulty - self.centre))
        return torch.where(usable, share, 0.0), usable


class GradientNoise(NamedTuple):
    """How noisy the two gradients are; all three are scalars.

    Attributes:
        rl_variance: of an RL gradient.
        sft_variance: of an SFT gradient.
        disagreement: squared distance of the two mean gradients.

    Example:
        >>> GradientNoise(torch.tensor(9.0), torch.tensor(0.5), torch.tensor(0.5)).disagreement
        tensor(0.5000)
    """

    rl_variance: Tensor
    sft_variance: Tensor
    disagreement: Tensor


def gradient_noise(rl_gradients: Tensor, sft_gradients: Tensor) -> GradientNoise:
    """Measure the noise of both gradients from those of several micro-batches; unbiased.

    Args:
        rl_gradients: `[n, P]`, n >= 2 flattened gradients of the RL loss, of some of the parameters.
        sft_gradients: `[k, P]`, k >= 2, of the same parameters.

    Returns:
        `GradientNoise`: for each, the mean squared distance of a micro-batch's gradient to the mean; and the squared
        distance between the means, less what noise alone would make of it, at least 0.

    Raises:
        ValueError: there are fewer than two gradients, or their lengths differ.

    Example:
        >>> noise = gradient_noise(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[0.0, 5.0], [0.0, 5.0]]))
        >>> tuple(value.item() for value in noise)
        (2.0, 0.0, 28.0)
    """
    shapes = rl_gradients.shape, sft_gradients.shape
    if any(len(shape) != 2 or shape[0] < 2 for shape in shapes) or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"gradient_noise expected gradients [n, P] and [k, P], n, k >= 2, got {[list(shape) for shape in shapes]}. "
            "Flatten and stack the gradients of several micro-batches."
        )
    rl_variance, rl_mean = torch.var_mean(rl_gradients.detach().float(), dim=0)
    sft_variance, sft_mean = torch.var_mean(sft_gradients.detach().float(), dim=0)
    chance = (rl_variance / shapes[0][0] + sft_variance / shapes[1][0]).sum()
    disagreement = ((rl_mean - sft_mean).square().sum() - chance).clamp(min=0)
    return GradientNoise(rl_variance.sum(), sft_variance.sum(), disagreement)


@dataclass
class NoiseAware:
    """One SFT share for all rows, from how noisy the gradients are: mu = s_r^2 / (s_r^2 + s_s^2 + D^2) (GAC type).

    That mu minimises the mean squared error of (1 - mu) g_rl + mu g_sft as an estimate of the mean RL gradient, for
    variances s_r^2, s_s^2 and squared disagreement D^2 (our derivation). Only `observe` moves the share towards it,
    smoothed and by at most `max_step`: `DifficultyAdaptiveTrainer`, which measures no gradient noise, refuses this
    weighting. The published controller also follows a schedule; that part is not here.

    Args:
        share: first SFT share.
        ema: decay of the noise estimates.
        max_step: largest change of the share per observation.

    Example:
        >>> weighter = NoiseAware(share=0.5, max_step=0.1)
        >>> weighter.observe(GradientNoise(torch.tensor(9.0), torch.tensor(0.5), torch.tensor(0.5)))
        >>> weighter(torch.tensor([0.1])).sft
        tensor([0.6000])

    References:
        Hu et al., GAC: Noise-Aware Adaptive Mixing for Hybrid SFT-RL Post-Training, 2026,
        https://arxiv.org/abs/2605.26184
    """

    share: float | Tensor = 0.5
    ema: float = 0.9
    max_step: float = 0.05
    noise: Tensor | None = None

    signal: Literal["gradient_noise"] = field(default="gradient_noise", init=False, repr=False)

    def __call__(
        self,
        difficulty: Tensor,
        *,
        bucket: Groups | None = None,
        active: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LossWeights:
        """The same weights for every row; only the shape of `difficulty` counts, `bucket` is not used."""
        rows = check_rows("NoiseAware", difficulty)
        return mix(torch.ones_like(rows) - self.share, active=active, valid=valid)

    def observe(self, noise: GradientNoise) -> None:
        """Take in one measurement, the same on every process; one that is not finite changes nothing."""
        new = torch.stack(list(noise)).detach().float()
        usable = new.isfinite().all()
        old = torch.zeros_like(new) if self.noise is None else self.noise  # zeros: nothing measured yet
        blended = torch.where(old.any(), self.ema * old + (1 - self.ema) * new, new)
        self.noise = torch.where(usable, blended, old)
        relative = self.noise / self.noise.amax()  # large variances would overflow in their sum
        step = (relative[0] / relative.sum() - self.share).nan_to_num(nan=0.0).clamp(-self.max_step, self.max_step)
        self.share = self.share + torch.where(usable, step, 0.0)

    def update(self, difficulty: Tensor, bucket: Groups | None = None) -> None:
        """Nothing: difficulties do not matter here, see `observe`."""

    def state_dict(self) -> dict[str, Any]:
        """The share and the noise estimates."""
        return {"share": self.share, "noise": self.noise}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken."""
        self.share, self.noise = state["share"], state["noise"]
