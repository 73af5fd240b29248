"""Colour correction takes colours from the degraded image and details from the restored one."""

import pytest
import torch
from torch.testing import assert_close

from iqareward.diffusion import match_colours


def smooth(count=2, size=64) -> torch.Tensor:
    """Random images without details."""
    coarse = torch.rand(count, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_a_tint_is_taken_away(method) -> None:
    """A constant offset of each channel and image disappears."""
    tint = torch.tensor([[0.1, -0.05, 0.2], [-0.2, 0.0, 0.1]])[:, :, None, None]
    assert_close(match_colours(smooth() + tint, smooth(), method=method), smooth(), atol=1e-3, rtol=0)


def test_contrast_is_that_of_the_degraded_image() -> None:
    """Mean and standard deviation of each channel."""
    images = 0.3 * torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    fixed = match_colours(images, smooth(size=32), method="adain")
    assert_close(torch.std_mean(fixed, (2, 3)), torch.std_mean(smooth(size=32), (2, 3)), atol=1e-4, rtol=0)


def test_details_stay_with_wavelets() -> None:
    """A local tint disappears, while a checkerboard that only the restored image has stays."""
    checkers = 0.1 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(32, 32)
    ramp = torch.linspace(-0.2, 0.2, 64)
    fixed = match_colours(smooth() + checkers + ramp, smooth())
    assert_close(fixed[..., 8:-8, 24:-24], (smooth() + checkers)[..., 8:-8, 24:-24], atol=0.01, rtol=0)


@pytest.mark.parametrize("method", ["adain", "wavelet"])
def test_degraded_images_may_be_smaller(method) -> None:
    """Colours come from a degraded image of a quarter of the size, row by row, with a gradient to the restored one."""
    images = smooth().add(0.2).requires_grad_()
    fixed = match_colours(images, smooth(size=16), method=method)
    assert fixed.shape == images.shape
    assert_close(fixed.mean((2, 3)), smooth(size=16).mean((2, 3)), atol=0.01, rtol=0)
    assert_close(match_colours(images[1:], smooth(size=16)[1:], method=method), fixed[1:], atol=1e-6, rtol=0)
    fixed.square().sum().backward()
    assert images.grad.isfinite().all()


def test_unknown_methods_are_refused() -> None:
    """The error names both methods."""
    with pytest.raises(ValueError, match="'adain' or 'wavelet', got 'lab'"):
        match_colours(smooth(), smooth(), method="lab")
