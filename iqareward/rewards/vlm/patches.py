"""Pixels for the vision towers of the Qwen family: an image of any size as one grid of patches."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iqareward.functional.resize import resize_levels, to_levels

MAX_ASPECT = 200  # beyond it the models' own processors refuse an image


class ImageInputs(NamedTuple):
    """What a model's `get_image_features` is called with.

    Attributes:
        keywords: its arguments.
        grid: rows and columns of the image's tokens, where positions are two-dimensional (M-RoPE).
    """

    keywords: dict[str, Any]
    grid: tuple[int, int] | None


def smart_size(height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int] | None:
    """The size that the Qwen family gives an image: sides that are multiples of `factor`, about as many pixels.

    Args:
        height: of the image.
        width: of the image.
        factor: side of an image token in pixels.
        min_pixels: smaller results grow, keeping the aspect ratio.
        max_pixels: larger results shrink.

    Returns:
        (height, width); None for an image more than 200 times as long as wide, which the models do not take.

    Example:
        >>> smart_size(1024, 768, factor=28, min_pixels=3136, max_pixels=12845056)
        (1036, 756)
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        return None
    # round() takes halves to the even neighbour, as the models' processors do
    rows, columns = round(height / factor), round(width / factor)
    if rows * columns * factor**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(side / shrink / factor)) for side in (height, width))
    elif rows * columns * factor**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) for side in (height, width))
    return rows * factor, columns * factor


def normalize(levels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Levels 0..255 `[B, 3, H, W]` in units of `std` around `mean`, channel by channel; numbers stay on the host."""
    channels = [(levels[:, i] / 255 - mean[i]) / std[i] for i in range(3)]
    return torch.stack(channels, dim=1)


def patchify(pixels: Tensor, *, patch_size: int, merge_size: int, temporal_size: int) -> Tensor:
    """Cut normalised images into the rows that the vision tower reads.

    Args:
        pixels: `[B, 3, H, W]`, sides multiples of `patch_size * merge_size`.
        patch_size: side of a patch.
        merge_size: patches that become one token stand together: blocks of `merge_size x merge_size`.
        temporal_size: a still image is that many equal frames.

    Returns:
        `[B * H/patch * W/patch, 3 * temporal_size * patch_size**2]`, image after image.
    """
    batch, channels, height, width = pixels.shape
    side = patch_size * merge_size
    blocks = pixels.reshape(
        batch, channels, height // side, merge_size, patch_size, width // side, merge_size, patch_size
    )
    blocks = blocks.permute(0, 2, 5, 3, 6, 1, 4, 7)  # batch, block row, block column, row, column, channel, patch
    frames = blocks[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, temporal_size, -1, -1)
    return frames.reshape(-1, channels * temporal_size * patch_size**2)


@dataclass(frozen=True)
class PatchGrid:
    """How Qwen2.5-VL, Qwen3-VL and Qwen3.5 see images: smart resize, then one grid of patches.

    Resizes as Pillow does, which is how these models' scorers were published. The image processors of transformers 5
    resize by torchvision instead, up to 2 of 255 levels apart. Images whose sides are multiples of
    `patch_size * merge_size` within the pixel limits are not resized at all, and both agree exactly.
    """

    patch_size: int
    merge_size: int
    temporal_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> ImageInputs | None:
        """Inputs for clean images `[B, 3, H, W]` in [0, 1]; None if the model takes no image of that shape."""
        size = smart_size(
            *images.shape[-2:],
            factor=self.patch_size * self.merge_size,
            min_pixels=self.min_pixels,
            max_pixels=self.max_pixels,
        )
        if size is None:
            return None
        pixels = normalize(resize_levels(to_levels(images), size), self.mean, self.std)
        rows = patchify(
            pixels, patch_size=self.patch_size, merge_size=self.merge_size, temporal_size=self.temporal_size
        )
        grid = [1, size[0] // self.patch_size, size[1] // self.patch_size]
        # On the host: the vision tower reads numbers out of it.
        shapes = torch.tensor([grid] * images.shape[0])
        merged = (grid[1] // self.merge_size, grid[2] // self.merge_size)
        return ImageInputs({"pixel_values": rows, "image_grid_thw": shapes}, merged)
