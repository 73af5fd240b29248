"""The interface between the trainer and a restoration model, and a base class for diffusion models of your own."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition, concatenated
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.processes import NoiseProcess, Step, Transition
from iqareward.diffusion.sharding import is_sharded, local, reshard, sharded_like, share_of


class Policy(Protocol):
    """A restoration model as the trainer uses it; `DiffusionPolicy` and `FeedForwardPolicy` give most of it.

    A step keeps nothing in the policy: the trainer repeats steps for parts of a batch, to replay them and to
    differentiate through them.

    Attributes:
        model: All that trains; called as `self.model`, because it is exchanged while older weights are asked.
        num_steps: Steps of the sampler that the model ships with.
        eta: Noise of each of its steps; 0 is deterministic after the first noise.
        exploration: Noise of each step in rollouts, where they must differ.

    Example:
        >>> import torch
        >>> from iqareward.diffusion import Batch, Noise, build_restorer
        >>> policy: Policy = build_restorer((8, 16))
        >>> condition = policy.condition(Batch((3,), torch.rand(1, 3, 8, 8)), Noise((3,)))
        >>> latents = policy.start(condition, Noise((3,)))
        >>> policy.step(latents, policy.schedule(condition, 5)[0], condition, eta=1.0).mean.shape
        torch.Size([1, 3, 8, 8])
    """

    model: nn.Module
    num_steps: int
    eta: float
    exploration: float

    def to(self, device: torch.device | str) -> Self:
        """Move the model and every frozen part."""
        ...

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """What the steps need to know of the inputs, one row each; computed once per input."""
        ...

    def schedule(self, condition: Condition, num_steps: int) -> Sequence[Step]:
        """The steps of the sampler; what they are may depend on the size of the inputs."""
        ...

    def start(self, condition: Condition, noise: Noise) -> Tensor:
        """Latents `[N, ...]` before the first step."""
        ...

    def step(self, latents: Tensor, step: Step, condition: Condition, *, eta: float) -> Transition:
        """The Gaussian that the next latents are drawn from; with a gradient if enabled."""
        ...

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Images `[N, 3, H, W]` in the size of the references, in [0, 1] up to overshoots; the caller clamps."""
        ...

    def sft_loss(self, references: Tensor, condition: Condition, noise: Noise) -> Tensor:
        """The model's own supervised loss `[B]` for references `[B, 3, H, W]` in [0, 1]."""
        ...

    def reconstruct(self, references: Tensor, condition: Condition) -> Tensor:
        """The references as the model can reach them at best: encoded and decoded."""
        ...


class Parts:
    """Moves what a policy consists of."""

    model: nn.Module

    def to(self, device: torch.device | str) -> Self:
        """Move the model and every frozen part: modules, tensors and objects with `to` among the attributes."""
        for name, value in vars(self).items():
            if isinstance(value, nn.Module):
                value.to(device)
            elif isinstance(value, Tensor) or (hasattr(value, "to") and not isinstance(value, type)):
                setattr(self, name, value.to(device))
        return self


class Noised(NamedTuple):
    """Noisy latents to learn from.

    Attributes:
        latents: `[N, ...]`.
        times: `[N]`, what the network is told.
        target: `[N, ...]`, what it should answer.
    """

    latents: Tensor
    times: Tensor
    target: Tensor


class DiffusionPolicy(Parts, ABC):
    """A conditional diffusion model: write `condition`, `encode`, `predict` and `decode`, the rest follows.

    Attributes:
        model: All that trains.
        process: How noise is added and taken away.
        num_steps: Steps of the sampler that the model ships with.
        eta: Noise of each of its steps, as the process takes it.
        exploration: Noise of each step in rollouts.
        guidance_scale: Scale of classifier-free guidance in sampling; 1 is none. Supervised losses never use it.

    Example:
        >>> import diffusers, torch
        >>> from iqareward.diffusion import DDIM
        >>> class SuperResolution(DiffusionPolicy):
        ...     def __init__(self, unet):
        ...         self.model, self.process = unet, DDIM(diffusers.DDIMScheduler())
        ...     def condition(self, batch, noise):
        ...         return {"latents": 2 * torch.nn.functional.interpolate(batch.degraded, scale_factor=4) - 1}
        ...     def encode(self, images, condition):
        ...         return 2 * images - 1
        ...     def predict(self, latents, times, condition):
        ...         return self.model(torch.cat([latents, condition["latents"]], 1), times).sample
        ...     def decode(self, latents, condition):
        ...         return (latents + 1) / 2
    """

    model: nn.Module
    process: NoiseProcess
    num_steps: int = 50
    eta: float = 0.0
    exploration: float = 1.0
    guidance_scale: float = 1.0

    @abstractmethod
    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """What `predict` needs of the inputs, one row each; under "latents" what has the shape of the latents."""

    @abstractmethod
    def encode(self, images: Tensor, condition: Condition) -> Tensor:
        """Latents `[B, ...]` of clean images `[B, 3, H, W]` in [0, 1]."""

    @abstractmethod
    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The network's output `[N, ...]` for `latents` `[N, ...]` at `times` `[N]`; with a gradient if enabled."""

    @abstractmethod
    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Images `[N, 3, H, W]` of clean latents, in [0, 1] up to overshoots."""

    def unconditional(self, condition: Condition) -> Condition:
        """The condition that guidance leads away from, for instance with the negative prompt."""
        raise ValueError(
            f"{type(self).__name__} expected guidance_scale=1, because it has no method `unconditional`, got "
            f"{self.guidance_scale:g}. Write that method, or set the scale to 1."
        )

    def anchor(self, condition: Condition) -> Tensor | None:
        """Latents of the degraded images, for processes that end there instead of in pure noise."""
        return None

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        """Shape of one row of latents: that of the condition's "latents"."""
        return tuple(condition["latents"].shape[1:])

    def schedule(self, condition: Condition, num_steps: int) -> Sequence[Step]:
        """The steps of the process."""
        return self.process.schedule(num_steps)

    def start(self, condition: Condition, noise: Noise) -> Tensor:
        """The noisy end of the process."""
        return self.process.start(noise("start", self.latent_shape(condition)), anchor=self.anchor(condition))

    def guided(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The output that sampling follows: guided, if `guidance_scale` is not 1."""
        if self.guidance_scale == 1:
            return self.predict(latents, times, condition)
        both = concatenated(self.unconditional(condition), condition)
        without, given = self.predict(latents.repeat(2, *[1] * (latents.ndim - 1)), times.repeat(2), both).chunk(2)
        return without + self.guidance_scale * (given - without)

    def step(self, latents: Tensor, step: Step, condition: Condition, *, eta: float) -> Transition:
        """The step of the process for the guided output."""
        times = torch.full((latents.shape[0],), step.time, device=latents.device)
        output = self.guided(latents, times, condition)
        return self.process.transition(output, latents, step, eta=eta, anchor=self.anchor(condition))

    def noised(self, clean: Tensor, condition: Condition, noise: Noise) -> Noised:
        """What the network learns from: clean latents with noise, at random times."""
        anchor, fresh = self.anchor(condition), noise("noise", clean.shape[1:])
        times = self.process.draw_times(noise.uniform("times"))
        latents = self.process.add_noise(clean, fresh, times, anchor=anchor)
        return Noised(latents, times, self.process.target(clean, fresh, times, anchor=anchor))

    def sft_loss(self, references: Tensor, condition: Condition, noise: Noise) -> Tensor:
        """The denoising loss."""
        return denoising_loss(self, self.encode(references, condition), condition, noise)

    def reconstruct(self, references: Tensor, condition: Condition) -> Tensor:
        """The references, encoded and decoded."""
        return self.decode(self.encode(references, condition), condition)


def denoising_loss(policy: DiffusionPolicy, clean: Tensor, condition: Condition, noise: Noise) -> Tensor:
    """Mean squared error of the network's output per row: the loss that diffusion models are trained with.

    Args:
        policy: The model; its plain output, without guidance.
        clean: `[B, ...]` latents of the references.
        condition: The result of `policy.condition` for the same inputs.
        noise: Draws times and noise.

    Returns:
        `[B]` fp32.

    Example:
        >>> from iqareward.diffusion import Batch, build_restorer
        >>> policy, batch, noise = build_restorer((8, 16)), Batch((0, 1), torch.rand(2, 3, 8, 8)), Noise((0, 1))
        >>> condition = policy.condition(batch, noise)
        >>> denoising_loss(policy, policy.encode(batch.degraded, condition), condition, noise).shape
        torch.Size([2])

    References:
        Ho, Jain, Abbeel, Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239
    """
    latents, times, target = policy.noised(clean, condition, noise)
    output = policy.predict(latents, times, condition)
    return (output.float() - target.float()).square().flatten(1).mean(1)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a network's first floating-point weight."""
    return next(weight.dtype for weight in module.parameters() if weight.is_floating_point())


class TrainedTogether(nn.ModuleDict):
    """Modules that train together as one `model`, each called by its name.

    A distributed wrapper around it sees every call, as it would not if the modules were called themselves.

    Example:
        >>> model = TrainedTogether({"first": nn.Linear(4, 2), "second": nn.Linear(2, 3)})
        >>> model("second", model("first", torch.zeros(1, 4))).shape
        torch.Size([1, 3])
    """

    def forward(self, name: str, *inputs: Any, **options: Any) -> Any:
        """What the module of this name answers."""
        return self[name](*inputs, **options)


@contextmanager
def evaluating(policy: Policy) -> Generator[None]:
    """Within this context dropout and drop path of the model are off, so that a step repeats itself."""
    training = policy.model.training
    policy.model.eval()
    try:
        yield
    finally:
        policy.model.train(training)


def add_lora(model: nn.Module, *, rank: int = 16, targets: str | list[str] = "all-linear") -> nn.Module:
    """Add low-rank adapters with peft; they are the only weights that train from here on.

    Args:
        model: A network of diffusers or any other module.
        rank: Rank of the adapters, also their alpha.
        targets: Names of the layers that get one, or peft's "all-linear".

    Returns:
        A `peft.PeftModel`, which answers as the model did until its adapters are trained.

    Example:
        >>> model = add_lora(nn.Sequential(nn.Linear(100, 100)), rank=2, targets=["0"])
        >>> sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
        400

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, https://arxiv.org/abs/2106.09685
    """
    from peft import LoraConfig, PeftModel

    # Not `get_peft_model`: for "all-linear" it looks for a configuration that only transformers models have.
    return PeftModel(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian"))  # pyright: ignore[reportArgumentType]


class Versions:
    """A policy's weights from before RL and from a moment ago, to compare its answers with.

    Args:
        policy: The model as it is now.
        reference: Keep the weights from before RL; of a LoRA model, its adapters, which SFT may have trained.
        old: Keep the weights of the policy that samples.

    Example:
        >>> from iqareward.diffusion import build_restorer
        >>> policy = build_restorer((8, 16))
        >>> versions = Versions(policy, reference=True)
        >>> with versions.reference():
        ...     torch.is_grad_enabled()
        False
    """

    def __init__(self, policy: Policy, *, reference: bool = False, old: bool = False) -> None:
        self.policy = policy
        self._reference = self._copy() if reference else None
        self._old = self._copy() if old else None

    def _copy(self, values: Sequence[Tensor] | None = None) -> list[Tensor]:
        own = self._weights()
        pairs = zip(own, own if values is None else values, strict=True)
        return [share_of(value, weight).to(local(weight), copy=True) for weight, value in pairs]

    def _weights(self) -> list[Tensor]:
        reshard(self.policy.model)
        return [weight for weight in self.policy.model.parameters() if weight.requires_grad]

    @contextmanager
    def reference(self) -> Generator[None]:
        """Within this context the policy acts as before RL, without a gradient."""
        if self._reference is None:
            raise ValueError("Versions expected reference=True, to know the weights from before RL.")
        with torch.no_grad(), self._swapped(self._reference):
            yield

    @contextmanager
    def old(self) -> Generator[None]:
        """Within this context the policy acts as the one that samples, without a gradient."""
        if self._old is None:
            raise ValueError("Versions expected old=True, to know the weights of the policy that samples.")
        with torch.no_grad(), self._swapped(self._old):
            yield

    @contextmanager
    def sampling(self) -> Generator[None]:
        """Within this context the policy samples: with its old weights if they are kept, else as it is."""
        if self._old is None:
            yield
            return
        with self.old():
            yield

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """Move the old weights to `decay * old + (1 - decay) * now`."""
        if self._old is not None:
            for old, now in zip(self._old, self._weights(), strict=True):
                old.lerp_(local(now).to(old.dtype), 1 - decay)

    @contextmanager
    def _swapped(self, others: list[Tensor]) -> Generator[None]:
        weights = self._weights()
        if is_sharded(self.policy.model):
            with self._copied(weights, others):
                yield
            return
        # The storages change places, nothing is copied: graphs that were recorded before keep their tensors.
        own = [weight.data for weight in weights]
        for weight, other in zip(weights, others, strict=True):
            weight.data = other
        try:
            yield
        finally:
            for weight, data in zip(weights, own, strict=True):
                weight.data = data

    @contextmanager
    def _copied(self, weights: Sequence[Tensor], others: Sequence[Tensor]) -> Generator[None]:
        # FSDP gathers from storages of its own, whatever the parameters point to
        shares = [local(weight) for weight in weights]
        own = [share.clone() for share in shares]
        for share, other in zip(shares, others, strict=True):
            share.copy_(other)
        try:
            yield
        finally:
            reshard(self.policy.model)  # what a pass has gathered is of the others
            for share, before in zip(shares, own, strict=True):
                share.copy_(before)

    def state_dict(self) -> dict[str, Any]:
        """The weights that are kept."""
        pairs = {"reference": self._reference, "old": self._old}
        return {
            name: kept and [sharded_like(share, weight) for share, weight in zip(kept, self._weights(), strict=True)]
            for name, kept in pairs.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict()` was taken; without old weights there, those of now become old."""
        # new tensors, because a state that was taken before has the present ones
        if self._reference is not None and state["reference"] is not None:
            self._reference = self._copy(state["reference"])
        if self._old is not None:
            self._old = self._copy(state["old"])


def frozen(module: Any) -> Any:
    """A module that does not train, in eval mode."""
    return module.requires_grad_(False).eval()


def trainable(module: Any, *, lora_rank: int | None, lora_targets: str | list[str] = "all-linear") -> nn.Module:
    """A module that trains: LoRA adapters of this rank, or all of its weights, in float32, if there is no rank.

    Steps of a usual learning rate are lost in the rounding of weights in bfloat16; adapters are in float32 anyway.
    """
    if lora_rank is None:
        return module.float().requires_grad_(True)
    return add_lora(module, rank=lora_rank, targets=lora_targets)
