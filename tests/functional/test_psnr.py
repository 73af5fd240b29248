"""PSNR: closed-form values."""

import math

import pytest
import torch

from iqareward.functional import psnr
from iqareward.functional.color import LUMA
from tests.functional.pairs import textured
from tests.tolerances import FORMULA_FP32


@pytest.mark.parametrize("difference", [0.5, 0.1, 1 / 255, 1e-4])
def test_constant_difference(difference: float) -> None:
    """A difference d everywhere is -20 log10 d dB."""
    references = torch.full((2, 3, 5, 7), 0.25, dtype=torch.float64)
    expected = torch.full((2,), -20 * math.log10(difference), dtype=torch.float64)
    torch.testing.assert_close(psnr(references + difference, references), expected, **FORMULA_FP32)


def test_cap() -> None:
    """Differences below 1e-5 are indistinguishable from none: 100 dB, and no gradient."""
    references = torch.full((1, 3, 4, 4), 0.5, dtype=torch.float64)
    images = (references + 1e-6).requires_grad_()
    score = psnr(images, references)
    score.sum().backward()
    torch.testing.assert_close(score.detach(), torch.full((1,), 100.0, dtype=torch.float64), **FORMULA_FP32)
    assert images.grad is not None
    assert not images.grad.any()


def test_luma_sees_no_chroma() -> None:
    """An error in blue alone counts 20 log10(1/0.114) = 18.86 dB less in luma than in its own channel."""
    references = torch.full((1, 3, 6, 6), 0.5, dtype=torch.float64)
    images = references.clone()
    images[:, 2] += 0.1
    luma, rgb = psnr(images, references, color="luma"), psnr(images, references)
    expected = torch.tensor([20 - 20 * math.log10(LUMA[2])], dtype=torch.float64)
    torch.testing.assert_close(luma, expected, **FORMULA_FP32)
    torch.testing.assert_close(rgb, torch.tensor([20 + 10 * math.log10(3)], dtype=torch.float64), **FORMULA_FP32)


def test_one_row_of_another_length() -> None:
    """Every pixel counts once at sizes that divide into nothing."""
    images, references = textured(0, 2, 13, 37)
    expected = -10 * torch.log10((images - references).square().mean(dim=(1, 2, 3)))
    torch.testing.assert_close(psnr(images, references), expected, **FORMULA_FP32)
