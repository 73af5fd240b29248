"""What the reference loop needs of a restoration model, and what all models share."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from iqareward.diffusion.transition import Process

Condition = dict[str, Tensor]
"""What the network is told about the degraded images: named tensors whose first dimension is the batch."""


class Policy(Protocol):
    """A conditional diffusion model as something that acts; `PixelPolicy`, `ControlNetPolicy`, `FlowPolicy` are three.

    Any other model is one class with these members; `docs/how-to/own-policy.md` writes one.

    Attributes:
        model: the module that is trained. The trainer replaces it by its distributed wrapper, so always call
            `self.model`.
        process: how noise is added and taken away.

    Example:
        >>> import torch
        >>> from iqareward.diffusion.restorer import build_restorer
        >>> policy: Policy = build_restorer((8, 16))
        >>> policy.decode(policy.encode(torch.full((1, 3, 8, 8), 0.25))).unique()
        tensor([0.2500])
    """

    model: nn.Module

    @property
    def process(self) -> Process: ...

    def latent_shape(self, degraded: Tensor) -> tuple[int, ...]:
        """Shape of one row of latents for degraded images of this size."""
        ...

    def condition(self, degraded: Tensor) -> Condition:
        """What `predict` needs of the degraded images `[B, 3, H, W]` in [0, 1]; computed once per rollout."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Latents `[B, ...]` of clean images `[B, 3, H, W]` in [0, 1]."""
        ...

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The network's answer `[N, ...]` for `latents` `[N, ...]` at `times` `[N]`; with a gradient if enabled."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` of clean latents, in [0, 1] up to overshoots: clamping is the caller's."""
        ...

    def sft_loss(self, references: Tensor, condition: Condition, noise: Tensor, times: Tensor) -> Tensor:
        """The model's own supervised loss `[B]` for ground truth `[B, 3, H, W]` in [0, 1]."""
        ...


def denoising_loss(policy: Policy, clean: Tensor, condition: Condition, noise: Tensor, times: Tensor) -> Tensor:
    """Mean squared error of the network's answer, per row: the loss that diffusion models are trained with.

    Args:
        policy: the model.
        clean: `[B, ...]` latents of the ground truth.
        condition: of the same rows.
        noise: `[B, ...]` standard normal.
        times: `[B]` from `policy.process.draw_times`.

    Returns:
        `[B]` fp32.

    References:
        Ho, Jain, Abbeel, Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239
    """
    latents = policy.process.add_noise(clean, noise, times)
    target = policy.process.target(clean, noise, times)
    output = policy.predict(latents, times, condition)
    return (output.float() - target.float()).square().flatten(1).mean(1)


def select(condition: Condition, rows: Tensor | slice) -> Condition:
    """These rows of a condition.

    Example:
        >>> import torch
        >>> select({"pixels": torch.arange(4)}, slice(1, 3))
        {'pixels': tensor([1, 2])}
    """
    return {name: values[rows] for name, values in condition.items()}


def repeat(condition: Condition, group_size: int) -> Condition:
    """Each row `group_size` times in a row: one for each rollout of an input.

    Example:
        >>> import torch
        >>> repeat({"pixels": torch.arange(2)}, 2)
        {'pixels': tensor([0, 0, 1, 1])}
    """
    return {name: values.repeat_interleave(group_size, 0) for name, values in condition.items()}


def unwrapped(model: nn.Module) -> Any:
    """The model itself, out of `DistributedDataParallel`."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a network's weights, which its inputs need as well."""
    return next(module.parameters()).dtype


def add_lora(model: nn.Module, *, rank: int = 16, targets: str | list[str] = "all-linear") -> nn.Module:
    """The model with low-rank adapters, the only weights that train from here on (peft).

    Args:
        model: a network of diffusers or any other module.
        rank: rank of the adapters, also their alpha.
        targets: names of the layers that get one, or peft's "all-linear".

    Returns:
        A `peft.PeftModel`; with its adapters off it is the model from before, the reference policy for KL.

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


def adapters_off(model: nn.Module) -> AbstractContextManager[Any]:
    """Within it, a LoRA model answers as the model from before training.

    Raises:
        TypeError: the model has no adapters.
    """
    bare = unwrapped(model)
    if not hasattr(bare, "disable_adapter"):
        raise TypeError(
            f"adapters_off expected a model with LoRA adapters, got {type(bare).__name__}. "
            "Wrap it with add_lora(model) first, or train without KL."
        )
    return bare.disable_adapter()
