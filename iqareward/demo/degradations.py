"""Four ways to damage a photograph, each in five strengths whose order nobody disputes."""

# ruff: noqa: RUF001  typographic signs are meant

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from iqareward.images import to_images


def blur(photo: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """Gaussian blur with mirrored borders; `sigma` in pixels."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=photo.dtype, device=photo.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(photo[None], (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.mT, groups=3)[0]


def noise(photo: Tensor, sigma: float, generator: torch.Generator) -> Tensor:
    """White Gaussian noise, independent per colour; `sigma` in steps of 1/255."""
    field = torch.randn(photo.shape, generator=generator, dtype=photo.dtype, device=generator.device)
    return photo + field.to(photo.device) * (sigma / 255)


def jpeg(photo: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    """A round trip through a JPEG file; `quality` in [1, 95] as Pillow counts."""
    stream = io.BytesIO()
    to_pil(photo).save(stream, format="JPEG", quality=round(quality))
    return to_images(Image.open(stream))[0]


def resize(photo: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    """Shrunk `factor` times and enlarged again, bicubic: what super-resolution starts from."""
    height, width = photo.shape[1:]
    small = (max(1, round(height / factor)), max(1, round(width / factor)))
    shrunk = F.interpolate(photo[None], size=small, mode="bicubic", align_corners=False, antialias=True)
    return F.interpolate(shrunk, size=(height, width), mode="bicubic", align_corners=False)[0]


@dataclass(frozen=True)
class Degradation:
    """A way to damage a photograph.

    Attributes:
        name: in tables and files.
        setting: format of a strength.
        strengths: mildest first.
        apply: `apply(photo, strength, generator)` on `[3, H, W]`.
    """

    name: str
    setting: str
    strengths: tuple[float, ...]
    apply: Callable[[Tensor, float, torch.Generator], Tensor]

    def written(self, level: int) -> str:
        """The strength of a level as people write it; level 0 is the original."""
        return self.setting.format(self.strengths[level - 1]) if level else "original"


DEGRADATIONS = (
    Degradation("blur", "σ {:g} px", (0.6, 1.2, 2.0, 3.2, 5.0), blur),
    Degradation("noise", "σ {:g}/255", (3, 8, 15, 28, 50), noise),
    Degradation("JPEG", "quality {:g}", (80, 50, 30, 15, 7), jpeg),
    Degradation("resize", "÷{0:g} ×{0:g}", (1.5, 2, 3, 4, 6), resize),
)


def degrade(photo: Tensor, degradation: Degradation, num_levels: int, seed: int) -> Tensor:
    """The photograph and its damaged versions, mildest first; `[num_levels + 1, 3, H, W]`, every picture 8-bit exact.

    Args:
        photo: `[3, H, W]` float RGB in [0, 1].
        degradation: one of `DEGRADATIONS`.
        num_levels: at most the number of its strengths; fewer levels leave out the strongest.
        seed: of the noise; the same seed gives the same pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    strengths = degradation.strengths[:num_levels]
    damaged = [degradation.apply(photo, strength, generator) for strength in strengths]
    return eight_bit(torch.stack([photo, *damaged]))


def eight_bit(pixels: Tensor) -> Tensor:
    """Pixels as a file would keep them: clamped to [0, 1] and rounded to steps of 1/255."""
    return (pixels.clamp(0, 1) * 255).round() / 255


def to_pil(picture: Tensor) -> Image.Image:
    """`[3, H, W]` in [0, 1] as a PIL image."""
    levels = (picture.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(levels.movedim(0, -1).cpu().numpy())
