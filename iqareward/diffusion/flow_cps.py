"""Coefficients-preserving sampling: noise at every step without ever leaving the noise level of the schedule.

Flow-GRPO's step is right only for infinitely small steps: with few steps its latents carry more noise than the network
is told. Here part of the *predicted* noise is exchanged for fresh noise, the total staying s':

    std  = s' * sin(eta * pi / 2)
    mean = (1 - s') * clean + sqrt(s'^2 - std^2) * noise

`eta = 0` is the Euler step; `eta = 1` replaces all noise, which is diffusers' `stochastic_sampling`. The last step, to
s' = 0, has std 0 by itself.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from iqareward.diffusion.flow import FlowPath
from iqareward.diffusion.transition import Step, Transition


@dataclass(frozen=True, eq=False)
class FlowCPS(FlowPath):
    """Flow matching sampled with coefficients-preserving noise; `eta` in [0, 1] is the share exchanged.

    Args:
        scheduler: a `diffusers.FlowMatchEulerDiscreteScheduler`.

    Example:
        >>> import diffusers, torch
        >>> process = FlowCPS(diffusers.FlowMatchEulerDiscreteScheduler())
        >>> latents = torch.zeros(1, 4, 8, 8)
        >>> [round(process.transition(latents, latents, step, eta=1.0).std, 3) for step in process.schedule(4)]
        [0.667, 0.334, 0.001, 0.0]

    References:
        Wang, Yu, Coefficients-Preserving Sampling for Reinforcement Learning with Flow Matching, 2025,
        https://arxiv.org/abs/2509.05952
    """

    def transition(self, output: Tensor, latents: Tensor, step: Step, *, eta: float) -> Transition:
        """See the top of this file.

        Args:
            output: `[N, ...]` the velocity that the network answered.
            latents: `[N, ...]` what it was asked about.
            step: from `schedule`.
            eta: share of the noise that is exchanged, in [0, 1].

        Returns:
            The step's `Transition`, computed in fp32.

        Raises:
            ValueError: `eta` is outside [0, 1].
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"FlowCPS expected eta in [0, 1], got {eta}. 1 exchanges all noise already.")
        output, latents = output.float(), latents.float()
        clean = latents - step.now * output
        noise = latents + (1 - step.now) * output
        std = step.then * math.sin(eta * math.pi / 2)
        kept = step.then * math.cos(eta * math.pi / 2)
        return Transition((1 - step.then) * clean + kept * noise, std, clean)
