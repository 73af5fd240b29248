"""Run a per-image formula in pieces that stay in the CPU's cache."""

from collections.abc import Callable

import torch
from torch import Tensor

# Intermediates of one piece should fit in a core's L2 cache. Measured by benchmarks/bench_classical.py: at 32 x 512 x 512
# one call over the whole batch is 2-4 times slower per image than pieces of this size.
CPU_PIXELS_PER_CHUNK = 256 * 256


def map_chunks(formula: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """Apply `formula(*pieces) -> [b]` to consecutive pieces of the batches and concatenate; one call on other devices.

    Args:
        formula: treats images independently of each other.
        batches: tensors `[B, C, H, W]` with one shape for H, W.
    """
    first = batches[0]
    size = max(1, CPU_PIXELS_PER_CHUNK // max(1, first.shape[2] * first.shape[3]))
    if first.device.type != "cpu" or first.shape[0] <= size:
        return formula(*batches)
    pieces = zip(*(batch.split(size) for batch in batches), strict=True)
    return torch.cat([formula(*piece) for piece in pieces])
