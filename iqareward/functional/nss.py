"""Natural-scene statistics: how luminance varies around each pixel, and the distributions fitted to it per block."""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward.functional._fused import on_gpu
from iqareward.functional.color import luma
from iqareward.functional.filters import blur_valid, gaussian_taps

WINDOW_SIDE = 7
WINDOW_SIGMA = 7 / 6
# keeps the division finite in flat regions; on the 0..255 scale one grey level (Mittal et al. 2012, eq. 1)
FLAT_STD = 1.0
# Deviations below a ten-thousandth of a grey level are rounding noise. Counted by sign, as the published code does,
# they move NIQE by up to 0.04 with nothing but the order of summation; as zeros they belong to neither side.
ZERO_DEVIATION = 1e-4
# MATLAB `imresize(..., 0.5)`: Keys' cubic stretched to 8 taps against aliasing. Multiples of 1/256: exact in float32.
HALF_TAPS = (-0.01171875, -0.03515625, 0.11328125, 0.43359375, 0.43359375, 0.11328125, -0.03515625, -0.01171875)
# offsets (down, right) of the neighbour that each coefficient is multiplied with; they wrap around inside a block
NEIGHBORS = ((0, 1), (1, 0), (1, 1), (1, -1))


class ShapeTable(NamedTuple):
    """Closed forms of the asymmetric generalised Gaussian on a grid of shapes 0.200, 0.201 .. 10."""

    boundaries: Tensor  # [9800] moment ratio half way between neighbouring shapes
    shape: Tensor  # [9801]
    scale_per_std: Tensor  # [9801] sqrt(Gamma(1/shape) / Gamma(3/shape))
    mean_per_scale: Tensor  # [9801] Gamma(2/shape) / Gamma(1/shape)


def clipped_luma(images: Tensor) -> tuple[Tensor, Tensor]:
    """Luma `[B, H, W]` clipped to [0, 1], as an 8-bit file would hold it, and which images are all finite, `[B]`."""
    plane = luma(images)
    finite = plane.amin(dim=(1, 2)).isfinite() & plane.amax(dim=(1, 2)).isfinite()  # NaN survives amin and amax
    return plane.clamp(0, 1), finite


def local_statistics(levels: Tensor) -> tuple[Tensor, Tensor]:
    """How far each pixel is from the mean around it, and the standard deviation there, under a 7x7 Gaussian window.

    Args:
        levels: `[B, H, W]` luminance on the 0..255 scale, float32 or float64; borders repeat the edge pixel.

    Returns:
        `[B, H, W]` deviations (exactly 0 where the surround is flat) and `[B, H, W]` standard deviations.
    """
    # Variance does not change under a shift; without this one float32 loses digits in bright flat regions.
    shifted = levels - 128.0
    radius = WINDOW_SIDE // 2
    planes = F.pad(torch.stack((shifted, shifted.square()), dim=1), (radius,) * 4, mode="replicate")
    mean, power = blur_valid(planes, gaussian_taps(WINDOW_SIDE, WINDOW_SIGMA)).unbind(1)
    # abs: the reference's remedy for a variance that rounding made negative
    std = power.addcmul_(mean, mean, value=-1).abs_().sqrt_()
    return F.hardshrink(shifted.sub_(mean), ZERO_DEVIATION), std


def mscn(levels: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised luminance: near-Gaussian with unit variance on natural photographs.

    Args:
        levels: `[B, H, W]` luminance on the 0..255 scale, float32 or float64.

    Returns:
        `[B, H, W]` coefficients (level - mean) / (std + 1).

    Example:
        >>> mscn(torch.full((1, 32, 32), 77.0)).abs().max()
        tensor(0.)

    References:
        Mittal, Moorthy, Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 2012.
        https://doi.org/10.1109/TIP.2012.2214050
    """
    deviation, std = local_statistics(levels)
    return deviation.div_(std.add_(FLAT_STD))


def half_scale(planes: Tensor) -> Tensor:
    """Half-size copies `[..., H/2, W/2]` of `planes` `[..., H, W]`, H and W even, as MATLAB `imresize(planes, 0.5)`."""
    for dim in (-2, -1):
        length = planes.shape[dim]
        mirrored = (planes.narrow(dim, 0, 3).flip(dim), planes, planes.narrow(dim, length - 3, 3).flip(dim))
        taps = torch.cat(mirrored, dim).unfold(dim, len(HALF_TAPS), 2).unbind(-1)
        planes = taps[0] * HALF_TAPS[0]
        for tap, weight in zip(taps[1:], HALF_TAPS[1:], strict=True):
            planes.add_(tap, alpha=weight)
    return planes


def split_blocks(planes: Tensor, side: int) -> Tensor:
    """The square blocks `[B, n, side, side]` of `planes` `[B, H, W]`, H and W multiples of `side`, row by row."""
    rows, columns = planes.shape[1] // side, planes.shape[2] // side
    return planes.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3).flatten(1, 2)


def natural_features(levels: Tensor, side: int) -> Tensor:
    """The 36 features of each block of `levels` `[B, H, W]` (0..255): 18 at full and 18 at half scale.

    Rows and columns beyond the last whole block are left out.

    Args:
        levels: `[B, H, W]`, H and W at least `side`.
        side: side of a block in pixels, even.

    Returns:
        `[B, n, 36]` float64 with n = floor(H / side) * floor(W / side).
    """
    height, width = (length - length % side for length in levels.shape[1:])
    levels = levels[:, :height, :width]
    scales = ((levels, side), (half_scale(levels), side // 2))
    # In float32 the local variance keeps three digits where contrast is low, which moves the score by 0.002.
    features = [block_features(mscn(plane.double()).to(plane.dtype), block) for plane, block in scales]
    return torch.cat(features, dim=-1)


def block_features(coefficients: Tensor, side: int) -> Tensor:
    """18 numbers that describe the coefficients of each block and the products of its neighbouring coefficients.

    They are the shape and mean scale of the coefficients; then, for the right, lower, lower right and lower left
    neighbour, shape, mean, left scale and right scale of the products. NaN where one side of zero is empty.

    Args:
        coefficients: `[B, H, W]` from `mscn`, H and W multiples of `side`.
        side: side of a block in pixels.

    Returns:
        `[B, n, 18]` float64.

    References:
        Mittal, Soundararajan, Bovik, "Making a 'Completely Blind' Image Quality Analyzer", IEEE SPL 2013.
        https://doi.org/10.1109/LSP.2012.2227726
    """
    blocks = split_blocks(coefficients, side)
    wrapped = F.pad(blocks, (1, 1, 0, 1), mode="circular")
    neighbors = (wrapped[:, :, down : down + side, 1 + right : 1 + right + side] for down, right in NEIGHBORS)
    products = (values.flatten(2) for values in (blocks, *(blocks * others for others in neighbors)))
    if on_gpu(blocks):  # where launches count; on a CPU 20 % slower, because less stays in the cache
        moments = _moments(torch.stack(tuple(products), dim=2))
    else:
        moments = torch.stack([_moments(values) for values in products], dim=2)
    shape, mean, left, right = fit_aggd(moments, side * side).unbind(-1)  # [B, n, 5] each
    symmetric = torch.stack((shape[..., 0], (left[..., 0] + right[..., 0]) / 2), dim=-1)
    return torch.cat((symmetric, torch.stack((shape, mean, left, right), dim=-1)[..., 1:, :].flatten(-2)), dim=-1)


def fit_aggd(moments: Tensor, count: int) -> Tensor:
    """Shape, mean, left scale and right scale of asymmetric generalised Gaussians, by matching moments.

    Args:
        moments: `[..., 6]` from `_moments`, of samples of `count` values each.
        count: number of values, zeros included.

    Returns:
        `[..., 4]` float64; the shape is the nearest of 0.200, 0.201 .. 10. NaN where a side of zero is empty.

    References:
        Lasmar, Stitou, Berthoumieu, "Multiscale skewed heavy tailed model for texture analysis", ICIP 2009.
        https://doi.org/10.1109/ICIP.2009.5414404
    """
    table = _shape_table(moments.device)
    num_left, num_right, sum_left, sum_right, norm_left, norm_right = moments.double().unbind(-1)
    left_std, right_std = norm_left / num_left.sqrt(), norm_right / num_right.sqrt()
    asymmetry = left_std / right_std
    ratio = (sum_right - sum_left).square() / (count * (norm_left.square() + norm_right.square()))
    ratio = ratio * (asymmetry**3 + 1) * (asymmetry + 1) / (asymmetry.square() + 1).square()
    index = torch.searchsorted(table.boundaries, ratio)
    left, right = left_std * table.scale_per_std[index], right_std * table.scale_per_std[index]
    return torch.stack((table.shape[index], (right - left) * table.mean_per_scale[index], left, right), dim=-1)


def _moments(values: Tensor) -> Tensor:
    """Counts, sums and Euclidean norms of the negative and of the positive among `values` `[..., L]`: `[..., 6]`."""
    sides = (values.clamp(max=0), values.clamp(min=0))
    counts = [side.sign().sum(-1).abs() for side in sides]
    sums = [side.sum(-1) for side in sides]
    norms = [torch.linalg.vector_norm(side, dim=-1) for side in sides]
    return torch.stack((*counts, *sums, *norms), dim=-1)


@lru_cache(maxsize=8)
def _shape_table(device: torch.device) -> ShapeTable:
    shape = torch.arange(200, 10001, dtype=torch.float64, device="cpu") / 1000
    first, second, third = (torch.lgamma(order / shape) for order in (1, 2, 3))
    ratio = torch.exp(2 * second - first - third)
    boundaries = (ratio[:-1] + ratio[1:]) / 2
    columns = (boundaries, shape, torch.exp((first - third) / 2), torch.exp(second - first))
    return ShapeTable(*(column.to(device) for column in columns))
