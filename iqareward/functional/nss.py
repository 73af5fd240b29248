"""Natural-scene statistics: locally normalised luminance, on which the no-reference metrics rest."""

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward.functional.filters import blur_valid, gaussian_taps

WINDOW_SIDE = 7
WINDOW_SIGMA = 7 / 6
# keeps the division finite in flat regions; on the 0..255 scale one grey level (Mittal et al. 2012, eq. 1)
FLAT_STD = 1.0


def local_statistics(luma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation around each pixel, under a 7x7 Gaussian window of sigma 7/6.

    Borders repeat the edge pixel. The standard deviation takes the absolute value of the (rounding-negative) variance,
    as the reference implementations do.

    Args:
        luma: `[..., H, W]` luminance on the 0..255 scale, float32 or float64.

    Returns:
        `[..., H, W]` means and `[..., H, W]` standard deviations.
    """
    # Variance does not change under a shift; without the offset float32 loses half its digits in bright flat regions.
    shifted = luma - 128.0
    filtered = _smooth(torch.stack([shifted, shifted.square()]))
    mean, power = filtered[0], filtered[1]
    std = (power - mean.square()).abs().sqrt()
    return mean + 128.0, std


def mscn(luma: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised luminance: near-Gaussian with unit variance on natural photographs.

    Args:
        luma: `[..., H, W]` luminance on the 0..255 scale, float32 or float64.

    Returns:
        `[..., H, W]` coefficients (luma - mean) / (std + 1).

    Example:
        >>> mscn(torch.full((1, 32, 32), 77.0)).abs().max()
        tensor(0.)

    References:
        Mittal, Moorthy, Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 2012.
        https://doi.org/10.1109/TIP.2012.2214050
    """
    mean, std = local_statistics(luma)
    return (luma - mean) / (std + FLAT_STD)


def _smooth(planes: Tensor) -> Tensor:
    radius = WINDOW_SIDE // 2
    padded = F.pad(planes.flatten(0, -3).unsqueeze(1), (radius,) * 4, mode="replicate").squeeze(1)
    return blur_valid(padded, gaussian_taps(WINDOW_SIDE, WINDOW_SIGMA)).unflatten(0, planes.shape[:-2])
