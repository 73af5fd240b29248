"""Flow matching: the schedules of diffusers' pipelines, sampled with and without noise."""

import copy
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from iqareward.diffusion.processes.gaussian import NoiseProcess, Step


@dataclass(frozen=True, eq=False)
class _FlowPath(NoiseProcess):
    """Schedule and training pairs of rectified flow.

    Latents at noise level sigma are `(1 - sigma) * clean + sigma * noise`; the network predicts the velocity
    `v = noise - clean`, so `clean = latents - sigma * v` and `noise = latents + (1 - sigma) * v`.

    References:
        Liu, Gong, Liu, Flow Straight and Fast: Learning to Generate and Transfer Data with Rectified Flow, 2022,
        https://arxiv.org/abs/2209.03003
        Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024,
        https://arxiv.org/abs/2403.03206 (logit-normal times)
    """

    scheduler: Any
    mu: float | None = None
    linspace_sigmas: bool | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.scheduler, "sigmas") or "shift" not in self.scheduler.config:
            raise ValueError(
                f"{type(self).__name__} expected a FlowMatchEulerDiscreteScheduler, got "
                f"{type(self.scheduler).__name__}. For a scheduler with betas use DDIM.from_scheduler(...)."
            )
        if self.scheduler.config.get("invert_sigmas"):
            raise ValueError(
                f"{type(self).__name__} expected a scheduler with invert_sigmas=False, got True. Its times run from "
                "the image to the noise, which is not supported."
            )

    @property
    def prediction_type(self) -> Literal["velocity"]:
        return "velocity"

    def schedule(self, num_steps: int, tokens: int | None = None) -> tuple[Step, ...]:
        """The times and sigmas of the model's pipeline, from noise to sample.

        Args:
            num_steps: How many times the network is asked.
            tokens: Length of the latents as a sequence of tokens (without those of a condition), which sets the shift
                of a scheduler with dynamic shifting as `calculate_shift` of the pipelines does; not needed with `mu`.

        Raises:
            ValueError: The scheduler uses dynamic shifting, and neither `mu` nor `tokens` is given.
        """
        config = self.scheduler.config
        dynamic, options = config.use_dynamic_shifting, dict[str, Any]()
        if dynamic and self.mu is None and tokens is None:
            raise ValueError(
                f"{type(self).__name__} expected the number of tokens or `mu`, got neither. This scheduler shifts its "
                "noise levels with the resolution: call schedule(num_steps, tokens=latents.shape[1])."
            )
        if self.mu is not None:
            options["mu"] = self.mu
        elif dynamic and tokens is not None:
            slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
            options["mu"] = config.base_shift + slope * (tokens - config.base_image_seq_len)
        if dynamic if self.linspace_sigmas is None else self.linspace_sigmas:
            options["sigmas"] = [1 + (1 / num_steps - 1) * i / max(num_steps - 1, 1) for i in range(num_steps)]
        scheduler = copy.copy(self.scheduler)  # a pipeline may be in the middle of a schedule of its own
        scheduler.set_timesteps(num_steps, **options)
        sigmas, times = scheduler.sigmas.tolist(), scheduler.timesteps.tolist()
        return tuple(Step(time, now, then) for time, now, then in zip(times, sigmas, sigmas[1:], strict=False))

    def draw_times(self, uniforms: Tensor) -> Tensor:
        """Logit-normal times `[N]`, fp32, on the network's scale."""
        # 0 would become a time without noise; the other uniform numbers of fp32 are multiples of 2^-24
        normal = torch.special.ndtri(uniforms.clamp(min=2**-25))
        return normal.sigmoid() * self.scheduler.config.num_train_timesteps

    def start(self, noise: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The noise itself: nothing of an anchor is left where sigma is 1."""
        return noise

    def levels(self, times: Tensor) -> Tensor:
        """Sigma `[N]`."""
        return times / self.scheduler.config.num_train_timesteps

    def coefficients(self, level: Any) -> tuple[Any, Any]:
        """`1 - sigma` and `sigma`."""
        return 1 - level, level


@dataclass(frozen=True, eq=False)
class FlowSDE(_FlowPath):
    """Flow matching sampled with Flow-GRPO's marginal-preserving noise; `eta` is its noise level, typically 0.7.

    The flow `dx = v dt` runs from sigma = 1 to 0. The score of the distribution of its latents at level s is
    `-E[noise | x] / s`, with the noise `x + (1 - s) * v` that the network sees. Noise of strength g, compensated by
    `g^2 / 2` times the score, leaves every marginal as it was:

        dx = [v + g^2 / (2 s) * noise] dt + g dw,    g = eta * sqrt(s / (1 - s))

    One Euler-Maruyama step from s to s' has dt = s' - s < 0 and std = g * sqrt(s - s'), and keeps
    `s' - g^2 / (2 s) * (s - s')` of the noise. At s = 1, where g is infinite, the level of the next step replaces s in
    g, as in the published trainer. The last step, to s' = 0, adds no noise, which would stay in the image.

    Args:
        scheduler: A `diffusers.FlowMatchEulerDiscreteScheduler`; its shift and terminal settings are kept.
        mu: Its shift, if it uses dynamic shifting and the shift is not to follow from the number of tokens.
        linspace_sigmas: Whether the model's pipeline gives the scheduler `sigmas=np.linspace(1, 1 / n, n)`. The
            pipelines of Flux, Flux Kontext, Qwen-Image and Lumina do; those of SD3 and Sana do not. None = exactly if
            the scheduler uses dynamic shifting, which is right for all of these but Flux-schnell and Lumina.

    Example:
        >>> import diffusers, torch
        >>> process = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler())
        >>> latents = torch.zeros(1, 4, 8, 8)
        >>> [round(process.transition(latents, latents, step, eta=0.7).std, 2) for step in process.schedule(4)]
        [0.7, 0.57, 0.29, 0.0]
        >>> kontext = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True))
        >>> [round(step.now, 3) for step in kontext.schedule(4, tokens=16)]
        [1.0, 0.826, 0.613, 0.345]

    References:
        Liu et al., Flow-GRPO: Training Flow Matching Models via Online RL, 2025, https://arxiv.org/abs/2505.05470
    """

    def renewal(self, step: Step, eta: float) -> tuple[float, float]:
        if step.then == 0 or eta == 0:
            return 0.0, step.then
        away_from_one = step.now if step.now < 1 else step.then
        strength = eta * math.sqrt(step.now / (1 - away_from_one))
        delta = step.now - step.then
        return strength * math.sqrt(delta), step.then - strength**2 / (2 * step.now) * delta


@dataclass(frozen=True, eq=False)
class FlowCPS(_FlowPath):
    """Flow matching with coefficients-preserving sampling; `eta` in [0, 1] is the share of noise that is exchanged.

    Flow-GRPO's step is exact only for infinitely small steps: with few steps its latents carry more noise than the
    network is told. Here part of the *predicted* noise is replaced by fresh noise, and the total stays s':

        std  = s' * sin(eta * pi / 2)
        mean = (1 - s') * clean + sqrt(s'^2 - std^2) * noise

    `eta = 0` is the Euler step; `eta = 1` replaces all noise, which is diffusers' `stochastic_sampling`. The last step,
    to s' = 0, has std 0.

    Args:
        scheduler: A `diffusers.FlowMatchEulerDiscreteScheduler`; its shift and terminal settings are kept.
        mu: As for `FlowSDE`.
        linspace_sigmas: As for `FlowSDE`.

    Raises:
        ValueError: `eta` of a step is outside [0, 1].

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

    def renewal(self, step: Step, eta: float) -> tuple[float, float]:
        if not 0 <= eta <= 1:
            raise ValueError(f"FlowCPS expected eta in [0, 1], got {eta}. 1 exchanges all noise already.")
        return step.then * math.sin(eta * math.pi / 2), step.then * math.cos(eta * math.pi / 2)
