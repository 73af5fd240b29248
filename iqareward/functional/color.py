"""Colour planes that the classical metrics compare, in their published weights."""

from collections.abc import Callable
from typing import Literal

from torch import Tensor

from iqareward._gradients import straight_through
from iqareward.functional._chunks import map_chunks

LumaColor = Literal["luma", "luma8"]
Color = Literal["luma", "luma8", "y", "rgb"]
"""What a metric compares: luma, luma rounded to 256 levels, the Y of YCbCr, or the three channels, averaged.

Published figures come from MATLAB, whose `rgb2gray` rounds the luma of an 8-bit image to 8 bits again; `"luma8"` does
too. Rounding moves SSIM by up to 1e-3, so nothing rounds unless asked to; its gradient passes straight through.
Restoration papers compare the Y of MATLAB's `rgb2ycbcr`, which spans 16 to 235, as if it spanned 0 to 255: `"y"`.
"""

# First row of the inverse of the NTSC matrix, as MATLAB's rgb2gray has it: 0.299, 0.587, 0.114 before rounding.
LUMA = (0.298936021293775, 0.587043074451121, 0.114020904255103)
# MATLAB's rgb2ycbcr for levels 0 to 255: Y = 16 + 65.481 R + 128.553 G + 24.966 B.
STUDIO_LUMA, STUDIO_BLACK = (65.481 / 255, 128.553 / 255, 24.966 / 255), 16 / 255
# The YIQ matrix as the authors of HaarPSI round it.
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


def weighted_channels(images: Tensor, weights: tuple[float, float, float]) -> Tensor:
    """One plane `[..., H, W]` from the channels of `images` `[..., 3, H, W]`.

    Three scaled additions rather than a matrix product: trainers switch TF32 or bfloat16 on for products, and its 8 to
    11 significant bits would show in every variance computed from the plane.
    """
    red, green, blue = images.unbind(-3)
    return (red * weights[0]).add_(green, alpha=weights[1]).add_(blue, alpha=weights[2])


def luma(images: Tensor) -> Tensor:
    """Full-range BT.601 luma `[B, H, W]` in [0, 1] of RGB `images` `[B, 3, H, W]` in [0, 1], not rounded to 8 bits.

    Example:
        >>> import torch
        >>> luma(torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1))
        tensor([[[0.2989]]])

    References:
        Studio encoding parameters of digital television, Recommendation ITU-R BT.601-7, 2011,
        https://www.itu.int/rec/R-REC-BT.601
    """
    return weighted_channels(images, LUMA)


def _studio_luma(images: Tensor) -> Tensor:
    """The Y `[B, H, W]` of YCbCr as MATLAB's `rgb2ycbcr` has it: 16/255 for black, 235/255 for white."""
    return weighted_channels(images, STUDIO_LUMA).add_(STUDIO_BLACK)


def luma_plane(metric: str, images: Tensor, color: LumaColor) -> Tensor:
    """Luma `[B, H, W]` as `color` says; `metric` is named in the error for any other value."""
    if color == "luma":
        return luma(images)
    if color == "luma8":
        levels = luma(images) * 255
        return straight_through(levels, levels.detach().round()) / 255
    raise ValueError(f'{metric} expected `color` to be "luma" or "luma8", got {color!r}.')


def color_planes(metric: str, images: Tensor, color: Color) -> Tensor:
    """What `metric` compares: one plane `[B, H, W]`, or for `"rgb"` the images `[B, 3, H, W]` themselves."""
    if color == "rgb":
        return images
    if color == "y":
        return _studio_luma(images)
    if color == "luma" or color == "luma8":
        return luma_plane(metric, images, color)
    raise ValueError(f'{metric} expected `color` to be "rgb", "luma", "luma8" or "y", got {color!r}.')


def map_planes(
    metric: str, formula: Callable[[Tensor, Tensor], Tensor], images: Tensor, references: Tensor, color: Color
) -> Tensor:
    """Apply `formula(planes, reference_planes) -> [b]`, `[b, H, W]` each, to what `color` names; `[B]`.

    Channels go through the formula like images of their own and are averaged at the end: what has to fit in the cache
    at a time is one plane rather than three.
    """
    if color == "rgb":
        return map_chunks(formula, images.flatten(0, 1), references.flatten(0, 1)).view(-1, 3).mean(1)
    return map_chunks(lambda *pair: formula(*(color_planes(metric, rgb, color) for rgb in pair)), images, references)
