"""Structural similarity, and the map that it shares with its multi-scale form."""

import torch
from torch import Tensor

from iqareward.functional._checks import check_pair
from iqareward.functional._fused import fuses
from iqareward.functional.color import Color, map_planes
from iqareward.functional.filters import blur_valid, gaussian_taps, mean_of_map

WINDOW_SIZE = 11
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2  # (K1 L)^2 and (K2 L)^2 of the paper, with L = 1


def sum_and_difference(planes: Tensor, reference_planes: Tensor) -> Tensor:
    """The pair `[2, ...]` (sum - 1, difference), from which every moment of SSIM follows.

    Their squares give E[x^2] + E[y^2] and E[xy] together, so four blurs do instead of five. The sum is centred because
    variances are differences of squares: a mean near 0 leaves more digits to them.
    """
    return torch.stack((planes + reference_planes - 1, planes - reference_planes))


def similarity_map(pair: Tensor, taps: list[float], *, with_luminance: bool) -> Tensor:
    """Contrast and structure of SSIM at every position where the window fits, times luminance if that is asked for."""
    means, powers = blur_valid(pair, taps), blur_valid(pair * pair, taps)
    if fuses(means):
        return torch.ops.iqareward.ssim_map(means, powers, 2 * C1, 2 * C2, with_luminance)
    # Rounding can leave a flat area with a variance just below 0, which far outside [0, 1] would cancel C2.
    variances = (powers - means * means).clamp(min=0)
    del powers  # a CPU's cache holds not much more than what is still needed
    structure = _ratio(variances[0], variances[1], 2 * C2)
    return _ratio((means[0] + 1).square(), means[1].square(), 2 * C1) * structure if with_luminance else structure


def _ratio(sums: Tensor, differences: Tensor, constant: float) -> Tensor:
    return (sums - differences).add_(constant) / (sums + differences).add_(constant)


def ssim(
    images: Tensor,
    references: Tensor,
    *,
    color: Color = "luma",
    window_size: int = WINDOW_SIZE,
    sigma: float = SIGMA,
) -> Tensor:
    """Mean structural similarity, one value per image; 1 for identical images.

    As in the authors' code: Gaussian window, positions where it fits inside the image, biased variances. Unlike their
    demonstration script and some packages, it never shrinks the image first, rounds luma, or floors negative values.

    Args:
        images: `[B, 3, H, W]` RGB in [0, 1], H and W at least `window_size`.
        references: `[B, 3, H, W]` RGB in [0, 1].
        color: `"luma"` as the authors do, `"luma8"` rounded as in published figures, `"y"` of YCbCr, or `"rgb"` for
            the mean over channels.
        window_size: side of the Gaussian window in pixels.
        sigma: its standard deviation in pixels.

    Returns:
        `[B]` in [-1, 1], higher is better; NaN for images with non-finite pixels.

    Raises:
        ValueError: shapes or devices differ, images are smaller than the window, or an option is out of range.
        TypeError: the images are not floating point.

    Example:
        >>> references = torch.linspace(0, 1, 16 * 16).reshape(1, 1, 16, 16).expand(1, 3, 16, 16)
        >>> ssim(references, references), ssim(1 - references, references).item() < 0
        (tensor([1.]), True)

    References:
        Image Quality Assessment: From Error Visibility to Structural Similarity, 2004,
        https://doi.org/10.1109/TIP.2003.819861
    """
    images, references = check_pair("ssim", images, references, min_side=window_size)
    taps = gaussian_taps(window_size, sigma)

    def score(planes: Tensor, reference_planes: Tensor) -> Tensor:
        return mean_of_map(similarity_map(sum_and_difference(planes, reference_planes), taps, with_luminance=True))

    return map_planes("ssim", score, images, references, color)
