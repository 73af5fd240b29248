"""MS-SSIM: its scales, its exponents, and terms that have no real power."""

import pytest
import torch

from iqareward.functional import ms_ssim, ssim
from iqareward.functional.filters import halve
from iqareward.functional.ms_ssim import SCALE_WEIGHTS, floored_powers
from tests.functional.pairs import textured
from tests.tolerances import EXACT, FORMULA_FP32


def test_exponents() -> None:
    """The published exponents sum to 1."""
    assert sum(SCALE_WEIGHTS) == pytest.approx(1.0, abs=1e-4)


def test_brightness_counts_at_the_coarsest_scale_only() -> None:
    """Two flat pictures differ in luminance alone, which the coarsest of five scales weighs with its exponent."""
    images, references = (torch.full((1, 3, 176, 176), value, dtype=torch.float64) for value in (0.3, 0.6))
    expected = ssim(images, references) ** SCALE_WEIGHTS[-1]
    torch.testing.assert_close(ms_ssim(images, references), expected, **FORMULA_FP32)


def test_smaller_window_for_smaller_images() -> None:
    """A window of 7 brings the smallest side down to 97."""
    images, references = textured(0, 1, 97, 97)
    assert 0 < ms_ssim(images, references, window_size=7).item() < 1
    with pytest.raises(ValueError, match=">= 161"):
        ms_ssim(images, references)


def test_inverted_images_score_zero() -> None:
    """A negative mean contrast-structure term counts as 0, with gradient 0 rather than NaN or a complex number."""
    _, references = textured(1, 2, 161, 161)
    images = (1 - references).requires_grad_()
    scores = ms_ssim(images, references)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    torch.testing.assert_close(scores.detach(), torch.zeros(2, dtype=torch.float64), **EXACT)
    assert not gradient.any()


def test_floored_powers() -> None:
    """The power is exact above the line to 0, and value and gradient stay finite below."""
    bases = torch.tensor([-1.0, -1e-9, 0.0, 1e-9, 1e-6, 0.1, 1.0], dtype=torch.float64, requires_grad=True)
    (powers,) = floored_powers(bases[None], [0.0448])
    (gradient,) = torch.autograd.grad(powers.sum(), bases)
    assert gradient.isfinite().all()
    assert (powers.diff() >= 0).all()
    assert not powers[:3].any()
    torch.testing.assert_close(powers[4:], bases[4:] ** 0.0448, **FORMULA_FP32)
    torch.testing.assert_close(gradient[5:], 0.0448 * bases[5:].detach() ** (0.0448 - 1), **FORMULA_FP32)


def test_halve() -> None:
    """2x2 means; an odd side ends in its last line alone, repeated or against zeros."""
    maps = torch.arange(15.0).reshape(1, 3, 5)
    means = torch.tensor([[[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]])
    torch.testing.assert_close(halve(maps, replicate=True), means, **EXACT)
    against_zeros = torch.tensor([[[3.0, 5.0, 3.25], [5.25, 6.25, 3.5]]])
    torch.testing.assert_close(halve(maps, replicate=False), against_zeros, **EXACT)
