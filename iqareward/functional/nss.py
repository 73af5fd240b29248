"""Natural-scene statistics that PIQE, NIQE and BRISQUE share: how luminance varies around each pixel."""

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward.functional._fused import on_gpu
from iqareward.functional.color import luma
from iqareward.functional.filters import blur_valid, gaussian_taps

Border = Literal["replicate", "constant"]
"""How images are padded before filtering: by repeating their edge pixels, or with zeros."""

_WINDOW_SIDE = 7
_WINDOW_SIGMA = 7 / 6
# keeps the division finite in flat regions; on the 0..255 scale one grey level (Mittal et al. 2012, eq. 1)
_FLAT_STD = 1.0
# Deviations below a ten-thousandth of a grey level are rounding noise. Counted by sign, as the published code does,
# they move NIQE by up to 0.04 with nothing but the order of summation; as zeros they belong to neither side.
_ZERO_DEVIATION = 1e-4
# MATLAB `imresize(..., 0.5)`: Keys' cubic stretched to 8 taps against aliasing. Multiples of 1/256: exact in float32.
_HALF_TAPS = (-0.01171875, -0.03515625, 0.11328125, 0.43359375, 0.43359375, 0.11328125, -0.03515625, -0.01171875)
# offsets (down, right) of the neighbour that each coefficient is multiplied with; they wrap around
_NEIGHBORS = ((0, 1), (1, 0), (1, 1), (1, -1))
# Torch divides a sum of more numbers than this between threads if it is the only one of its call.
_UNDIVIDED = 2**15


class _ShapeTable(NamedTuple):
    """Closed forms of the asymmetric generalised Gaussian on a grid of shapes 0.200, 0.201 .. 10."""

    boundaries: Tensor  # [9800] moment ratio half way between neighbouring shapes
    shape: Tensor  # [9801]
    scale_per_std: Tensor  # [9801] sqrt(Gamma(1/shape) / Gamma(3/shape))
    mean_per_scale: Tensor  # [9801] Gamma(2/shape) / Gamma(1/shape)


class AsymmetricGaussians(NamedTuple):
    """Fitted asymmetric generalised Gaussians, one tensor per parameter."""

    shape: Tensor
    mean: Tensor
    left_std: Tensor
    right_std: Tensor
    scale_per_std: Tensor


def clipped_luma(images: Tensor) -> tuple[Tensor, Tensor]:
    """Luma `[B, H, W]` clipped to [0, 1], as an 8-bit file would hold it, and which images are all finite, `[B]`."""
    plane = luma(images)
    finite = plane.amin(dim=(1, 2)).isfinite() & plane.amax(dim=(1, 2)).isfinite()  # NaN survives amin and amax
    return plane.clamp(0, 1), finite


def local_statistics(levels: Tensor, *, border: Border = "replicate") -> tuple[Tensor, Tensor]:
    """How far each pixel is from the mean around it, and the standard deviation there, under a 7x7 Gaussian window.

    Both are `[B, H, W]` like `levels`, luminance on the 0..255 scale. A deviation is exactly 0 where the surround is
    flat.
    """
    radius = _WINDOW_SIDE // 2
    # Variance does not change under a shift; without this one float32 loses digits in bright flat regions.
    shifted = F.pad(levels.unsqueeze(1), (radius,) * 4, mode=border) - 128.0
    planes = torch.cat((shifted, shifted.square()), dim=1)
    mean, power = blur_valid(planes, gaussian_taps(_WINDOW_SIDE, _WINDOW_SIGMA)).unbind(1)
    # abs: the reference's remedy for a variance that rounding made negative
    std = power.addcmul_(mean, mean, value=-1).abs_().sqrt_()
    deviation = shifted[:, 0, radius:-radius, radius:-radius].sub_(mean)
    return F.hardshrink(deviation, _ZERO_DEVIATION), std


def mscn(levels: Tensor, *, border: Border = "replicate") -> Tensor:
    """Mean-subtracted, contrast-normalised luminance: near-Gaussian with unit variance on natural photographs.

    These are the coefficients (level - mean) / (std + 1), `[B, H, W]` like `levels` on the 0..255 scale.

    References:
        Mittal, Moorthy, Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 2012.
        https://doi.org/10.1109/TIP.2012.2214050
    """
    deviation, std = local_statistics(levels, border=border)
    return deviation.div_(std.add_(_FLAT_STD))


def half_scale(planes: Tensor) -> Tensor:
    """Half-size copies of `planes` `[..., H, W]` as MATLAB's `imresize(planes, 0.5)`; odd sides are rounded up."""
    for dim in (-2, -1):
        length = planes.shape[dim]
        after = 3 + length % 2
        mirrored = (planes.narrow(dim, 0, 3).flip(dim), planes, planes.narrow(dim, length - after, after).flip(dim))
        taps = torch.cat(mirrored, dim).unfold(dim, len(_HALF_TAPS), 2).unbind(-1)
        planes = taps[0] * _HALF_TAPS[0]
        for tap, weight in zip(taps[1:], _HALF_TAPS[1:], strict=True):
            planes.add_(tap, alpha=weight)
    return planes


def neighbor_moments(blocks: Tensor) -> Tensor:
    """Moments `[B, n, 5, 6]` float64 of `blocks` `[B, n, H, W]` and of their products with four neighbours.

    The neighbours are the right, lower, lower right and lower left; beyond the border of a block it begins again. The
    moments are counts, sums and sums of squares of the negative and of the positive values.
    """
    height, width = blocks.shape[2:]
    wrapped = F.pad(blocks, (1, 1, 0, 1), mode="circular")
    neighbors = (wrapped[:, :, down : down + height, 1 + right : 1 + right + width] for down, right in _NEIGHBORS)
    products = (blocks if others is None else blocks * others for others in (None, *neighbors))
    if on_gpu(blocks):  # where launches count; on a CPU 20 % slower, because less stays in the cache
        return _moments(torch.stack(tuple(products), dim=2))
    return torch.stack([_moments(values) for values in products], dim=2)


def fit_aggd(moments: Tensor, count: int) -> AsymmetricGaussians:
    """Asymmetric generalised Gaussians with the moments `[..., 6]` of `count` values each, zeros included.

    Shapes are the nearest of 0.200, 0.201 .. 10. NaN where a side of zero is empty.

    References:
        Lasmar, Stitou, Berthoumieu, "Multiscale skewed heavy tailed model for texture analysis", ICIP 2009.
        https://doi.org/10.1109/ICIP.2009.5414404
    """
    table = _shape_table(moments.device)
    num_left, num_right, _, _, power_left, power_right = moments.unbind(-1)
    left_std, right_std = (power_left / num_left).sqrt(), (power_right / num_right).sqrt()
    asymmetry = left_std / right_std
    ratio = _moment_ratio(moments, count)
    ratio = ratio * (asymmetry**3 + 1) * (asymmetry + 1) / (asymmetry.square() + 1).square()
    index = torch.searchsorted(table.boundaries, ratio)
    scale_per_std = table.scale_per_std[index]
    mean = (right_std - left_std) * scale_per_std * table.mean_per_scale[index]
    return AsymmetricGaussians(table.shape[index], mean, left_std, right_std, scale_per_std)


def fit_ggd(moments: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Shapes and variances of generalised Gaussians around 0 with the moments `[..., 6]` of `count` values each."""
    table = _shape_table(moments.device)
    shape = table.shape[torch.searchsorted(table.boundaries, _moment_ratio(moments, count))]
    return shape, (moments[..., 4] + moments[..., 5]) / count


def _moment_ratio(moments: Tensor, count: int) -> Tensor:
    """Squared mean magnitude per mean square, which tells the shape."""
    _, _, sum_left, sum_right, power_left, power_right = moments.unbind(-1)
    return (sum_right - sum_left).square() / (count * (power_left + power_right))


def _moments(values: Tensor) -> Tensor:
    """Counts, sums and sums of squares of the negative and of the positive among `values` `[..., H, W]`: `[..., 6]`."""
    if values.shape[-1] * values.shape[-2] <= _UNDIVIDED:
        values = values.flatten(-2).unsqueeze(-2)
    # else rows first: an image's score must not depend on its batch in the last digit
    columns: list[list[Tensor]] = []
    for bound in ("max", "min"):  # one after the other: on a GPU every side takes as much memory as the products
        side = values.clamp(**{bound: 0})
        power = torch.linalg.vector_norm(side, dim=-1).double().square()
        columns.append([side.sign().sum(-1).abs(), side.sum(-1), power])
    return torch.stack([column for pair in zip(*columns) for column in pair], dim=-1).sum(-2)


@lru_cache(maxsize=8)
def _shape_table(device: torch.device) -> _ShapeTable:
    shape = torch.arange(200, 10001, dtype=torch.float64, device="cpu") / 1000
    first, second, third = (torch.lgamma(order / shape) for order in (1, 2, 3))
    ratio = torch.exp(2 * second - first - third)
    boundaries = (ratio[:-1] + ratio[1:]) / 2
    columns = (boundaries, shape, torch.exp((first - third) / 2), torch.exp(second - first))
    return _ShapeTable(*(column.to(device) for column in columns))
