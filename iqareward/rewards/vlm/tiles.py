"""Pixels for vision towers of one fixed size: an image as a set of square tiles, and the whole of it made small."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward.functional.resize import resize_levels, to_levels
from iqareward.rewards.vlm.patches import ImageInputs, normalize

Size = tuple[int, int]


def cut(levels: Tensor, tile: Size) -> Tensor:
    """`[B, 3, r*h, c*w]` as `[B, r*c, 3, h, w]`, row by row."""
    batch, channels, height, width = levels.shape
    rows, columns = height // tile[0], width // tile[1]
    tiles = levels.reshape(batch, channels, rows, tile[0], columns, tile[1])
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels, *tile)


def best_canvas(size: Size, canvases: tuple[Size, ...]) -> Size:
    """The canvas that keeps most of an image's pixels when it is fitted inside, then the one with least waste.

    Example:
        >>> best_canvas((500, 1000), ((384, 384), (384, 768), (768, 768)))
        (384, 768)
    """

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        kept = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return kept, kept - canvas[0] * canvas[1]

    return max(canvases, key=merit)  # the first of equals


@dataclass(frozen=True)
class FittedTiles:
    """How LLaVA-OneVision sees images: fitted into the best canvas, padded with black, cut into tiles.

    Resizes as Pillow does, as the model was trained; the processor of transformers 5 resizes by torchvision, up to 2 of
    255 levels apart.
    """

    tile: Size
    canvases: tuple[Size, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> ImageInputs:
        """Inputs for clean images `[B, 3, H, W]` in [0, 1]."""
        levels = to_levels(images)
        size: Size = (images.shape[-2], images.shape[-1])
        canvas = best_canvas(size, self.canvases)
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        tight = 0 if canvas[0] / size[0] <= canvas[1] / size[1] else 1  # the side that fills the canvas
        fitted = [min(math.ceil(side * scale), limit) for side, limit in zip(size, canvas, strict=True)]
        fitted[tight] = canvas[tight]
        top, left = (canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2
        padding = (left, canvas[1] - fitted[1] - left, top, canvas[0] - fitted[0] - top)
        padded = F.pad(resize_levels(levels, (fitted[0], fitted[1])), padding)
        tiles = torch.cat([resize_levels(levels, self.tile)[:, None], cut(padded, self.tile)], dim=1)
        pixels = normalize(tiles.flatten(0, 1), self.mean, self.std).unflatten(0, tiles.shape[:2])
        return ImageInputs({"pixel_values": pixels, "image_sizes": [size] * images.shape[0]}, None)


def best_grid(size: Size, tile: Size, *, min_tiles: int, max_tiles: int) -> Size:
    """Rows and columns of tiles whose aspect ratio is nearest to the image's.

    Of equally near grids it is the largest that asks for at most twice the image's pixels.

    Example:
        >>> best_grid((500, 1000), (448, 448), min_tiles=1, max_tiles=12)
        (1, 2)
    """
    aspect, area = size[1] / size[0], size[0] * size[1]
    grids = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1)]
    grids = sorted((g for g in grids if min_tiles <= g[0] * g[1] <= max_tiles), key=lambda g: g[0] * g[1])
    columns, rows, nearest = 1, 1, math.inf
    for c, r in grids:
        distance = abs(aspect - c / r)
        worth_it = area > 0.5 * tile[0] * tile[1] * c * r
        if distance < nearest or (distance == nearest and worth_it):
            columns, rows, nearest = c, r, distance
    return rows, columns


@dataclass(frozen=True)
class StretchedTiles:
    """How InternVL sees images: stretched to the grid of tiles of the nearest aspect ratio, then a thumbnail.

    Resizes as Pillow does, as the model was trained; the processor of transformers 5 resizes by torchvision, up to 2 of
    255 levels apart.
    """

    tile: Size
    min_tiles: int
    max_tiles: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, images: Tensor) -> ImageInputs:
        """Inputs for clean images `[B, 3, H, W]` in [0, 1]."""
        levels = to_levels(images)
        size: Size = (images.shape[-2], images.shape[-1])
        rows, columns = best_grid(size, self.tile, min_tiles=self.min_tiles, max_tiles=self.max_tiles)
        tiles = cut(resize_levels(levels, (rows * self.tile[0], columns * self.tile[1])), self.tile)
        if rows * columns > 1:
            tiles = torch.cat([tiles, resize_levels(levels, self.tile)[:, None]], dim=1)
        return ImageInputs({"pixel_values": normalize(tiles.flatten(0, 1), self.mean, self.std)}, None)
