"""Peak signal-to-noise ratio."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from iqareward.functional._checks import check_pair
from iqareward.functional._chunks import map_chunks
from iqareward.functional.color import Color, color_planes

_MIN_MSE = 1e-10  # finer than any 8- or 16-bit difference; identical images score 100 dB instead of inf


def psnr(images: Tensor, references: Tensor, *, color: Color = "rgb") -> Tensor:
    """Peak signal-to-noise ratio in dB, one value per image; identical images score 100.

    Restoration papers report `color="y"`, the Y of MATLAB's `rgb2ycbcr`, whose range of 16 to 235 they take for 0 to
    255: 20 log10(255 / 219) = 1.32 dB more than `color="luma"`.

    Args:
        images: `[B, 3, H, W]` RGB in [0, 1].
        references: `[B, 3, H, W]` RGB in [0, 1].
        color: `"rgb"` pools the squared error of the three channels; `"luma"` takes that of BT.601 luma, `"luma8"`
            of luma rounded to 8 bits, `"y"` that of the Y of YCbCr.

    Returns:
        `[B]` dB, at most 100, higher is better; NaN for images with non-finite pixels.

    Raises:
        ValueError: shapes or devices differ, or `color` is unknown.
        TypeError: the images are not floating point.

    Example:
        >>> psnr(torch.full((1, 3, 8, 8), 1.0), torch.full((1, 3, 8, 8), 0.5))
        tensor([6.0206])

    References:
        Scope of validity of PSNR in image/video quality assessment, 2008, https://doi.org/10.1049/el:20080522
    """
    images, references = check_pair("psnr", images, references)

    def mean_squared_error(images: Tensor, references: Tensor) -> Tensor:
        planes = color_planes("psnr", images, color), color_planes("psnr", references, color)
        squared = F.mse_loss(*planes, reduction="none")
        # rows first, as in mean_of_map; one division instead of two is felt at a batch of one
        return squared.sum(-1).flatten(1).sum(-1) / math.prod(squared.shape[1:])

    mse = map_chunks(mean_squared_error, images, references)
    # mse - mse is NaN for an infinite pixel, which is "not scored" rather than -inf dB
    return torch.add(mse - mse, torch.log10(mse.clamp(min=_MIN_MSE)), alpha=-10)
