"""Plain statistics of images that cheap ways to please a judge move: one number per image, no better direction."""

from collections.abc import Callable

import torch
from torch import Tensor

from iqareward.functional._checks import check_images
from iqareward.functional._chunks import map_chunks
from iqareward.functional._fused import correlate
from iqareward.functional.color import luma
from iqareward.functional.filters import mean_of_map

DARK = 0.1
CLIPPED = 1 / 255  # nearer to 0 or 1 than this is saturated


def saturation_share(images: Tensor) -> Tensor:
    """Share of pixels with a channel at 0 or 1: burnt highlights, crushed shadows.

    Args:
        images: `[B, 3, H, W]` in [0, 1].

    Returns:
        `[B]` fp32 in [0, 1]; NaN for images with non-finite pixels.

    Example:
        >>> saturation_share(torch.ones(1, 3, 8, 8))
        tensor([1.])
    """

    def share(rows: Tensor) -> Tensor:
        return ((rows <= CLIPPED) | (rows >= 1 - CLIPPED)).any(1).float().flatten(1).mean(1)

    return _statistic("saturation_share", share, images)


def colorfulness(images: Tensor) -> Tensor:
    """Mean difference between the largest and the smallest channel: 0 for grey.

    Args:
        images: `[B, 3, H, W]` in [0, 1].

    Example:
        >>> colorfulness(torch.full((1, 3, 8, 8), 0.3))
        tensor([0.])
    """
    return _statistic("colorfulness", lambda rows: mean_of_map(rows.amax(1) - rows.amin(1)), images)


def dark_fraction(images: Tensor) -> Tensor:
    """Share of pixels with luma below 0.1.

    Args:
        images: `[B, 3, H, W]` in [0, 1].

    Example:
        >>> dark_fraction(torch.zeros(1, 3, 8, 8))
        tensor([1.])
    """
    return _statistic("dark_fraction", lambda rows: (luma(rows) < DARK).float().flatten(1).mean(1), images)


def edge_density(images: Tensor) -> Tensor:
    """Mean length of the luma gradient (Sobel), in grey levels per pixel: rises with sharpening, ringing and noise.

    Args:
        images: `[B, 3, H, W]` in [0, 1], sides at least 3.

    Example:
        >>> ramp = torch.linspace(0, 0.7, 8).expand(1, 3, 8, 8)
        >>> edge_density(ramp)
        tensor([0.1000])
    """

    def density(rows: Tensor) -> Tensor:
        planes, across, along = luma(rows), (-0.5, 0.0, 0.5), (0.25, 0.5, 0.25)
        slopes = [
            correlate(correlate(planes, across, is_vertical=is_vertical), along, is_vertical=not is_vertical)
            for is_vertical in (False, True)
        ]
        return mean_of_map(torch.stack(slopes).norm(dim=0))

    return _statistic("edge_density", density, images, min_side=3)


def high_frequency_share(images: Tensor) -> Tensor:
    """Share of the luma's variance above half the Nyquist frequency: rises with added noise and invented texture.

    Args:
        images: `[B, 3, H, W]` in [0, 1].

    Returns:
        `[B]` fp32 in [0, 1]; 0 for flat images, NaN for images with non-finite pixels.

    Example:
        >>> checkerboard = torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(4, 4).expand(1, 3, 8, 8)
        >>> high_frequency_share(checkerboard)
        tensor([1.])
    """

    def share(rows: Tensor) -> Tensor:
        planes = luma(rows)
        planes = torch.where(planes.isfinite(), planes, 0.0)
        power = torch.fft.fft2(planes - mean_of_map(planes)[:, None, None]).abs().square()
        vertical, horizontal = (torch.fft.fftfreq(side, device=rows.device).abs() for side in rows.shape[2:])
        high = torch.maximum(vertical[:, None], horizontal[None]) > 0.25
        shown, total = mean_of_map(power * high), mean_of_map(power)
        # A flat image leaves rounding noise only, whose share says nothing.
        return torch.where(total < 1e-10 * planes.shape[1:].numel(), 0.0, shown / total)

    return _statistic("high_frequency_share", share, images)


def _statistic(name: str, formula: Callable[[Tensor], Tensor], images: Tensor, *, min_side: int = 1) -> Tensor:
    """A formula of each image in pieces; NaN for images with non-finite pixels."""

    def unless_broken(rows: Tensor) -> Tensor:
        return torch.where(rows.isfinite().flatten(1).all(1), formula(rows), torch.nan)

    return map_chunks(unless_broken, check_images(name, images, min_side=min_side))
