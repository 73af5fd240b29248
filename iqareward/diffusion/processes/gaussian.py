"""The base class of noise processes, and the Gaussian of a denoising step."""

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor


class Step(NamedTuple):
    """One step of a sampling schedule, in plain numbers, so that nothing waits for a device.

    Attributes:
        time: What the network is told.
        now: Noise level of the latents before the step, on the scale of the process: alpha-bar for DDIM, sigma for
            flow matching, eta for ResShift, exp(-b) for IR-SDE.
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


class NoiseProcess(ABC):
    """How noise is added to clean latents and taken away again, by a sampler whose steps are Gaussian.

    At each noise level, latents are a mixture of the clean latents, noise, and in some processes an anchor: the latents
    of the degraded image:

        latents = a * clean + s * noise + (1 - a) * anchor

    A step from level (a, s) to (a', s') keeps part of the noise that the network sees and replaces the rest by fresh
    noise:

        mean = a' * clean + kept * noise + (1 - a') * anchor

    and adds fresh noise of standard deviation `std`. So a process is defined by `schedule`, `levels`, `coefficients`
    and `renewal`; the rest is here. Write a subclass for a process that this package lacks.

    Times `[N]` are what the network is told; `schedule` gives them as plain numbers, so nothing waits for the device.
    Latents, noise and anchors are `[N, ...]`; an `anchor` is ignored where `anchored` is False, except by `start`.

    Attributes:
        prediction_type: What the network predicts: `"epsilon"`, `"sample"`, `"v_prediction"`, `"score"` (that is,
            -noise / s) or `"velocity"` (noise - clean, as in flow matching).
        anchored: Whether the noisy end is an anchor with noise, so that an `anchor` has to be given.

    Example:
        >>> import diffusers
        >>> from iqareward.diffusion import DDIM
        >>> process: NoiseProcess = DDIM(diffusers.DDIMScheduler())
        >>> process.add_noise(torch.ones(1, 3, 8, 8), torch.zeros(1, 3, 8, 8), torch.tensor([999])).max() < 0.1
        tensor(True)
    """

    anchored: ClassVar[bool] = False

    @property
    @abstractmethod
    def prediction_type(self) -> str: ...

    @abstractmethod
    def schedule(self, num_steps: int, tokens: int | None = None) -> tuple[Step, ...]:
        """The steps from noise to the sample.

        Args:
            num_steps: How many times the network is asked.
            tokens: Length of the latents as a sequence, for models whose noise levels depend on the resolution; other
                processes ignore it.
        """

    @abstractmethod
    def draw_times(self, uniforms: Tensor) -> Tensor:
        """Random training times `[N]` from uniform numbers `[N]` in [0, 1), on their device."""

    @abstractmethod
    def start(self, noise: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The latents before the first step, from standard normal noise."""

    @abstractmethod
    def levels(self, times: Tensor) -> Tensor:
        """The noise levels `[N]` at `times` `[N]`, on the scale of `Step.now`."""

    @abstractmethod
    def coefficients(self, level: Any) -> tuple[Any, Any]:
        """The shares `a` of the clean latents and `s` of the noise at a level, which is a float or a tensor."""

    @abstractmethod
    def renewal(self, step: Step, eta: float) -> tuple[float, float]:
        """`std` of the noise that a step adds and `kept`, the share of the noise that is already there."""

    def scale_input(self, latents: Tensor, times: Tensor) -> Tensor:
        """What the network sees of the latents; they themselves for most processes."""
        return latents

    def noise_level(self, step: Step) -> float:
        """Share of noise in the latents before a step, in [0, 1]; near 0, the step hardly changes the image."""
        signal, noise = self.coefficients(step.now)
        return noise / math.hypot(signal, noise)

    def transition(
        self, output: Tensor, latents: Tensor, step: Step, *, eta: float, anchor: Tensor | None = None
    ) -> Transition:
        """The step's Gaussian in fp32, from the network's `output` for `latents`; `eta` = 0 is deterministic."""
        signal, noise_level = self.coefficients(step.now)
        latents = latents.float() - self._offset(signal, anchor)
        clean, noise = self._split(output.float(), latents, signal, noise_level)
        clean, noise = self._bounded(clean, noise, latents, signal, noise_level)
        std, kept = self.renewal(step, eta)
        signal = self.coefficients(step.then)[0]
        return Transition(signal * clean + kept * noise + self._offset(signal, anchor), std, clean)

    def add_noise(self, clean: Tensor, noise: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """Latents at `times` `[N]`: `a * clean + s * noise + (1 - a) * anchor`."""
        signal, noise_level = self._rows(times, clean)
        return signal * clean + noise_level * noise + self._offset(signal, anchor)

    def target(self, clean: Tensor, noise: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The correct network output for `add_noise(clean, noise, times, anchor)`."""
        of_clean, of_noise = self._mixture(*self._rows(times, clean))
        return of_clean * clean + of_noise * noise

    def clean(self, output: Tensor, latents: Tensor, times: Tensor, anchor: Tensor | None = None) -> Tensor:
        """The noise-free latents that an output of the network stands for, in fp32 and not clipped."""
        latents = latents.float()
        signal, noise_level = self._rows(times, latents)
        return self._split(output.float(), latents - self._offset(signal, anchor), signal, noise_level)[0]

    def _mixture(self, signal: Any, noise_level: Any) -> tuple[Any, Any]:
        """The shares of the clean latents and of the noise in the network's output."""
        match self.prediction_type:
            case "epsilon":
                return 0.0, 1.0
            case "sample":
                return 1.0, 0.0
            case "v_prediction":
                return -noise_level, signal
            case "score":
                return 0.0, -1 / noise_level
            case "velocity":
                return -1.0, 1.0
            case other:
                raise ValueError(
                    f"{type(self).__name__} expected a prediction_type of 'epsilon', 'sample', 'v_prediction', "
                    f"'score' or 'velocity', got {other!r}."
                )

    def _split(self, output: Tensor, latents: Tensor, signal: Any, noise_level: Any) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise: two unknowns, of which output and latents are two mixtures."""
        of_clean, of_noise = self._mixture(signal, noise_level)
        det = signal * of_noise - noise_level * of_clean
        clean = (of_noise / det) * latents - (noise_level / det) * output
        return clean, (signal / det) * output - (of_clean / det) * latents

    def _bounded(
        self, clean: Tensor, noise: Tensor, latents: Tensor, signal: float, noise_level: float
    ) -> tuple[Tensor, Tensor]:
        """Clean latents and noise after clipping, in processes that clip."""
        return clean, noise

    def _offset(self, signal: Any, anchor: Tensor | None) -> Any:
        if not self.anchored:
            return 0.0
        if anchor is None:
            raise ValueError(
                f"{type(self).__name__} expected an anchor, the latents of the degraded image at the size of the "
                "result, got None. Let `anchor(condition)` of the policy return them."
            )
        return (1 - signal) * anchor.float()

    def _rows(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficients at `times` `[N]`, shaped to multiply the rows of `like` `[N, ...]`."""
        levels = self.levels(times).to(like.device).view(-1, *([1] * (like.ndim - 1)))
        signal, noise_level = self.coefficients(levels)
        return signal.to(like.dtype), noise_level.to(like.dtype)


class TabledProcess(NoiseProcess):
    """A process whose training times are the integers from `first_time` on, with a table of noise levels."""

    first_time: ClassVar[int] = 0

    @property
    @abstractmethod
    def table(self) -> Tensor:
        """Noise levels at the times `first_time`, `first_time` + 1, ..., on the CPU."""

    @cached_property
    def _tables(self) -> dict[torch.device, Tensor]:
        return {}  # copied to each device once: a copy in every call would make the host wait

    def levels(self, times: Tensor) -> Tensor:
        if times.device not in self._tables:
            self._tables[times.device] = self.table.float().to(times.device)
        return self._tables[times.device][times.long() - self.first_time]

    def draw_times(self, uniforms: Tensor) -> Tensor:
        """Uniform integers `[N]`, int64."""
        count = len(self.table)
        # the product is rounded, and may be `count` itself
        return (uniforms * count).long().clamp(max=count - 1) + self.first_time


def posterior(noise_now: float, noise_then: float, carried: float, eta: float) -> tuple[float, float]:
    """`std` and `kept` of a step that draws from the posterior of a Markov chain, with `eta` times its noise.

    The chain multiplies what it has by `carried` before it adds noise. Given the clean latents, the noise part of the
    less noisy latents has the variance `s'^2 * (1 - (carried * s' / s)^2)`.
    """
    std = eta * noise_then * math.sqrt(max(1 - (carried * noise_then / noise_now) ** 2, 0.0))
    return std, math.sqrt(max(noise_then**2 - std**2, 0.0))
