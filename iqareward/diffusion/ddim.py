"""DDIM with eta: the sampler of models that predict noise, v or the sample, with its log-probabilities.

A step from x_t with alpha-bar a to alpha-bar a' (Song et al., equations 12 and 16), e and x0 being the noise and the
clean latents that the network's answer stands for:

    std  = eta * sqrt((1 - a') / (1 - a)) * sqrt(1 - a / a')
    mean = sqrt(a') * clip(x0) + sqrt(1 - a' - std^2) * e

At the last step a' = 1 (unless the scheduler says otherwise), so std = 0: it carries no log-probability.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from iqareward._gradients import clamp
from iqareward.diffusion.transition import Step, Transition, per_row


@dataclass(frozen=True, eq=False)
class DDIM:
    """The noise process of a diffusers scheduler with betas, sampled by DDIM with any eta.

    Args:
        scheduler: a `diffusers.DDIMScheduler`; `from_scheduler` makes one from most others.

    Raises:
        ValueError: the scheduler thresholds dynamically, which has no Gaussian transition.

    Example:
        >>> import diffusers
        >>> process = DDIM.from_scheduler(diffusers.DDPMScheduler(clip_sample=False))
        >>> [step.time for step in process.schedule(4)]
        [750.0, 500.0, 250.0, 0.0]

    References:
        Song, Meng, Ermon, Denoising Diffusion Implicit Models, 2020, https://arxiv.org/abs/2010.02502
        Salimans, Ho, Progressive Distillation for Fast Sampling of Diffusion Models, 2022,
        https://arxiv.org/abs/2202.00512 (v prediction)
    """

    scheduler: Any
    # copied to each device once: a copy in every call would make the host wait
    _alpha_bars: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.scheduler.config.thresholding:
            raise ValueError(
                "DDIM expected a scheduler with thresholding=False, got dynamic thresholding, whose step is no "
                "Gaussian. Load it with thresholding=False; clip_sample=True is supported."
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "DDIM":
        """The process of any diffusers scheduler that is built from betas, with its spacing and clipping.

        Args:
            scheduler: e.g. `pipeline.scheduler`; it is not changed.
        """
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        if "num_train_timesteps" not in scheduler.config or not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"DDIM expected a diffusers scheduler with betas, got {type(scheduler).__name__}. "
                "For flow matching use FlowSDE or FlowCPS."
            )
        ours: Any = DDIMScheduler.from_config(scheduler.config)
        return cls(ours)

    def schedule(self, num_steps: int) -> tuple[Step, ...]:
        """The scheduler's own timesteps and alpha-bars, from noise to sample."""
        config, alpha_bars = self.scheduler.config, self.scheduler.alphas_cumprod
        self.scheduler.set_timesteps(num_steps)
        stride = config.num_train_timesteps // num_steps
        steps = []
        for time in self.scheduler.timesteps.tolist():
            before = time - stride
            final = alpha_bars[before] if before >= 0 else self.scheduler.final_alpha_cumprod
            steps.append(Step(float(time), float(alpha_bars[time]), float(final)))
        return tuple(steps)

    def transition(self, output: Tensor, latents: Tensor, step: Step, *, eta: float) -> Transition:
        """See the top of this file.

        Args:
            output: `[N, ...]` what the network answered.
            latents: `[N, ...]` what it was asked about.
            step: from `schedule`.
            eta: 0 is DDIM, 1 has the noise of DDPM.

        Returns:
            The step's `Transition`, computed in fp32.
        """
        output, latents = output.float(), latents.float()
        signal, noise_level = math.sqrt(step.now), math.sqrt(1 - step.now)
        clean, noise = self._split(output, latents, signal, noise_level)
        if self.scheduler.config.clip_sample:
            limit = self.scheduler.config.clip_sample_range
            clean = clamp(clean, -limit, limit)
        variance = (1 - step.then) / (1 - step.now) * (1 - step.now / step.then)
        std = eta * math.sqrt(max(variance, 0.0))
        mean = math.sqrt(step.then) * clean + math.sqrt(max(1 - step.then - std**2, 0.0)) * noise
        return Transition(mean, std, clean)

    def draw_times(self, num: int, generator: torch.Generator) -> Tensor:
        """Uniform timesteps `[num]`, int64."""
        high = self.scheduler.config.num_train_timesteps
        return torch.randint(high, (num,), generator=generator, device=generator.device)

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """`sqrt(a) * clean + sqrt(1 - a) * noise`."""
        signal, noise_level = self._levels(times, clean)
        return signal * clean + noise_level * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """The noise, the clean latents, or `v = sqrt(a) * noise - sqrt(1 - a) * clean`, as the model predicts."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return clean
        signal, noise_level = self._levels(times, clean)
        return signal * noise - noise_level * clean

    def clean(self, output: Tensor, latents: Tensor, times: Tensor) -> Tensor:
        """The clean latents, not clipped."""
        return self._split(output.float(), latents.float(), *self._levels(times, latents.float()))[0]

    def _levels(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        if times.device not in self._alpha_bars:
            self._alpha_bars[times.device] = self.scheduler.alphas_cumprod.to(times.device)
        alpha_bars = self._alpha_bars[times.device][times.long()]
        return per_row(alpha_bars.sqrt(), like), per_row((1 - alpha_bars).sqrt(), like)

    def _split(self, output: Tensor, latents: Tensor, signal: Any, noise_level: Any) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that `latents` consist of, according to `output`."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return (latents - noise_level * output) / signal, output
        if kind == "sample":
            return output, (latents - signal * output) / noise_level
        return signal * latents - noise_level * output, signal * output + noise_level * latents
