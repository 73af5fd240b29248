"""Clamping, rounding and square roots whose gradients are finite and the same in every release of torch."""

from typing import Any

import torch
from torch import Tensor


def clamp(values: Tensor, low: float, high: float) -> Tensor:
    """Clamp to [low, high] with gradient 1 on the closed interval and 0 outside.

    `torch.clamp` has changed its gradient at the bounds: it was 1 and is 0 in torch 2.15, which would stop learning at
    every black or white pixel. The choice made here does not depend on torch's.
    """
    clamped = values.clamp(low, high)
    if not (torch.is_grad_enabled() and values.requires_grad):
        return clamped
    clamped = clamped.detach()
    return torch.where(values == clamped, values, clamped)  # NaN differs from itself: it stays NaN, with gradient 0


def straight_through(smooth: Tensor, exact: Tensor) -> Tensor:
    """The value of `exact` with the gradient of `smooth`."""
    return _StraightThrough.apply(smooth, exact)  # pyright: ignore[reportReturnType]


def root(values: Tensor) -> Tensor:
    """Square root with gradient 0 instead of infinity at 0."""
    zero = values == 0  # false for NaN, which must stay NaN
    return values.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
