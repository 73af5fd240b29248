"""Processes that lead from the degraded image to the clean one: their noisy end is the degraded image with noise."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from iqareward.diffusion.processes.gaussian import Step, TabledProcess, posterior


class _AnchoredProcess(TabledProcess):
    """A process with a fixed number of steps; the clean image has the time before `first_time`."""

    anchored: ClassVar[bool] = True
    clean_level: ClassVar[float] = 0.0

    @property
    @abstractmethod
    def start_std(self) -> float: ...

    def schedule(self, num_steps: int, tokens: int | None = None) -> tuple[Step, ...]:
        """The steps of training, or `num_steps` evenly spaced ones of them, beginning with the noisiest."""
        levels = [self.clean_level, *self.table.tolist()]
        total = len(levels) - 1
        if not 1 <= num_steps <= total:
            raise ValueError(f"{type(self).__name__} expected num_steps in [1, {total}], got {num_steps}.")
        marks = [total - total * index // num_steps for index in range(num_steps + 1)]
        return tuple(
            Step(float(mark - 1 + self.first_time), levels[mark], levels[after]) for mark, after in pairwise(marks)
        )

    def start(self, noise: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The anchor with noise."""
        return self._offset(0.0, anchor) + self.start_std * noise


@dataclass(frozen=True, eq=False)
class ResShift(_AnchoredProcess):
    """Residual shifting, in which the degraded image's residual is added in a few steps.

    The anchor is the latents of the degraded image, upsampled to the size of the result. At level eta, which rises from
    about 0 to about 1,

        x = clean + eta * (anchor - clean) + kappa * sqrt(eta) * noise

    A step from eta to eta' draws from the posterior (equations 6 and 7 of the paper):

        mean = eta' / eta * x + (1 - eta' / eta) * clean,    variance = kappa^2 * eta' / eta * (eta - eta')

    `eta` of the sampler scales its standard deviation; 1 is the published sampler. Times are 0, ..., steps - 1. One
    step from the noisiest level is SinSR's. The arguments have the names and defaults of the published configurations.

    Args:
        steps: Number of steps in training.
        kappa: Strength of the noise.
        power: Exponent p of the schedule; small levels grow faster below 1.
        min_noise_level: Standard deviation of the noise at the first level, at most 0.032 times kappa.
        etas_end: Square root of the last level.
        prediction_type: What the network predicts.

    Example:
        >>> process = ResShift()
        >>> degraded = torch.zeros(1, 3, 8, 8)
        >>> steps = process.schedule(4)
        >>> [round(process.transition(degraded, degraded, step, eta=1.0, anchor=degraded).std, 2) for step in steps]
        [0.98, 0.74, 0.41, 0.0]

    References:
        Yue, Wang, Loy, ResShift: Efficient Diffusion Model for Image Super-resolution by Residual Shifting, 2023,
        https://arxiv.org/abs/2307.12348
    """

    steps: int = 15
    kappa: float = 2.0
    power: float = 0.3
    min_noise_level: float = 0.04
    etas_end: float = 0.99
    prediction_type: Literal["sample", "epsilon"] = "sample"  # pyright: ignore[reportIncompatibleMethodOverride]

    @cached_property
    def table(self) -> Tensor:
        first = min(self.min_noise_level / self.kappa, self.min_noise_level, math.sqrt(0.001))
        exponents = torch.linspace(0, 1, self.steps, dtype=torch.float64) ** self.power
        return (first * (self.etas_end / first) ** exponents).square()

    @property
    def start_std(self) -> float:
        return self.kappa * math.sqrt(float(self.table[-1]))

    def coefficients(self, level: Any) -> tuple[Any, Any]:
        """`1 - eta` and `kappa * sqrt(eta)`."""
        return 1 - level, self.kappa * level**0.5

    def renewal(self, step: Step, eta: float) -> tuple[float, float]:
        return posterior(self.kappa * math.sqrt(step.now), self.kappa * math.sqrt(step.then), 1.0, eta)

    def scale_input(self, latents: Tensor, times: Tensor) -> Tensor:
        """The latents divided by `sqrt(1 + kappa^2 * eta)`, their standard deviation."""
        return latents / (1 + self._rows(times, latents)[1].square()).sqrt()


@dataclass(frozen=True, eq=False)
class IRSDE(_AnchoredProcess):
    """The mean-reverting SDE of IR-SDE and Refusion, which leads from the clean image to the degraded one with noise.

    The anchor is the degraded image (or its latents). After the time integral b of the rate theta,

        x = anchor + exp(-b) * (clean - anchor) + max_sigma * sqrt(1 - exp(-2 b)) * noise

    and the noise levels are `exp(-b)`. Theta has a cosine schedule, scaled so that exp(-b) = delta at the end. A
    step draws from the posterior given the clean image that the network's answer stands for; its mean is the "optimum
    reverse state" of the paper (equation 14). `eta` of the sampler scales its standard deviation; 1 is the published
    "posterior" sampler. Times are 1, ..., steps.

    Args:
        steps: Number of steps in training.
        max_sigma: Standard deviation of the noise at the end, on the scale of the latents; published models take 10 to
            50 for images in [0, 255].
        delta: What is left of the clean image at the end.
        prediction_type: What the network predicts; the published networks predict the noise, their score is
            `-noise / s`.

    Example:
        >>> process = IRSDE()
        >>> process.start(torch.ones(1), anchor=torch.full((1,), 0.5))
        tensor([0.5392])

    References:
        Luo et al., Image Restoration with Mean-Reverting Stochastic Differential Equations, 2023,
        https://arxiv.org/abs/2301.11699
    """

    first_time: ClassVar[int] = 1
    clean_level: ClassVar[float] = 1.0

    steps: int = 100
    max_sigma: float = 10 / 255
    delta: float = 0.005
    prediction_type: Literal["epsilon", "sample", "score"] = "epsilon"  # pyright: ignore[reportIncompatibleMethodOverride]

    @cached_property
    def table(self) -> Tensor:
        # As published: the cosine schedule of Nichol and Dhariwal for two more steps, without its ends.
        position = torch.arange(1, self.steps + 2, dtype=torch.float64) / (self.steps + 2)
        cosine = ((position + 0.008) / 1.008 * math.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        integral = (1 - cosine)[1:].cumsum(0)  # theta of time 0 does not count
        return self.delta ** (integral / integral[-1])

    @property
    def start_std(self) -> float:
        return self.max_sigma

    def coefficients(self, level: Any) -> tuple[Any, Any]:
        """`exp(-b)` and `max_sigma * sqrt(1 - exp(-2 b))`."""
        return level, self.max_sigma * (1 - level**2) ** 0.5

    def renewal(self, step: Step, eta: float) -> tuple[float, float]:
        (signal, noise), (next_signal, next_noise) = self.coefficients(step.now), self.coefficients(step.then)
        return posterior(noise, next_noise, signal / next_signal, eta)
