"""GMSD against a transcription of the published algorithm with scipy."""

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from iqareward.functional import gmsd
from iqareward.functional.color import luma
from tests.functional.pairs import textured
from tests.tolerances import FORMULA_FP32


def conv2_same(plane, kernel):
    """MATLAB's conv2(plane, kernel, 'same'), whose centre of an even kernel lies one further than scipy's."""
    full = convolve2d(plane, kernel)
    top, left = (side // 2 for side in kernel.shape)
    return full[top : top + plane.shape[0], left : left + plane.shape[1]]


def gmsd_by_convolution(image, reference):
    """Two float64 luma planes on the 0..255 scale of the paper."""
    prewitt = np.array([[1, 0, -1]] * 3) / 3
    magnitudes = []
    for plane in (image, reference):
        halved = conv2_same(255 * plane, np.ones((2, 2)) / 4)[::2, ::2]
        magnitudes.append(np.hypot(conv2_same(halved, prewitt), conv2_same(halved, prewitt.T)))
    ours, theirs = magnitudes
    return ((2 * ours * theirs + 170) / (ours**2 + theirs**2 + 170)).std(ddof=1)


@pytest.mark.parametrize("shape", [(32, 32), (33, 40), (31, 47), (6, 6)])
def test_definition(shape: tuple[int, int]) -> None:
    """Means, gradients, borders and deviation are the paper's, at odd sizes too."""
    images, references = textured(0, 2, *shape)
    planes = zip(luma(images).numpy(), luma(references).numpy(), strict=True)
    expected = torch.tensor([gmsd_by_convolution(*pair) for pair in planes], dtype=torch.float64)
    torch.testing.assert_close(gmsd(images, references), expected, **FORMULA_FP32)


def test_uniform_change_is_no_deviation() -> None:
    """GMSD pools by deviation: two flat pictures of different brightness differ only along the border."""
    images, references = (torch.full((1, 3, 64, 64), value, dtype=torch.float64) for value in (0.2, 0.21))
    assert 0 < gmsd(images, references).item() < 1e-3


def test_rgb_is_refused() -> None:
    """The metric is defined on luma; channels are not averaged in silence."""
    images, references = textured(1, 1, 16, 16)
    with pytest.raises(ValueError, match='gmsd expected `color` to be "luma" or "luma8"'):
        gmsd(images, references, color="rgb")  # type: ignore[arg-type]
