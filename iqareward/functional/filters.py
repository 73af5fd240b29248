"""Small separable filters: the same digits in any batch, and up to rounding on any device.

A convolution or a matrix product would be the usual way. Both obey process-wide switches (TF32, bfloat16, autocast)
that trainers turn on, and may sum in another order for another batch size. Sums of shifted slices, in which tap after
tap is added, do neither. On a CPU they are faster too, which benchmarks/bench_classical.py shows; on a GPU one kernel
adds all taps in a single pass over memory.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from iqareward.functional._fused import correlate, on_gpu


def gaussian_taps(size: int, sigma: float) -> list[float]:
    """`size` samples of a centred Gaussian that sum to 1, in double precision.

    Example:
        >>> [round(tap, 4) for tap in gaussian_taps(3, 1.0)]
        [0.2741, 0.4519, 0.2741]
    """
    if size < 1 or sigma <= 0:
        raise ValueError(f"expected `window_size` >= 1 and `sigma` > 0, got {size} and {sigma}.")
    taps = [math.exp(-((index - (size - 1) / 2) ** 2) / (2 * sigma**2)) for index in range(size)]
    total = math.fsum(taps)
    return [tap / total for tap in taps]


def blur_valid(maps: Tensor, taps: Sequence[float]) -> Tensor:
    """Correlate the last two dimensions of `maps` `[..., H, W]` with `taps`; both shrink by `len(taps) - 1`."""
    return correlate(correlate(maps, taps, is_vertical=True), taps, is_vertical=False)


def halve(maps: Tensor, *, replicate: bool) -> Tensor:
    """Mean of each 2x2 block of `maps` `[..., H, W]`; an odd side gets one more line, a copy of its last or zeros.

    `replicate=True` copies as MATLAB's `imfilter(..., 'symmetric')`, False adds zeros as `conv2(..., 'same')`.
    """
    if on_gpu(maps):  # one kernel instead of three to seven; on a CPU a pool is slower than slices
        # a block's mean without the missing line is that with a copy of its last; with zeros, the sum is a quarter
        return F.avg_pool2d(maps, 2, ceil_mode=True, divisor_override=None if replicate else 4, count_include_pad=False)
    for dim in (-2, -1):
        if maps.shape[dim] % 2:
            last = maps.narrow(dim, -1, 1)
            maps = torch.cat((maps, last if replicate else torch.zeros_like(last)), dim)
    rows = maps[..., 0::2, :] + maps[..., 1::2, :]
    return (rows[..., 0::2] + rows[..., 1::2]).mul_(0.25)


def pad_zeros(maps: Tensor, before: int, after: int) -> Tensor:
    """Add `before` and `after` zeros to both of the last two dimensions."""
    return F.pad(maps, (before, after, before, after))


def mean_of_map(maps: Tensor) -> Tensor:
    """Mean over all but the first dimension of `[B, ..., H, W]`: `[B]`.

    Rows first: torch splits one long sum between threads and a batch of sums differently, and an image's score must not
    depend on its batch in the last digit.
    """
    return maps.mean(-1).flatten(1).mean(-1)
