"""The stochastic sampler of Flow-GRPO: noise at every step, and the same distributions as the flow's own path.

The flow `dx = v dt` runs from sigma = 1 to 0. Its latents are `(1 - s) * clean + s * noise`, so the score of their
distribution is `-E[noise | x] / s = -(x + (1 - s) * v) / s`. Adding noise of strength g, `g dw`, and taking back its
effect with `g^2 / 2` times the score leaves every marginal as it was:

    dx = [v + g^2 / (2 s) * (x + (1 - s) * v)] dt + g dw,    g = eta * sqrt(s / (1 - s))

One Euler-Maruyama step from s to s' has dt = s' - s < 0 and std = g * sqrt(s - s'). At s = 1, where g is infinite, the
level of the next step stands in for s in g, as in the published trainer. The last step, to s' = 0, is the flow's own:
noise there would stay in the image.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from iqareward.diffusion.flow import FlowPath
from iqareward.diffusion.transition import Step, Transition


@dataclass(frozen=True, eq=False)
class FlowSDE(FlowPath):
    """Flow matching sampled with Flow-GRPO's marginal-preserving noise; `eta` is its noise level, typically 0.7.

    Args:
        scheduler: a `diffusers.FlowMatchEulerDiscreteScheduler`.

    Example:
        >>> import diffusers, torch
        >>> process = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler())
        >>> latents = torch.zeros(1, 4, 8, 8)
        >>> [round(process.transition(latents, latents, step, eta=0.7).std, 2) for step in process.schedule(4)]
        [0.7, 0.57, 0.29, 0.0]

    References:
        Liu et al., Flow-GRPO: Training Flow Matching Models via Online RL, 2025, https://arxiv.org/abs/2505.05470
    """

    def transition(self, output: Tensor, latents: Tensor, step: Step, *, eta: float) -> Transition:
        """See the top of this file.

        Args:
            output: `[N, ...]` the velocity that the network answered.
            latents: `[N, ...]` what it was asked about.
            step: from `schedule`.
            eta: noise level; 0 is the scheduler's Euler step.

        Returns:
            The step's `Transition`, computed in fp32.
        """
        output, latents = output.float(), latents.float()
        delta = step.then - step.now
        clean = latents - step.now * output
        if step.then == 0 or eta == 0:
            return Transition(latents + delta * output, 0.0, clean)
        away_from_one = step.now if step.now < 1 else step.then
        strength = eta * math.sqrt(step.now / (1 - away_from_one))
        noise = latents + (1 - step.now) * output
        drift = output + strength**2 / (2 * step.now) * noise
        return Transition(latents + delta * drift, strength * math.sqrt(-delta), clean)
