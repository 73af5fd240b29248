"""From images in [0, 1] to the pixels that mPLUG-Owl2 was trained on, as its Pillow pipeline makes them."""

import torch.nn.functional as F
from torch import Tensor

from iqareward.functional._constants import constant
from iqareward.functional._threads import free_threads
from iqareward.functional.resize import resize_levels, to_levels

PAD_LEVELS = (122.0, 116.0, 104.0)  # CLIP's mean colour in whole levels
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def preprocess(images: Tensor, image_size: int) -> Tensor:
    """Pad to a square with CLIP's mean colour, resize as Pillow's bicubic does, and normalise.

    Runs on the images' device. Gradients reach the pixels at their original resolution.

    Args:
        images: `[B, 3, H, W]` float in [0, 1]; rounded to 8 bits first.
        image_size: side of the result.

    Returns:
        `[B, 3, image_size, image_size]` in units of CLIP's standard deviation, dtype of `images`.

    Example:
        >>> import torch
        >>> preprocess(torch.rand(2, 3, 30, 50), 448).shape
        torch.Size([2, 3, 448, 448])
    """
    with free_threads(images.device):
        pad, mean, std = (
            constant(row, images.dtype, images.device).view(3, 1, 1) for row in (PAD_LEVELS, CLIP_MEAN, CLIP_STD)
        )
        levels = resize_levels(_pad_to_square(to_levels(images), pad), (image_size, image_size))
        return (levels / 255 - mean) / std


def _pad_to_square(levels: Tensor, color: Tensor) -> Tensor:
    height, width = levels.shape[-2:]
    if height == width:
        return levels
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padding = (left, side - width - left, top, side - height - top)
    # F.pad fills with one number for all channels, so the colour is moved to zero and back; both are exact.
    return F.pad(levels - color, padding) + color
