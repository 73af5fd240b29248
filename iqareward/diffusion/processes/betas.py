"""Processes of diffusers schedulers that are built from betas, sampled by DDIM with any eta."""

import copy
import inspect
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from iqareward._gradients import clamp
from iqareward.diffusion.processes.gaussian import Step, TabledProcess, posterior


@dataclass(frozen=True, eq=False)
class DDIM(TabledProcess):
    """The noise process of a diffusers scheduler with betas, sampled by DDIM with any eta.

    A step from x_t with alpha-bar a to alpha-bar a' (Song et al., equations 12 and 16), where the network's output
    stands for the noise e and the clean latents x0:

        std  = eta * sqrt((1 - a') / (1 - a)) * sqrt(1 - a / a')
        mean = sqrt(a') * clip(x0) + sqrt(1 - a' - std^2) * e

    At the last step a' = 1 (unless the scheduler says otherwise), so std = 0 and there is no log-probability.

    Times, noise levels and clipping are those of the scheduler's own steps, with the same number of steps:

    - `DDIMScheduler` and `PNDMScheduler` go from time t to t - T // n. That is not always the next time of the list,
      and with `timestep_spacing="linspace"` it is far from it: the network is then told another noise level than the
      latents have. Give a `DDPMScheduler.from_config(...)` of the same configuration for steps that agree.
    - `DDPMScheduler` goes to the next time of the list. `eta` = 1 is its step, the ancestral ("spaced") sampler of
      DiffBIR, StableSR and guided-diffusion.
    - `LCMScheduler` does so too. `eta` = 1 is its step, which replaces all noise.
    - Schedulers with sigmas (UniPC, DPM-Solver++, DEIS, Euler, Euler ancestral, LMS, ...) use these, whatever their
      spacing (karras, exponential, beta, final sigma). Their higher-order corrections are left out: a step must not
      depend on earlier ones. `eta` = 0 is the Euler step, `eta` = 1 that of Euler ancestral. Latents have variance 1
      as in DDIM, where the Euler schedulers divide them before the network sees them.

    Args:
        scheduler: The scheduler, for example `pipeline.scheduler`; it is not changed.

    Raises:
        ValueError: The scheduler has no betas, asks the network twice per step, thresholds dynamically, uses flow
            sigmas, continuous times or a learned variance, or is not known here.

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

    def __post_init__(self) -> None:
        scheduler = self.scheduler
        if "num_train_timesteps" not in scheduler.config or not hasattr(scheduler, "alphas_cumprod"):
            raise ValueError(
                f"DDIM expected a diffusers scheduler with betas, got {type(scheduler).__name__}. "
                "For flow matching use FlowSDE or FlowCPS."
            )
        refused = {
            "thresholding": self._own("thresholding") is True,
            "use_flow_sigmas": self._own("use_flow_sigmas") is True,
            "timestep_type='continuous'": self._own("timestep_type") == "continuous",
            f"variance_type={self._own('variance_type')!r}": "learned" in str(self._own("variance_type")),
            f"prediction_type={self.prediction_type!r}": self.prediction_type
            not in ("epsilon", "sample", "v_prediction"),
            f"order {scheduler.order}": scheduler.order != 1,
            "a class that is not known": not (self._is("DDIM", "PNDM", "DDPM", "LCM") or hasattr(scheduler, "sigmas")),
        }
        for what, found in refused.items():
            if found:
                raise ValueError(
                    f"DDIM expected a scheduler whose step is one Gaussian for one answer of the network, got "
                    f"{type(scheduler).__name__} with {what}. Set {what.partition('=')[0]} to another value "
                    "(thresholding=False; clip_sample=True is supported), or give a DDIMScheduler."
                )

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "DDIM":
        """The process of any diffusers scheduler that is built from betas, for example `pipeline.scheduler`."""
        return cls(scheduler)

    @property
    def prediction_type(self) -> str:
        return self.scheduler.config.prediction_type

    @property
    def table(self) -> Tensor:
        return self.scheduler.alphas_cumprod

    def schedule(self, num_steps: int, tokens: int | None = None) -> tuple[Step, ...]:
        """The scheduler's own timesteps and alpha-bars, from noise to sample."""
        scheduler: Any = copy.copy(self.scheduler)  # a pipeline may be in the middle of a schedule of its own
        if self._is("PNDM"):  # its steps are those of DDIM, with more of them at the beginning
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler

            scheduler = DDIMScheduler.from_config(scheduler.config)
        scheduler.set_timesteps(num_steps)
        times = scheduler.timesteps.tolist()
        if hasattr(scheduler, "sigmas"):
            levels = [1 / (1 + sigma**2) for sigma in scheduler.sigmas.tolist()]
            now, then = levels[:-1], levels[1:]
        else:
            table = scheduler.alphas_cumprod.tolist()
            now = [table[time] for time in times]
            then = [*now[1:], 1.0]
            if self._is("DDIM", "PNDM"):
                stride, final = scheduler.config.num_train_timesteps // num_steps, float(scheduler.final_alpha_cumprod)
                then = [table[time - stride] if time >= stride else final for time in times]
        if len(times) != num_steps or any(noisy > less for noisy, less in zip(now, then, strict=True)):
            raise ValueError(
                f"DDIM expected {num_steps} times from noise to image of {type(scheduler).__name__}, got {times}. "
                "Give a DDIMScheduler."
            )
        return tuple(Step(float(time), *levels) for time, *levels in zip(times, now, then, strict=True))

    def start(self, noise: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The noise, times the scheduler's `init_noise_sigma`; or the anchor with the noise of the last training time.

        Models that start from the degraded image (SeeSR, PASD, StableSR) do the latter.
        """
        if anchor is not None:
            signal, noise_level = self.coefficients(float(self.table[-1]))
            return signal * anchor.float() + noise_level * noise
        return self._initial_noise * noise

    def coefficients(self, level: Any) -> tuple[Any, Any]:
        """`sqrt(a)` and `sqrt(1 - a)`."""
        return level**0.5, (1 - level) ** 0.5

    def renewal(self, step: Step, eta: float) -> tuple[float, float]:
        carried = 0.0 if self._is("LCM") else math.sqrt(step.now / step.then)
        return posterior(math.sqrt(1 - step.now), math.sqrt(1 - step.then), carried, eta)

    def _bounded(
        self, clean: Tensor, noise: Tensor, latents: Tensor, signal: float, noise_level: float
    ) -> tuple[Tensor, Tensor]:
        if self._clip_range is None:
            return clean, noise
        clean = clamp(clean, -self._clip_range, self._clip_range)
        # DDPM's mean is made of the clipped latents and x_t; DDIM's of the clipped latents and the predicted noise.
        return clean, (latents - signal * clean) / noise_level if self._is("DDPM") else noise

    def _own(self, name: str) -> Any:
        """A setting of the scheduler's class; configurations also hold those of the scheduler they were made from."""
        known = inspect.signature(type(self.scheduler).__init__).parameters
        return self.scheduler.config[name] if name in known else None

    def _is(self, *names: str) -> bool:
        return not self._family.isdisjoint(names)

    @cached_property
    def _family(self) -> frozenset[str]:
        names = (base.__name__ for base in type(self.scheduler).__mro__)
        return frozenset(name.removesuffix("Scheduler").removesuffix("Parallel") for name in names)

    @cached_property
    def _clip_range(self) -> float | None:
        return self._own("clip_sample_range") if self._own("clip_sample") else None

    @cached_property
    def _initial_noise(self) -> float:
        sigma = float(self.scheduler.init_noise_sigma)
        # Euler's latents are divided by sqrt(1 + sigma^2) before the network sees them; here, from the start.
        return sigma if sigma == 1 else sigma / math.sqrt(1 + float(self.scheduler.sigmas.max()) ** 2)
