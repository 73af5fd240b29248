"""Plain statistics of images that cheap ways to please a judge move: one number per image, no better direction."""

import torch
from torch import Tensor

from iqareward.functional._checks import check_images
from iqareward.functional._fused import correlate
from iqareward.functional.color import luma

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
    images = check_images("saturation_share", images)
    clipped = ((images <= CLIPPED) | (images >= 1 - CLIPPED)).any(1)
    return _unless_broken(clipped.float().flatten(1).mean(1), images)


def colorfulness(images: Tensor) -> Tensor:
    """Mean difference between the largest and the smallest channel: 0 for grey.

    Args:
        images: `[B, 3, H, W]` in [0, 1].

    Example:
        >>> colorfulness(torch.full((1, 3, 8, 8), 0.3))
        tensor([0.])
    """
    images = check_images("colorfulness", images)
    return _unless_broken((images.amax(1) - images.amin(1)).flatten(1).mean(1), images)


def dark_fraction(images: Tensor) -> Tensor:
    """Share of pixels with luma below 0.1.

    Args:
        images: `[B, 3, H, W]` in [0, 1].

    Example:
        >>> dark_fraction(torch.zeros(1, 3, 8, 8))
        tensor([1.])
    """
    images = check_images("dark_fraction", images)
    return _unless_broken((luma(images) < DARK).float().flatten(1).mean(1), images)


def edge_density(images: Tensor) -> Tensor:
    """Mean length of the luma gradient (Sobel), in grey levels per pixel: rises with sharpening, ringing and noise.

    Args:
        images: `[B, 3, H, W]` in [0, 1], sides at least 3.

    Example:
        >>> ramp = torch.linspace(0, 0.7, 8).expand(1, 3, 8, 8)
        >>> edge_density(ramp)
        tensor([0.1000])
    """
    images = check_images("edge_density", images, min_side=3)
    planes = luma(images).view(-1, *images.shape[2:])
    slopes = [
        correlate(
            correlate(planes, (-0.5, 0.0, 0.5), is_vertical=is_vertical), (0.25, 0.5, 0.25), is_vertical=not is_vertical
        )
        for is_vertical in (False, True)
    ]
    return _unless_broken(torch.stack(slopes).norm(dim=0).flatten(1).mean(1), images)


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
    images = check_images("high_frequency_share", images)
    planes = luma(images).view(-1, *images.shape[2:])
    planes = torch.where(planes.isfinite(), planes, 0.0)
    power = torch.fft.fft2(planes - planes.mean((1, 2), keepdim=True)).abs().square()
    rows, columns = (torch.fft.fftfreq(side, device=images.device).abs() for side in images.shape[2:])
    high = torch.maximum(rows[:, None], columns[None]) > 0.25
    total = power.sum((1, 2))
    # A flat image leaves rounding noise only, whose share says nothing.
    flat = total < 1e-10 * planes[0].numel() ** 2
    return _unless_broken(torch.where(flat, 0.0, (power * high).sum((1, 2)) / total), images)


def _unless_broken(values: Tensor, images: Tensor) -> Tensor:
    return torch.where(images.isfinite().flatten(1).all(1), values, torch.nan)
