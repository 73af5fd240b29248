"""Four photographs that come with scikit-image and belong to nobody: the demo's ground truth."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from iqareward.images import to_images
from iqareward.optional import require


@dataclass(frozen=True)
class Photograph:
    """A bundled photograph.

    Attributes:
        name: of the function in `skimage.data`, and in tables.
        credit: what it shows, who made it, its licence.
        focus: (x, y) in [0, 1], the middle of the part that the report shows.
    """

    name: str
    credit: str
    focus: tuple[float, float]


PHOTOGRAPHS = (
    Photograph("chelsea", "Chelsea the cat, Stefan van der Walt, CC0", (0.45, 0.50)),
    Photograph("astronaut", "Eileen Collins, NASA, public domain", (0.42, 0.26)),
    Photograph("coffee", "Coffee cup, Rachel Michetti for Pikolo Espresso Bar, CC0", (0.58, 0.62)),
    Photograph("rocket", "DSCOVR on its Falcon 9, SpaceX, public domain", (0.52, 0.80)),
)


DETAIL_SIDE = 176
"""Pixels of a detail: six of them side by side fill the page, so that a screen shows them at their own size."""


def load_photograph(name: str, short_side: int | None = None) -> Tensor:
    """A photograph of scikit-image as `[3, H, W]` float RGB in [0, 1].

    Args:
        name: of the function in `skimage.data`.
        short_side: shrink larger ones to this many pixels on the shorter side; None = as it is.

    Raises:
        ImportError: scikit-image is missing.
    """
    data: Any = require("skimage.data", extra="demo", purpose="iqareward demo")
    pixels: np.ndarray = getattr(data, name)()
    image = Image.fromarray(pixels)
    if short_side is not None and short_side < min(image.size):
        scale = short_side / min(image.size)
        size = (round(image.width * scale), round(image.height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    return to_images(image)[0]


def detail(picture: Tensor, focus: tuple[float, float], side: int) -> Tensor:
    """The square of at most `side` pixels around `focus`, pixel for pixel; `[3, s, s]`.

    Example:
        >>> import torch
        >>> detail(torch.zeros(3, 100, 200), (1.0, 0.5), 40).shape
        torch.Size([3, 40, 40])
    """
    height, width = picture.shape[1:]
    side = min(side, height, width)
    top = min(max(round(focus[1] * height) - side // 2, 0), height - side)
    left = min(max(round(focus[0] * width) - side // 2, 0), width - side)
    return picture[:, top : top + side, left : left + side]
