"""What flow-matching samplers share: the straight path between image and noise, and the times of a diffusers scheduler.

Latents at noise level sigma are `(1 - sigma) * clean + sigma * noise`; the network answers the velocity
`v = noise - clean`, so `clean = latents - sigma * v` and `noise = latents + (1 - sigma) * v`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iqareward.diffusion.transition import Step, per_row


@dataclass(frozen=True, eq=False)
class FlowPath:
    """Schedule and training pairs of rectified flow; `FlowSDE` and `FlowCPS` add how to sample.

    Args:
        scheduler: a `diffusers.FlowMatchEulerDiscreteScheduler`; its shift and terminal settings are kept.
        mu: its shift for this resolution, if it uses dynamic shifting.

    References:
        Liu, Gong, Liu, Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, 2022,
        https://arxiv.org/abs/2209.03003
        Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024,
        https://arxiv.org/abs/2403.03206 (logit-normal times)
    """

    scheduler: Any
    mu: float | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.scheduler, "sigmas") or "shift" not in self.scheduler.config:
            raise ValueError(
                f"{type(self).__name__} expected a FlowMatchEulerDiscreteScheduler, got "
                f"{type(self.scheduler).__name__}. For a scheduler with betas use DDIM.from_scheduler(...)."
            )

    def schedule(self, num_steps: int) -> tuple[Step, ...]:
        """The scheduler's own times and sigmas, from noise to sample."""
        options = {} if self.mu is None else {"mu": self.mu}
        self.scheduler.set_timesteps(num_steps, **options)
        sigmas, times = self.scheduler.sigmas.tolist(), self.scheduler.timesteps.tolist()
        return tuple(Step(time, now, then) for time, now, then in zip(times, sigmas, sigmas[1:], strict=False))

    def draw_times(self, num: int, generator: torch.Generator) -> Tensor:
        """Logit-normal times `[num]`, fp32, on the network's scale."""
        normal = torch.randn(num, generator=generator, device=generator.device)
        return normal.sigmoid() * self.scheduler.config.num_train_timesteps

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """`(1 - sigma) * clean + sigma * noise`."""
        return torch.lerp(clean, noise, self._sigma(times, clean))

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The velocity, `noise - clean`."""
        return noise - clean

    def clean(self, output: Tensor, latents: Tensor, times: Tensor) -> Tensor:
        """`latents - sigma * output`."""
        latents = latents.float()
        return latents - self._sigma(times, latents) * output.float()

    def _sigma(self, times: Tensor, like: Tensor) -> Tensor:
        return per_row(times / self.scheduler.config.num_train_timesteps, like)
