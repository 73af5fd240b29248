"""Bicubic resizing that returns what Pillow returns, on any device, batched and differentiable."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iqareward._gradients import clamp, differentiated, straight_through
from iqareward.functional._checks import check_images
from iqareward.functional._chunks import free_threads, map_chunks

_CUBIC_A = -0.5  # Pillow's bicubic kernel: Keys' a
_CUBIC_SUPPORT = 2.0
_COEFFICIENT_BITS = 22  # Pillow stores kernel weights as integers in units of 2**-22
_BASE = 1 << 8
# Three signed 8-bit digits hold a 22-bit coefficient. Pixel times digit is exact in every matmul mode (float32, TF32,
# bf16 passes), and sums over up to 512 taps stay below 2**24, where float32 still counts every integer.
_NUM_DIGITS = 3
UNIT = 2**_COEFFICIENT_BITS // _BASE ** (_NUM_DIGITS - 1)  # a grey level, in units of the most significant digit
_MAX_SHRINK = 127
# The kernel is a narrow band of the matrix, so a dense product would mostly multiply zeros: each product makes as many
# output columns as read about this many input columns, within limits that keep it worth a call.
_BAND_INPUTS = 64
_BAND_COLUMNS = (8, 64)


class _Band(NamedTuple):
    """Weights of consecutive output columns, which read input columns `start:stop` only."""

    start: int
    stop: int
    digits: Tensor  # [stop - start, NUM_DIGITS * columns], most significant digit first, in units of the one before
    weights: Tensor  # [stop - start, columns], the same coefficients as plain numbers, for the gradient


def pillow_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """What `PIL.Image.resize(size, Image.Resampling.BICUBIC)` gives for the 8-bit version of each image, bit for bit.

    Pillow filters rows, rounds and clips to 8 bits, then filters columns and rounds again (or columns first, where
    that is cheaper); the difference from a float resize reaches tens of grey levels at sharp edges. Rounding passes
    gradients straight through; clipping stops them where it changes a level.

    Args:
        images: `[B, 3, H, W]` in [0, 1]; rounded to 8 bits first.
        size: (height, width) of the result.

    Returns:
        `[B, 3, height, width]` in [0, 1], multiples of 1/255.

    Raises:
        ValueError: wrong shape of `images`, a side of `size` is not positive, or a side shrinks more than 127 fold.

    Example:
        >>> pillow_resize(torch.full((1, 3, 10, 20), 0.5), (4, 5)).shape
        torch.Size([1, 3, 4, 5])

    References:
        Keys, "Cubic Convolution Interpolation for Digital Image Processing", 1981,
        https://doi.org/10.1109/TASSP.1981.1163711
    """
    images = check_images("pillow_resize", images)
    largest = [max(sides) for sides in zip(images.shape[2:], size, strict=True)]
    return map_chunks(lambda rows: resize_levels(to_levels(rows), size) / 255, images, size=largest)


def smooth_resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bicubic of any numbers `[B, C, H, W]`, without rounding or clipping: torch's, up to its rounding.

    Unlike `torch.nn.functional.interpolate` it has no largest factor on a GPU, and gradients that do not vary.
    """
    for side in reversed(size):
        if images.shape[-1] != side:
            images = _smooth(images, _bands(images.shape[-1], side, 0, side, images.dtype, images.device))
        images = images.mT
    return images


def to_levels(images: Tensor) -> Tensor:
    """8-bit levels 0..255, as floats, of images in [0, 1]: rounded, not truncated, with a straight-through gradient."""
    if not differentiated(images):
        return (images * 255).clamp_(0, 255).round_()
    scaled = clamp(images * 255, 0, 255)
    return straight_through(scaled, scaled.detach().round())


def resize_levels(levels: Tensor, size: tuple[int, int], *, middle: int | None = None) -> Tensor:
    """`pillow_resize` for integer levels 0..255 held as floats `[B, C, H, W]`; returns the same.

    Args:
        levels: The images.
        size: (height, width) of the result.
        middle: Compute only the middle of the result, of this side at most; the rest takes no time and no memory.
    """
    if min(size) < 1:
        raise ValueError(f"pillow_resize expected a positive (height, width), got {size}.")
    height, width = size
    lost_rows, lost_columns = levels.shape[-2] - height, levels.shape[-1] - width
    with torch.autocast(levels.device.type, enabled=False), free_threads(levels.device):
        # Pillow 13's rule, found by comparing both orders with its output; earlier releases always filter rows first.
        # The order shows only through the rounding in between, and squares are resized the same way by every release.
        if lost_rows > max(0, 2 * lost_columns):
            levels = _resize_last(levels.mT, height, middle).mT
            return _resize_last(levels, width, middle)
        levels = _resize_last(levels, width, middle)
        return _resize_last(levels.mT, height, middle).mT


def _resize_last(levels: Tensor, out_size: int, middle: int | None) -> Tensor:
    first = 0 if middle is None else max(0, (out_size - middle) // 2)
    stop = out_size if middle is None else min(first + middle, out_size)
    if levels.shape[-1] == out_size:  # Pillow skips a pass that changes nothing
        return levels[..., first:stop]
    if levels.shape[-1] > _MAX_SHRINK * out_size:
        raise ValueError(
            f"pillow_resize expected a side to shrink at most {_MAX_SHRINK} fold, got {levels.shape[-1]} -> "
            f"{out_size}. Use two steps."
        )
    bands = _bands(levels.shape[-1], out_size, first, stop, levels.dtype, levels.device)
    with torch.no_grad():
        exact = _exact(levels.detach(), bands)
    if not differentiated(levels):
        return exact.clamp_(0, 255)
    # Clipped after rounding: in a white area the smooth value can lie a rounding error above 255.
    return clamp(straight_through(_smooth(levels, bands), exact), 0, 255)


def _smooth(values: Tensor, bands: tuple[_Band, ...]) -> Tensor:
    return torch.cat([values[..., b.start : b.stop] @ b.weights for b in bands], dim=-1)


def _exact(levels: Tensor, bands: tuple[_Band, ...]) -> Tensor:
    """`round(levels @ coefficients)`, not clipped, in integer arithmetic carried by floats."""
    products = [(levels[..., b.start : b.stop] @ b.digits).unflatten(-1, (_NUM_DIGITS, -1)) for b in bands]
    high, middle, low = torch.cat(products, dim=-1).unbind(-2)
    carry = torch.add(middle, low.floor(), alpha=1 / _BASE).floor_()
    return torch.add(high, carry, alpha=1 / UNIT).add_(0.5).floor_()


@lru_cache(maxsize=64)
def _bands(
    in_size: int, out_size: int, first: int, stop: int, dtype: torch.dtype, device: torch.device
) -> tuple[_Band, ...]:
    """The bands of output columns `first:stop`."""
    coefficients = bicubic_coefficients(in_size, out_size, first, stop)
    bands = []
    # Cached tensors must be ordinary even if the first caller is in inference mode: later callers may want gradients.
    with torch.inference_mode(False), torch.no_grad():
        columns = min(max(_BAND_INPUTS * out_size // in_size, _BAND_COLUMNS[0]), _BAND_COLUMNS[1])
        for column in range(0, stop - first, columns):
            block = coefficients[:, column : column + columns]
            rows = np.flatnonzero(block.any(axis=1))
            start, end = int(rows[0]), int(rows[-1]) + 1
            block = block[start:end]
            digits = torch.tensor(_digits(block), dtype=dtype, device=device)
            weights = torch.tensor(block / 2.0**_COEFFICIENT_BITS, dtype=dtype, device=device)
            bands.append(_Band(start, end, digits, weights))
    return tuple(bands)


def _digits(coefficients: np.ndarray) -> np.ndarray:
    """Split integers into balanced base-256 digits, most significant first, side by side, as `Band.digits`."""
    half = _BASE // 2
    digits = []
    for _ in range(_NUM_DIGITS - 1):
        digit = (coefficients + half) % _BASE - half
        digits.append(digit / _BASE)
        coefficients = (coefficients - digit) // _BASE
    return np.concatenate([coefficients / UNIT, *reversed(digits)], axis=1)


def bicubic_coefficients(in_size: int, out_size: int, first: int = 0, stop: int | None = None) -> np.ndarray:
    """Pillow's integer kernel weights in units of 2**-22: antialiased bicubic along one axis.

    Returns:
        `[in_size, stop - first]`, of those output columns; None = of all.
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    support = _CUBIC_SUPPORT * stretch
    center = (np.arange(first, out_size if stop is None else stop) + 0.5) * scale
    start = np.maximum(np.trunc(center - support + 0.5), 0).astype(np.int64)
    last = np.minimum(np.trunc(center + support + 0.5), in_size).astype(np.int64)
    taps = np.arange(int((last - start).max()))
    position = start[:, None] + taps  # [out, taps]
    weight = _cubic((position - center[:, None] + 0.5) / stretch)
    weight[position >= last[:, None]] = 0.0
    weight /= np.cumsum(weight, axis=1)[:, -1:]  # cumsum adds left to right, as Pillow's loop does
    fixed = np.trunc(weight * 2.0**_COEFFICIENT_BITS + np.copysign(0.5, weight)).astype(np.int64)
    matrix = np.zeros((in_size, len(center)), dtype=np.int64)
    np.add.at(matrix, (np.minimum(position, in_size - 1), np.arange(len(center))[:, None]), fixed)
    return matrix


def _cubic(distance: np.ndarray) -> np.ndarray:
    d = np.abs(distance)
    near = ((_CUBIC_A + 2.0) * d - (_CUBIC_A + 3.0)) * d * d + 1
    far = (((d - 5) * d + 8) * d - 4) * _CUBIC_A
    return np.where(d < 1.0, near, np.where(d < _CUBIC_SUPPORT, far, 0.0))
