"""Multi-scale structural similarity."""

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from iqareward.functional._checks import check_pair
from iqareward.functional.color import Color, map_planes
from iqareward.functional.filters import gaussian_taps, halve, mean_of_map
from iqareward.functional.ssim import SIGMA, WINDOW_SIZE, similarity_map, sum_and_difference

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the paper, finest scale first
MIN_SIDE = (WINDOW_SIZE - 1) * 2 ** (len(SCALE_WEIGHTS) - 1) + 1  # 161: the window fits at the coarsest scale
# Below this similarity a scale's power x^w is replaced by a straight line to 0, whose slope is finite.
_LINEAR_BELOW = 1e-6


def floored_powers(similarities: Tensor, exponents: Sequence[float]) -> list[Tensor]:
    """Each row of `similarities` to its exponent, 0 for negative values, with a finite gradient everywhere."""
    base = similarities.clamp(min=_LINEAR_BELOW)
    share = similarities.clamp(min=0) / base
    return [row**exponent * rest for row, exponent, rest in zip(base, exponents, share, strict=True)]


def ms_ssim(
    images: Tensor,
    references: Tensor,
    *,
    color: Color = "luma",
    window_size: int = WINDOW_SIZE,
    sigma: float = SIGMA,
) -> Tensor:
    """Multi-scale structural similarity over five octaves, one value per image; 1 for identical images.

    Each octave halves the image by 2x2 means, repeating the last line of an odd side as the authors' code does. The
    mean contrast-structure term of a scale can be negative (an inverted image). It has no real fractional power and
    counts as 0 here, so the score is 0 and so is its gradient.

    Args:
        images: `[B, 3, H, W]` RGB in [0, 1], H and W at least `16 * (window_size - 1) + 1` (161 by default).
        references: `[B, 3, H, W]` RGB in [0, 1].
        color: `"luma"` as the authors do, `"luma8"` rounded as in published figures, `"y"` of YCbCr, or `"rgb"` for
            the mean of the three channels' scores.
        window_size: side of the Gaussian window in pixels, at every scale.
        sigma: its standard deviation in pixels.

    Returns:
        `[B]` in [0, 1], higher is better; NaN for images with non-finite pixels.

    Raises:
        ValueError: shapes or devices differ, images are too small, or an option is out of range.
        TypeError: the images are not floating point.

    Example:
        >>> references = torch.linspace(0, 1, 192 * 192).reshape(1, 1, 192, 192).expand(1, 3, 192, 192)
        >>> ms_ssim(references, references)
        tensor([1.])

    References:
        Multiscale structural similarity for image quality assessment, 2003,
        https://doi.org/10.1109/ACSSC.2003.1292216
    """
    min_side = (window_size - 1) * 2 ** (len(SCALE_WEIGHTS) - 1) + 1
    images, references = check_pair("ms_ssim", images, references, min_side=min_side)
    taps = gaussian_taps(window_size, sigma)

    def score(planes: Tensor, reference_planes: Tensor) -> Tensor:
        pair = sum_and_difference(planes, reference_planes)
        similarities = []
        for scale in range(len(SCALE_WEIGHTS)):
            pair = halve(pair, replicate=True) if scale else pair
            is_last = scale == len(SCALE_WEIGHTS) - 1
            similarities.append(mean_of_map(similarity_map(pair, taps, with_luminance=is_last)))
        return reduce(torch.mul, floored_powers(torch.stack(similarities), SCALE_WEIGHTS))

    return map_planes("ms_ssim", score, images, references, color)
