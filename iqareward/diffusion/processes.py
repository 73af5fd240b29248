"""Noise processes and their samplers: each denoising step as a Gaussian with a mean and a standard deviation."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from iqareward._gradients import clamp


class Step(NamedTuple):
    """One step of a sampling schedule, in plain numbers, so that nothing waits for a device.

    Attributes:
        time: What the network is told.
        now: Noise level of the latents before the step; alpha-bar for DDIM, sigma for flow matching.
        then: Noise level after it.

    Example:
        >>> Step(time=250.0, now=0.25, then=0.0).then  # the last step of a flow ends without noise
        0.0
    """

    time: float
    now: float
    then: float


class Transition(NamedTuple):
    """The Gaussian that a step draws the next latents from.

    Attributes:
        mean: `[N, ...]` fp32.
        std: One number for the whole step; 0 where the step is deterministic.
        clean: `[N, ...]` fp32, the noise-free latents that the network predicts at this step.

    Example:
        >>> step = Transition(mean=torch.zeros(1, 4), std=1.0, clean=torch.zeros(1, 4))
        >>> step.log_prob(torch.zeros(1, 4))
        tensor([-0.9189])
    """

    mean: Tensor
    std: float
    clean: Tensor

    def log_prob(self, latents: Tensor) -> Tensor:
        """Log-density of `latents` per element, averaged over the elements of each row, as in DDPO and Flow-GRPO.

        Times the number of elements it is the log-density of the row. The average keeps importance ratios near 1
        whatever the resolution; clip ranges of 1e-4 to 1e-5 belong to it.

        Args:
            latents: `[N, ...]` latents that the step led to; no gradient flows into them.

        Returns:
            `[N]` fp32; 0 where the step is deterministic, so that its ratio is 1 and its gradient 0.

        References:
            Black et al., Training Diffusion Models with Reinforcement Learning, 2023, https://arxiv.org/abs/2305.13301
        """
        if self.std == 0:
            return self.mean.new_zeros(self.mean.shape[0])
        offset = (latents.detach().to(self.mean.dtype) - self.mean) / self.std
        return -0.5 * offset.square().flatten(1).mean(1) - math.log(self.std) - 0.5 * math.log(2 * math.pi)

    def kl(self, reference: "Transition") -> Tensor:
        """Kullback-Leibler divergence from the same step of a reference model, per element; `[N]` >= 0.

        In closed form: both Gaussians have the schedule's standard deviation, so it is
        `(mean - reference mean)^2 / (2 std^2)`.
        """
        if self.std == 0:
            return self.mean.new_zeros(self.mean.shape[0])
        return ((self.mean - reference.mean.detach()) / self.std).square().flatten(1).mean(1) / 2


class NoiseProcess(Protocol):
    """How noise is added to clean latents and taken away again; implemented by `DDIM`, `FlowSDE` and `FlowCPS`.

    Times `[N]` are what the network is told; `schedule` gives them as plain numbers.

    Example:
        >>> import diffusers
        >>> process: NoiseProcess = DDIM(diffusers.DDIMScheduler())
        >>> process.add_noise(torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.tensor([999])).max() < 0.1
        tensor(True)
    """

    def schedule(self, num_steps: int) -> Sequence[Step]:
        """The steps from pure noise to the sample."""
        ...

    def transition(
        self, output: Tensor, latents: Tensor, step: Step, *, eta: float, anchor: Tensor | None = None
    ) -> Transition:
        """The step's Gaussian, from the network's `output` `[N, ...]` for `latents`; `eta` = 0 is deterministic."""
        ...

    def draw_times(self, uniforms: Tensor) -> Tensor:
        """Random times `[num]` as in training, on the generator's device."""
        ...

    def start(self, noise: Tensor, anchor: Tensor | None = None) -> Tensor: ...

    def noise_level(self, step: Step) -> float: ...

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Latents `[N, ...]` at `times` `[N]`."""
        ...

    def target(self, clean: Tensor, noise: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The correct network output `[N, ...]` for `add_noise(clean, noise, times)`."""
        ...

    def clean(self, output: Tensor, latents: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The noise-free latents `[N, ...]` that an output of the network stands for."""
        ...


@dataclass(frozen=True, eq=False)
class DDIM:
    """The noise process of a diffusers scheduler with betas, sampled by DDIM with any eta.

    A step from x_t with alpha-bar a to alpha-bar a' (Song et al., equations 12 and 16), where the network's output
    stands for the noise e and the clean latents x0:

        std  = eta * sqrt((1 - a') / (1 - a)) * sqrt(1 - a / a')
        mean = sqrt(a') * clip(x0) + sqrt(1 - a' - std^2) * e

    At the last step a' = 1 (unless the scheduler says otherwise), so std = 0 and there is no log-probability.

    Args:
        scheduler: A `diffusers.DDIMScheduler`; `from_scheduler` makes one from most others.

    Raises:
        ValueError: The scheduler thresholds dynamically, so that its step is not Gaussian.

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
                "DDIM expected a scheduler with thresholding=False, got dynamic thresholding, whose step is not "
                "Gaussian. Load it with thresholding=False; clip_sample=True is supported."
            )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "DDIM":
        """The process of a diffusers scheduler that is built from betas, with its spacing and clipping.

        Args:
            scheduler: For example `pipeline.scheduler`; it is not changed.
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

    def transition(
        self, output: Tensor, latents: Tensor, step: Step, *, eta: float, anchor: Tensor | None = None
    ) -> Transition:
        """The step's Gaussian in fp32; `eta` = 0 is DDIM, `eta` = 1 has the noise of DDPM."""
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

    def draw_times(self, uniforms: Tensor) -> Tensor:
        """Uniform timesteps `[num]`, int64."""
        return (uniforms * self.scheduler.config.num_train_timesteps).long()

    def start(self, noise: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Pure noise."""
        return noise

    def noise_level(self, step: Step) -> float:
        """Share of noise in the latents before a step."""
        return math.sqrt(1 - step.now)

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """`sqrt(a) * clean + sqrt(1 - a) * noise`."""
        signal, noise_level = self._levels(times, clean)
        return signal * clean + noise_level * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The noise, the clean latents, or `v = sqrt(a) * noise - sqrt(1 - a) * clean`, as the model predicts."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return clean
        signal, noise_level = self._levels(times, clean)
        return signal * noise - noise_level * clean

    def clean(self, output: Tensor, latents: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The clean latents, not clipped."""
        return self._split(output.float(), latents.float(), *self._levels(times, latents.float()))[0]

    def _levels(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        if times.device not in self._alpha_bars:
            self._alpha_bars[times.device] = self.scheduler.alphas_cumprod.to(times.device)
        alpha_bars = self._alpha_bars[times.device][times.long()]
        return _per_row(alpha_bars.sqrt(), like), _per_row((1 - alpha_bars).sqrt(), like)

    def _split(self, output: Tensor, latents: Tensor, signal: Any, noise_level: Any) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that `latents` consist of, according to `output`."""
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            return (latents - noise_level * output) / signal, output
        if kind == "sample":
            return output, (latents - signal * output) / noise_level
        return signal * latents - noise_level * output, signal * output + noise_level * latents


@dataclass(frozen=True, eq=False)
class _FlowPath:
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

    def draw_times(self, uniforms: Tensor) -> Tensor:
        """Logit-normal times `[num]`, fp32, on the network's scale."""
        normal = torch.special.ndtri(uniforms.double()).float()
        return normal.sigmoid() * self.scheduler.config.num_train_timesteps

    def start(self, noise: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Pure noise."""
        return noise

    def noise_level(self, step: Step) -> float:
        """Share of noise in the latents before a step."""
        return step.now

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """`(1 - sigma) * clean + sigma * noise`."""
        return torch.lerp(clean, noise, self._sigma(times, clean))

    def target(self, clean: Tensor, noise: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The velocity, `noise - clean`."""
        return noise - clean

    def clean(self, output: Tensor, latents: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """`latents - sigma * output`."""
        latents = latents.float()
        return latents - self._sigma(times, latents) * output.float()

    def _sigma(self, times: Tensor, like: Tensor) -> Tensor:
        return _per_row(times / self.scheduler.config.num_train_timesteps, like)


@dataclass(frozen=True, eq=False)
class FlowSDE(_FlowPath):
    """Flow matching sampled with Flow-GRPO's marginal-preserving noise; `eta` is its noise level, typically 0.7.

    The flow `dx = v dt` runs from sigma = 1 to 0. The score of the distribution of its latents at level s is
    `-E[noise | x] / s = -(x + (1 - s) * v) / s`. Noise of strength g, compensated by `g^2 / 2` times the score, leaves
    every marginal as it was:

        dx = [v + g^2 / (2 s) * (x + (1 - s) * v)] dt + g dw,    g = eta * sqrt(s / (1 - s))

    One Euler-Maruyama step from s to s' has dt = s' - s < 0 and std = g * sqrt(s - s'). At s = 1, where g is infinite,
    the level of the next step replaces s in g, as in the published trainer. The last step, to s' = 0, adds no noise,
    which would stay in the image.

    Args:
        scheduler: A `diffusers.FlowMatchEulerDiscreteScheduler`; its shift and terminal settings are kept.
        mu: Its shift for this resolution, if it uses dynamic shifting.

    Example:
        >>> import diffusers, torch
        >>> process = FlowSDE(diffusers.FlowMatchEulerDiscreteScheduler())
        >>> latents = torch.zeros(1, 4, 8, 8)
        >>> [round(process.transition(latents, latents, step, eta=0.7).std, 2) for step in process.schedule(4)]
        [0.7, 0.57, 0.29, 0.0]

    References:
        Liu et al., Flow-GRPO: Training Flow Matching Models via Online RL, 2025, https://arxiv.org/abs/2505.05470
    """

    def transition(
        self, output: Tensor, latents: Tensor, step: Step, *, eta: float, anchor: Tensor | None = None
    ) -> Transition:
        """The step's Gaussian in fp32; `eta` = 0 is the scheduler's Euler step."""
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
        mu: Its shift for this resolution, if it uses dynamic shifting.

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

    def transition(
        self, output: Tensor, latents: Tensor, step: Step, *, eta: float, anchor: Tensor | None = None
    ) -> Transition:
        """The step's Gaussian in fp32; a ValueError if `eta` is outside [0, 1]."""
        if not 0 <= eta <= 1:
            raise ValueError(f"FlowCPS expected eta in [0, 1], got {eta}. 1 exchanges all noise already.")
        output, latents = output.float(), latents.float()
        clean = latents - step.now * output
        noise = latents + (1 - step.now) * output
        std = step.then * math.sin(eta * math.pi / 2)
        kept = step.then * math.cos(eta * math.pi / 2)
        return Transition((1 - step.then) * clean + kept * noise, std, clean)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """`values` `[N]` in the dtype and on the device of `like` `[N, ...]`, shaped to multiply its rows."""
    return values.to(like).view(-1, *([1] * (like.ndim - 1)))
