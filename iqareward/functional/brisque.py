"""BRISQUE: people's opinion of an image, predicted from the statistics of its luminance."""

from functools import lru_cache
from importlib import resources

import torch
from torch import Tensor

from iqareward.functional._checks import check_images
from iqareward.functional._chunks import map_chunks
from iqareward.functional.nss import clipped_luma, fit_aggd, fit_ggd, half_scale, mscn, neighbor_moments
from iqareward.weight_files import WeightFile

MIN_SIDE = 64  # on crops of 32x32 the order of damaged photographs is chance
PACKAGED = "brisque_live.safetensors"
_NUM_FEATURES, _NUM_VECTORS = 36, 774
# of the authors' support vector regression
_KERNEL_GAMMA = 0.05
_OFFSET = 153.591


@torch.no_grad()
def brisque(images: Tensor) -> Tensor:
    """Opinion of five kinds of damage, predicted from luminance statistics: about 0 is best, about 100 is worst.

    A support vector regression that the authors trained on the LIVE database: JPEG, JPEG 2000, white noise, blur and
    transmission errors. Scores below 0 and above 100 occur; far from anything in LIVE the score tends to 153.6. As in
    the authors' release luma is rounded to 8 bits and shapes come from a table, so no gradient exists and no graph is
    built. Local statistics and the regression are computed in float64.

    Figures of the authors' release come out within 0.001, or 0.6 where a region is exactly flat: there it counts its
    own rounding noise by sign, and here deviations are zero.

    Limits. Judge images with a short side of 256 pixels or more: on 14 photographs that LIVE does not show, 5 % of
    degraded copies beat their original at 384x512, 7 % at 256x256 and 12 % at 128x128. White noise with a standard
    deviation of 3/255 improves 10 of them, and sharpening 8 of 13. Noise under a mean of 5x5 pixels scores as well as
    a photograph.

    Args:
        images: `[B, 3, H, W]` RGB in [0, 1], H, W >= 64; luma outside [0, 1] saturates.

    Returns:
        `[B]` scores, lower is better. NaN for an image with a NaN or infinite pixel, and for one without luma on both
        sides of its local mean, such as a flat image.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: `images` is not `[B, 3, H, W]` with H, W >= 64.

    Example:
        >>> images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> images[1] = 0.5
        >>> brisque(images).isnan()
        tensor([False,  True])

    References:
        Mittal, Moorthy, Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 2012.
        https://doi.org/10.1109/TIP.2012.2214050
    """
    images = check_images("brisque", images, min_side=MIN_SIDE)
    return map_chunks(_brisque, images)


def brisque_features(levels: Tensor) -> Tensor:
    """Features `[B, 36]` float64 of `levels` `[B, H, W]` (0..255), 18 at full and 18 at half scale.

    Each 18 are the shape and variance of the coefficients of `mscn`; then, for the right, lower, lower right and lower
    left neighbour, shape, mean, left variance and right variance of the products. NaN where one side of zero is empty.
    """
    # In float32 the local variance keeps three digits where contrast is low.
    planes = [mscn(plane.double(), border="constant").to(levels.dtype) for plane in (levels, half_scale(levels))]
    return torch.cat([_features(plane) for plane in planes], dim=-1)


def _brisque(images: Tensor) -> Tensor:
    plane, finite = clipped_luma(images)
    features = brisque_features((plane * 255).round())
    vectors, weights, low, high = _packaged_model(images.device)
    scaled = (features - low) / (high - low) * 2 - 1
    kernel = (-_KERNEL_GAMMA * (scaled.unsqueeze(1) - vectors).square().sum(-1)).exp()
    scores = (kernel * weights).sum(-1) + _OFFSET  # no matrix product: its digits depend on the batch
    return torch.where(finite, scores, torch.nan).to(images.dtype)


def _features(coefficients: Tensor) -> Tensor:
    moments, count = neighbor_moments(coefficients.unsqueeze(1))[:, 0], coefficients.shape[1] * coefficients.shape[2]
    symmetric = torch.stack(fit_ggd(moments[:, 0], count), dim=-1)
    fit = fit_aggd(moments[:, 1:], count)  # [B, 4] each
    products = torch.stack((fit.shape, fit.mean, fit.left_std.square(), fit.right_std.square()), dim=-1)
    return torch.cat((symmetric, products.flatten(1)), dim=-1)


@lru_cache(maxsize=8)
def _packaged_model(device: torch.device) -> tuple[Tensor, ...]:
    """Support vectors, their weights, and the ranges to which features are scaled, float64 on `device`.

    Written by benchmarks/brisque_model.py; the metadata of the file names their source.
    """
    size = (_NUM_FEATURES,)
    shapes = {"vectors": (_NUM_VECTORS, *size), "weights": (_NUM_VECTORS,), "low": size, "high": size}
    with resources.as_file(resources.files("iqareward.functional") / "data" / PACKAGED) as path:
        found = WeightFile(path).take(shapes)
    return tuple(found[key].to(device, torch.float64) for key in shapes)
