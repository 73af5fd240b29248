"""Small separable filters as sums of shifted slices: the same digits in any batch, and up to rounding on any device.

A convolution or a matrix product would be the usual way. Both obey process-wide switches (TF32, bfloat16, autocast)
that trainers turn on, and may sum in another order for another batch size. Slices do neither. On a CPU they are faster,
which benchmarks/bench_classical.py shows; on a GPU they are as fast for one plane and slower for RGB.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


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


def weighted_slices(maps: Tensor, taps: list[float], dim: int) -> Tensor:
    """Correlate one dimension with `taps`; it shrinks by `len(taps) - 1` because no border is made up."""
    length = maps.shape[dim] - len(taps) + 1
    result = maps.narrow(dim, 0, length) * taps[0]
    for offset, tap in enumerate(taps[1:], start=1):
        result.add_(maps.narrow(dim, offset, length), alpha=tap)
    return result


def blur_valid(maps: Tensor, taps: list[float]) -> Tensor:
    """Correlate the last two dimensions of `maps` `[..., H, W]` with `taps`; both shrink by `len(taps) - 1`."""
    return weighted_slices(weighted_slices(maps, taps, -2), taps, -1)


def halve(maps: Tensor, *, replicate: bool) -> Tensor:
    """Mean of each 2x2 block of `maps` `[..., H, W]`; an odd side gets one more line, a copy of its last or zeros.

    Args:
        maps: `[..., H, W]`.
        replicate: True copies (MATLAB `imfilter(..., 'symmetric')`), False adds zeros (MATLAB `conv2(..., 'same')`).

    Returns:
        `[..., ceil(H / 2), ceil(W / 2)]`.
    """
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
