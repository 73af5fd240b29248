"""Colour correction: restored images take the colours of the degraded ones, which latent models drift away from."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from iqareward.functional._chunks import constant

_LEVELS = 5  # blurs by kernels of 3, 5, 9, 17 and 33 pixels, one after the other


def match_colours(images: Tensor, degraded: Tensor, *, method: Literal["adain", "wavelet"] = "wavelet") -> Tensor:
    """Give restored images the colours of the degraded ones.

    Args:
        images: `[N, 3, H, W]` restored images in [0, 1].
        degraded: `[N, 3, h, w]` in [0, 1]; other sizes are resized.
        method: "adain" takes mean and standard deviation of each channel from the degraded image, "wavelet" its low
            frequencies, which also corrects colours that differ from place to place.

    Returns:
        `[N, 3, H, W]` fp32, in [0, 1] up to overshoots; gradients flow into `images`.

    Example:
        >>> degraded = torch.rand(1, 3, 16, 16)
        >>> tinted = 0.8 * degraded + 0.1
        >>> torch.allclose(match_colours(tinted, degraded, method="adain"), degraded, atol=1e-3)
        True

    References:
        Wang et al., Exploiting Diffusion Prior for Real-World Image Super-Resolution, 2023,
        https://arxiv.org/abs/2305.07015 (both methods)
    """
    images, degraded = images.float(), resized(degraded.float(), images.shape[-2:])
    if method == "wavelet":
        return images - _blurred(images) + _blurred(degraded)
    if method != "adain":
        raise ValueError(f"match_colours expected method 'adain' or 'wavelet', got {method!r}.")
    std, mean = torch.std_mean(images, (2, 3), keepdim=True)
    target_std, target_mean = torch.std_mean(degraded, (2, 3), keepdim=True)
    return (images - mean) / (std + 1e-5) * target_std + target_mean  # a flat image has no contrast to scale


def resized(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images `[N, 3, H, W]` in [0, 1] resized to `size` by bicubic interpolation."""
    if images.shape[-2:] == tuple(size):
        return images
    return nn.functional.interpolate(images, tuple(size), mode="bicubic").clamp(0, 1)


def _blurred(images: Tensor) -> Tensor:
    """The low frequencies: a binomial kernel with holes, which doubles its width at each level."""
    row = constant((0.25, 0.5, 0.25), torch.float32, images.device)
    kernel = torch.outer(row, row).expand(images.shape[1], 1, 3, 3)
    for level in range(_LEVELS):
        width = 2**level
        padded = nn.functional.pad(images, (width,) * 4, mode="replicate")
        images = nn.functional.conv2d(padded, kernel, groups=images.shape[1], dilation=width)
    return images
