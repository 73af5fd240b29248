"""Natural-scene statistics that PIQE and NIQE share: how luminance varies around each pixel."""

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward.functional.color import luma
from iqareward.functional.filters import blur_valid, gaussian_taps

_WINDOW_SIDE = 7
_WINDOW_SIGMA = 7 / 6
# keeps the division finite in flat regions; on the 0..255 scale one grey level (Mittal et al. 2012, eq. 1)
_FLAT_STD = 1.0
# Deviations below a ten-thousandth of a grey level are rounding noise. Counted by sign, as the published code does,
# they move NIQE by up to 0.04 with nothing but the order of summation; as zeros they belong to neither side.
_ZERO_DEVIATION = 1e-4


def clipped_luma(images: Tensor) -> tuple[Tensor, Tensor]:
    """Luma `[B, H, W]` clipped to [0, 1], as an 8-bit file would hold it, and which images are all finite, `[B]`."""
    plane = luma(images)
    finite = plane.amin(dim=(1, 2)).isfinite() & plane.amax(dim=(1, 2)).isfinite()  # NaN survives amin and amax
    return plane.clamp(0, 1), finite


def local_statistics(levels: Tensor) -> tuple[Tensor, Tensor]:
    """How far each pixel is from the mean around it, and the standard deviation there, under a 7x7 Gaussian window.

    Both are `[B, H, W]` like `levels`, luminance on the 0..255 scale. Borders repeat the edge pixel. A deviation is
    exactly 0 where the surround is flat.
    """
    # Variance does not change under a shift; without this one float32 loses digits in bright flat regions.
    shifted = levels - 128.0
    radius = _WINDOW_SIDE // 2
    planes = F.pad(torch.stack((shifted, shifted.square()), dim=1), (radius,) * 4, mode="replicate")
    mean, power = blur_valid(planes, gaussian_taps(_WINDOW_SIDE, _WINDOW_SIGMA)).unbind(1)
    # abs: the reference's remedy for a variance that rounding made negative
    std = power.addcmul_(mean, mean, value=-1).abs_().sqrt_()
    return F.hardshrink(shifted.sub_(mean), _ZERO_DEVIATION), std


def mscn(levels: Tensor) -> Tensor:
    """Mean-subtracted, contrast-normalised luminance: near-Gaussian with unit variance on natural photographs.

    These are the coefficients (level - mean) / (std + 1), `[B, H, W]` like `levels` on the 0..255 scale.

    References:
        Mittal, Moorthy, Bovik, "No-Reference Image Quality Assessment in the Spatial Domain", IEEE TIP 2012.
        https://doi.org/10.1109/TIP.2012.2214050
    """
    deviation, std = local_statistics(levels)
    return deviation.div_(std.add_(_FLAT_STD))
