"""Gradient magnitude similarity deviation."""

import torch
from torch import Tensor

from iqareward._gradients import root
from iqareward.functional._checks import check_pair
from iqareward.functional._chunks import map_chunks
from iqareward.functional.color import LumaColor, luma_plane
from iqareward.functional.filters import halve, mean_of_map, pad_zeros

MIN_SIDE = 6  # the 3x3 Prewitt window fits once after halving
_STABILITY = 170 / 255**2  # T of the paper, for luma in [0, 1]
# The product of two squared gradient magnitudes is kept above this before its root, whose slope is infinite at 0: a
# flat area gets gradient 0 instead. The root is 1e-15 of STABILITY, so no score changes.
_MIN_PRODUCT = 1e-36


def _squared_gradients(maps: Tensor) -> Tensor:
    """Squared Prewitt gradient magnitude of `[..., H, W]`, zeros beyond the border as MATLAB's `conv2(..., 'same')`."""
    maps = pad_zeros(maps, 1, 1)
    columns = maps[..., :-2, :] + maps[..., 1:-1, :] + maps[..., 2:, :]
    rows = maps[..., :-2] + maps[..., 1:-1] + maps[..., 2:]
    horizontal = columns[..., 2:] - columns[..., :-2]
    vertical = rows[..., 2:, :] - rows[..., :-2, :]
    return (horizontal.square() + vertical.square()) / 9


def deviation(maps: Tensor) -> Tensor:
    """Standard deviation (Bessel-corrected) of each map: `[B, H, W]` to `[B]`, with gradient 0 for a constant map."""
    count = maps.shape[-2] * maps.shape[-1]
    centred = maps - mean_of_map(maps)[:, None, None]
    return root(mean_of_map(centred.square()) * (count / (count - 1)))


def gmsd(images: Tensor, references: Tensor, *, color: LumaColor = "luma") -> Tensor:
    """Gradient magnitude similarity deviation, one value per image; 0 for identical images and LOWER IS BETTER.

    As in the authors' code: BT.601 luma, 2x2 means, every second position, Prewitt gradients, sample deviation.

    Args:
        images: `[B, 3, H, W]` RGB in [0, 1], H and W at least 6.
        references: `[B, 3, H, W]` RGB in [0, 1].
        color: `"luma"`, or `"luma8"` rounded to 8 bits as in published figures.

    Returns:
        `[B]`, at least 0 and rarely above 0.35, lower is better; NaN for images with non-finite pixels.

    Raises:
        ValueError: shapes or devices differ, images are too small, or `color` is unknown.
        TypeError: the images are not floating point.

    Example:
        >>> references = torch.linspace(0, 1, 16 * 16).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
        >>> gmsd(references, references).item() < 1e-9 < gmsd(1 - references**2, references).item()
        True

    References:
        Gradient Magnitude Similarity Deviation: A Highly Efficient Perceptual Image Quality Index, 2014,
        https://doi.org/10.1109/TIP.2013.2293423
    """
    images, references = check_pair("gmsd", images, references, min_side=MIN_SIDE)

    def score(images: Tensor, references: Tensor) -> Tensor:
        pair = torch.stack((luma_plane("gmsd", images, color), luma_plane("gmsd", references, color)))
        squared = _squared_gradients(halve(pair, replicate=False))
        product = (squared[0] * squared[1]).clamp(min=_MIN_PRODUCT).sqrt()
        total = squared[0] + squared[1]
        # 1 - similarity deviates as similarity does, and is exactly 0 where the gradients agree
        return deviation(torch.sub(total, product, alpha=2) / (total + _STABILITY))

    return map_chunks(score, images, references)
