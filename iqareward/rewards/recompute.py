"""Run a layer as it is, or recompute it in the backward pass, which trades time for memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

RunLayer = Callable[..., Any]  # (layer, *inputs) -> what the layer returns


def run_layer(layer: Callable[..., Any], *inputs: Any) -> Any:
    """`layer(*inputs)`; if a backward pass can follow, keep only the inputs and recompute the rest then."""
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
        # No layer draws random numbers, so there is no generator state to save (which would wait for the device).
        return checkpoint(layer, *inputs, use_reentrant=False, preserve_rng_state=False)
    return layer(*inputs)
