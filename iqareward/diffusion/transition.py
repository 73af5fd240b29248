"""One denoising step as a Gaussian: its log-density, its divergence from another one, and what every sampler offers."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Step(NamedTuple):
    """One step of a sampling schedule, in plain numbers, so that nothing waits for a device.

    Attributes:
        time: what the network is told.
        now: noise level of the latents before the step; alpha-bar for DDIM, sigma for flow matching.
        then: noise level after it.
    """

    time: float
    now: float
    then: float


class Transition(NamedTuple):
    """The Gaussian that a step draws the next latents from.

    Attributes:
        mean: `[N, ...]` fp32.
        std: one number for the whole step; 0 where the step is deterministic.
        clean: `[N, ...]` fp32, the noise-free latents that the network predicts at this step.
    """

    mean: Tensor
    std: float
    clean: Tensor

    def log_prob(self, latents: Tensor) -> Tensor:
        """Log-density of `latents` per element, averaged over the elements of each row, as in DDPO and Flow-GRPO.

        Times the number of elements it is the log-density of the row. The average keeps importance ratios near 1
        whatever the resolution; clip ranges of 1e-4 to 1e-5 belong to it.

        Args:
            latents: `[N, ...]` what the step led to; no gradient flows into it.

        Returns:
            `[N]` fp32; 0 where the step is deterministic, so that its ratio is 1 and its gradient 0.

        Example:
            >>> step = Transition(mean=torch.zeros(1, 4), std=1.0, clean=torch.zeros(1, 4))
            >>> step.log_prob(torch.zeros(1, 4))
            tensor([-0.9189])

        References:
            Black et al., Training Diffusion Models with Reinforcement Learning, 2023, https://arxiv.org/abs/2305.13301
        """
        if self.std == 0:
            return self.mean.new_zeros(self.mean.shape[0])
        offset = (latents.detach().to(self.mean.dtype) - self.mean) / self.std
        return -0.5 * offset.square().flatten(1).mean(1) - math.log(self.std) - 0.5 * math.log(2 * math.pi)

    def kl(self, reference: "Transition") -> Tensor:
        """Kullback-Leibler divergence from the step of a reference model, per element; `[N]` >= 0.

        In closed form: both Gaussians have the schedule's standard deviation, so it is
        `(mean - reference mean)^2 / (2 std^2)`.

        Args:
            reference: the same step under the reference model.

        Example:
            >>> a, b = (Transition(torch.full((1, 4), m), 0.5, torch.zeros(1, 4)) for m in (0.0, 1.0))
            >>> a.kl(b)
            tensor([2.])
        """
        if self.std == 0:
            return self.mean.new_zeros(self.mean.shape[0])
        return ((self.mean - reference.mean.detach()) / self.std).square().flatten(1).mean(1) / 2


class Process(Protocol):
    """A noise process and its sampler; `DDIM`, `FlowSDE` and `FlowCPS` are three.

    Times `[N]` are what the network is told; `schedule` gives them as plain numbers.
    """

    def schedule(self, num_steps: int) -> Sequence[Step]:
        """The steps from pure noise to the sample."""
        ...

    def transition(self, output: Tensor, latents: Tensor, step: Step, *, eta: float) -> Transition:
        """The step's Gaussian, from the network's `output` `[N, ...]` for `latents`; `eta` = 0 is deterministic."""
        ...

    def draw_times(self, num: int, generator: torch.Generator) -> Tensor:
        """Random times `[num]` as in training, on the generator's device."""
        ...

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """Latents `[N, ...]` at `times` `[N]`."""
        ...

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the network should answer for `add_noise(clean, noise, times)`; `[N, ...]`."""
        ...

    def clean(self, output: Tensor, latents: Tensor, times: Tensor) -> Tensor:
        """The noise-free latents that an answer of the network stands for; `[N, ...]`."""
        ...


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """`values` `[N]` in the dtype and on the device of `like` `[N, ...]`, shaped to multiply its rows.

    Example:
        >>> list(per_row(torch.ones(2), torch.zeros(2, 3, 8, 8)).shape)
        [2, 1, 1, 1]
    """
    return values.to(like).view(-1, *([1] * (like.ndim - 1)))
