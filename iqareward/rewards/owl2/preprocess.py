"""The inputs of mPLUG-Owl2: pixels as its Pillow pipeline makes them, and the scorers' prompts as token ids."""

from typing import Literal, NamedTuple

import torch.nn.functional as F
from torch import Tensor

from iqareward.functional._chunks import constant, free_threads
from iqareward.functional.resize import resize_levels, to_levels

Task = Literal["quality", "aesthetics"]

PAD_LEVELS = (122.0, 116.0, 104.0)  # CLIP's mean colour in whole levels
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class Prompt(NamedTuple):
    """Token ids before and after the image."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]


# "USER: How would you rate the quality of this image?\n<image>\nASSISTANT: The quality of the image is" in ids of the
# LLaMA sentencepiece vocabulary, as the scorers' own code made them with transformers 4.36. No tokenizer is used: later
# ones may drop BOS or split the text after the image differently, which changes scores.
PROMPTS: dict[Task, Prompt] = {
    "quality": Prompt(
        (1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13),
        (29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338),
    ),
    "aesthetics": Prompt(
        (1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 263, 342, 9188, 1199, 310, 445, 1967, 29973, 13),
        (29871, 13, 22933, 9047, 13566, 29901, 450, 263, 342, 9188, 1199, 310, 278, 1967, 338),
    ),
}

# " excellent", " good", " fair", " poor", " bad": one vocabulary piece each
LEVEL_IDS = (15129, 1781, 6534, 6460, 4319)


def preprocess(images: Tensor, image_size: int) -> Tensor:
    """Pad to a square with CLIP's mean colour, resize as Pillow's bicubic does, and normalise.

    Runs on the images' device. Gradients reach the pixels at their original resolution.

    Args:
        images: `[B, 3, H, W]` float in [0, 1]; rounded to 8 bits first.
        image_size: Side length of the result in pixels.

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
