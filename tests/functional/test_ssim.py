"""SSIM against a transcription with scipy, and what its options do."""

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from iqareward.functional import ssim
from iqareward.functional.color import luma
from iqareward.functional.filters import gaussian_taps
from tests.functional.pairs import textured
from tests.tolerances import FORMULA_FP32


def ssim_by_convolution(image, reference, size, sigma):
    """The paper's equations 12 to 14 on two float64 planes, moments by dense two-dimensional convolution."""
    offsets = np.arange(size) - (size - 1) / 2
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    window /= window.sum()

    def mean(plane):
        return convolve2d(plane, window, mode="valid")

    mu, mu_reference = mean(image), mean(reference)
    variance, variance_reference = mean(image**2) - mu**2, mean(reference**2) - mu_reference**2
    covariance = mean(image * reference) - mu * mu_reference
    numerator = (2 * mu * mu_reference + 0.01**2) * (2 * covariance + 0.03**2)
    denominator = (mu**2 + mu_reference**2 + 0.01**2) * (variance + variance_reference + 0.03**2)
    return (numerator / denominator).mean()


@pytest.mark.parametrize(("size", "sigma"), [(11, 1.5), (7, 1.5), (8, 2.0), (1, 1.0)])
@pytest.mark.parametrize("shape", [(24, 31), (11, 40)])
def test_definition(size: int, sigma: float, shape: tuple[int, int]) -> None:
    """Four blurs of sum and difference give the five moments of the paper, for any window."""
    images, references = textured(0, 2, *shape)
    scores = ssim(images, references, window_size=size, sigma=sigma)
    planes = zip(luma(images).numpy(), luma(references).numpy(), strict=True)
    expected = torch.tensor([ssim_by_convolution(*pair, size, sigma) for pair in planes], dtype=torch.float64)
    torch.testing.assert_close(scores, expected, **FORMULA_FP32)


def test_negative_structure() -> None:
    """An inverted texture scores near -1; nothing is floored at 0."""
    rng = torch.Generator().manual_seed(1)
    references = 0.5 + 0.2 * torch.randn(1, 1, 64, 64, generator=rng).clamp(-2, 2).expand(-1, 3, -1, -1)
    assert ssim(1 - references, references).item() < -0.9


def test_rgb_is_the_mean_over_channels() -> None:
    """`color="rgb"` averages the scores of the three channels taken as gray pictures."""
    images, references = textured(2, 2, 32, 32)
    channels = [ssim(images[:, [c]].expand(-1, 3, -1, -1), references[:, [c]].expand(-1, 3, -1, -1)) for c in range(3)]
    expected = torch.stack(channels).mean(0)
    torch.testing.assert_close(ssim(images, references, color="rgb"), expected, **FORMULA_FP32)


def test_luma8_is_luma_of_256_levels() -> None:
    """Rounding changes a faint picture's score, not that of one with 256 levels of luma; gradients pass."""
    images, references = textured(3, 2, 32, 32)
    gray = (255 * images[:, :1]).round().div(255).expand(-1, 3, -1, -1)
    gray_references = (255 * references[:, :1]).round().div(255).expand(-1, 3, -1, -1)
    torch.testing.assert_close(ssim(gray, gray_references, color="luma8"), ssim(gray, gray_references), **FORMULA_FP32)
    faint = (0.5 + 0.004 * (images - 0.5)).requires_grad_()
    rounded = ssim(faint, references, color="luma8")
    assert (rounded - ssim(faint, references)).abs().max() > 1e-4
    (gradient,) = torch.autograd.grad(rounded.sum(), faint)
    assert (gradient != 0).float().mean() > 0.9


def test_window_of_nothing() -> None:
    """Windows without a size or a width are refused."""
    images, references = textured(4, 1, 16, 16)
    with pytest.raises(ValueError, match="window_size"):
        ssim(images, references, window_size=0)
    with pytest.raises(ValueError, match="sigma"):
        ssim(images, references, sigma=0.0)


@pytest.mark.parametrize("size", [1, 2, 5, 11])
def test_gaussian_taps(size: int) -> None:
    """A window sums to 1 and is symmetric, odd or even."""
    taps = gaussian_taps(size, 1.5)
    assert sum(taps) == pytest.approx(1, abs=1e-15)
    assert taps == pytest.approx(taps[::-1], abs=1e-15)
