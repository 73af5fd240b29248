"""Weightings that steer themselves; only the experiments use them."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from iqareward.weighting import LossWeights, mix

LOG_FLOOR = math.log(1e-6)  # smallest difficulty told apart, as in AdaptiveWeighter
SMALLEST_SPREAD = 0.05  # as in AdaptiveWeighter


@dataclass
class RunningAnchor:
    """`AdaptiveWeighter` measured against running statistics of the log-difficulty instead of a frozen anchor (rho 0).

    Half of the samples stay "hard" for ever, however small their errors become.
    """

    mode: Literal["additive", "convex"] = "additive"
    steepness: float = 2.0
    ema: float = 0.98

    def calibrate(self, difficulty: Tensor) -> None:
        """Begin with mean and variance of these rows."""
        self.variance, self.mean = torch.var_mean(difficulty.log().clamp(min=LOG_FLOOR))

    def __call__(self, difficulty: Tensor) -> LossWeights:
        """Compute the weights of the rows."""
        slope = self.steepness / self.variance.sqrt().clamp(min=SMALLEST_SPREAD)
        share = torch.sigmoid((difficulty.log().clamp(min=LOG_FLOOR) - self.mean) * slope)
        return mix(share, additive=self.mode == "additive")

    def update(self, difficulty: Tensor) -> None:
        """Let mean and variance follow: those of a mixture of old and new rows."""
        offset, gain = difficulty.log().clamp(min=LOG_FLOOR) - self.mean, 1 - self.ema
        step = gain * offset.mean()
        self.variance = torch.lerp(self.variance, offset.square().mean(), gain) - step.square()
        self.mean = self.mean + step


@dataclass
class TargetTracking:
    """A sigmoid in log-difficulty whose centre moves so that the mean RL share stays at a target (after AdaRFT).

    w = sigmoid(steepness * (log d - centre)), and after each step
    centre <- clip(centre + eta * tanh(alpha * (mean w - target)), low, high). AdaRFT moves a target difficulty so and
    trains on the samples nearest to it; the soft share of RL is ours. It never hands over to SFT.

    References:
        Shi et al., Efficient Reinforcement Finetuning via Adaptive Curriculum Learning, 2025,
        https://arxiv.org/abs/2504.05520
    """

    centre: float | Tensor
    target: float = 0.5
    steepness: float = 2.0
    eta: float = 0.05
    alpha: float = 2.0
    low: float = -20.0
    high: float = 20.0

    signal: Literal["difficulty"] = field(default="difficulty", init=False, repr=False)

    def __call__(
        self, difficulty: Tensor, *, has_signal: Tensor | None = None, valid: Tensor | None = None
    ) -> LossWeights:
        """Compute the weights of the rows; a difficulty that is NaN, infinite or negative gets SFT."""
        return mix(self._share(difficulty)[0], has_signal=has_signal, valid=valid)

    def update(self, difficulty: Tensor) -> None:
        """Move the centre by the mean share of these rows."""
        share, counted = self._share(difficulty)
        excess = (share.sum() / counted.sum() - self.target).nan_to_num(nan=0.0)
        self.centre = (self.centre + self.eta * torch.tanh(self.alpha * excess)).clamp(self.low, self.high)

    def state_dict(self) -> dict[str, Any]:
        """Return the centre."""
        return {"centre": self.centre}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the centre of `state_dict()`."""
        self.centre = state["centre"]

    def _share(self, difficulty: Tensor) -> tuple[Tensor, Tensor]:
        logs = difficulty.log().clamp(min=LOG_FLOOR)  # NaN of negative numbers stays
        usable = logs.isfinite()
        return torch.where(usable, torch.sigmoid(self.steepness * (logs - self.centre)), 0.0), usable


class GradientNoise(NamedTuple):
    """Variances of an RL and of an SFT gradient, and the squared distance of the two mean gradients; scalars."""

    rl_variance: Tensor
    sft_variance: Tensor
    disagreement: Tensor


def gradient_noise(rl_gradients: Tensor, sft_gradients: Tensor) -> GradientNoise:
    """Measure the noise of both gradients from those of several micro-batches, `[n, P]` and `[k, P]`; unbiased."""
    rl_variance, rl_mean = torch.var_mean(rl_gradients.detach().float(), dim=0)
    sft_variance, sft_mean = torch.var_mean(sft_gradients.detach().float(), dim=0)
    chance = (rl_variance / len(rl_gradients) + sft_variance / len(sft_gradients)).sum()  # of noise alone
    disagreement = ((rl_mean - sft_mean).square().sum() - chance).clamp(min=0)
    return GradientNoise(rl_variance.sum(), sft_variance.sum(), disagreement)


@dataclass
class NoiseAware:
    """One SFT share for all rows, from how noisy the gradients are: mu = s_r^2 / (s_r^2 + s_s^2 + D^2) (GAC type).

    That mu minimises the mean squared error of (1 - mu) g_rl + mu g_sft as an estimate of the mean RL gradient, for
    variances s_r^2, s_s^2 and squared disagreement D^2 (our derivation). `observe` moves the share towards it, smoothed
    and by at most `max_step`. The published controller also follows a schedule; that part is not here.

    References:
        Hu et al., GAC: Noise-Aware Adaptive Mixing for Hybrid SFT-RL Post-Training, 2026,
        https://arxiv.org/abs/2605.26184
    """

    share: float | Tensor = 0.5
    ema: float = 0.9
    max_step: float = 0.05
    noise: Tensor | None = None

    def __call__(self, difficulty: Tensor) -> LossWeights:
        """Compute the same weights for every row."""
        return mix(torch.ones_like(difficulty) - self.share)

    def observe(self, noise: GradientNoise) -> None:
        """Move the share by one measurement."""
        new = torch.stack(list(noise))
        self.noise = new if self.noise is None else self.ema * self.noise + (1 - self.ema) * new
        step = (self.noise[0] / self.noise.sum() - self.share).nan_to_num(nan=0.0)
        self.share = self.share + step.clamp(-self.max_step, self.max_step)

    def update(self, difficulty: Tensor) -> None:
        """Do nothing: only `observe` moves the share."""
