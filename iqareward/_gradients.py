"""Clamping, rounding and square roots with finite gradients in every release of torch, and layer checkpointing."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint


def clamp(values: Tensor, low: float, high: float) -> Tensor:
    """Clamp to [low, high] with gradient 1 on the closed interval and 0 outside.

    `torch.clamp` has changed its gradient at the bounds: it was 1 and is 0 in torch 2.15, which would stop learning at
    every black or white pixel. The choice made here does not depend on torch's.
    """
    clamped = values.clamp(low, high)
    if not differentiated(values):
        return clamped
    clamped = clamped.detach()
    return torch.where(values == clamped, values, clamped)  # NaN differs from itself: it stays NaN, with gradient 0


def straight_through(smooth: Tensor, exact: Tensor) -> Tensor:
    """The value of `exact` with the derivatives of `smooth`, which has to be finite."""
    if not differentiated(smooth):
        return exact
    # The bracket is exactly 0. torch.func, forward mode and the compiler all take this; no autograd.Function does.
    return exact.detach() + (smooth - smooth.detach())


def differentiated(values: Tensor) -> bool:
    """Whether derivatives may be taken; `requires_grad` does not say so inside `torch.vmap` or in forward mode."""
    return torch.is_grad_enabled() or forward_ad.unpack_dual(values).tangent is not None


def root(values: Tensor) -> Tensor:
    """Square root with gradient 0 instead of infinity at 0."""
    if not differentiated(values):
        return values.sqrt()
    zero = values == 0  # false for NaN, which must stay NaN
    return values.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


def checkpoint_layer(layer: Callable[..., Any], *inputs: Any) -> Any:
    """`layer(*inputs)`; if a backward pass can follow, only the inputs are kept and the layer is run again there."""
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        # No layer draws random numbers, so there is no generator state to save (which would wait for the device).
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return layer(*inputs)
