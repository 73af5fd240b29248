"""HaarPSI against a transcription of the published algorithm with scipy."""

import numpy as np
import pytest
import torch

from iqareward.functional import haarpsi
from tests.functional.pairs import textured
from tests.functional.test_gmsd import conv2_same
from tests.tolerances import EXACT, FORMULA_FP32

YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def similarity(first, second):
    return (2 * first * second + 30) / (first**2 + second**2 + 30)


def haarpsi_by_convolution(image, reference):
    """Two `[3, H, W]` float64 pictures on the 0..255 scale of the paper, dense Haar kernels, equation by equation."""
    mean = np.ones((2, 2)) / 4
    halved = [
        [conv2_same(plane, mean)[::2, ::2] for plane in np.tensordot(YIQ, 255 * rgb, 1)] for rgb in (image, reference)
    ]
    similarities, weights = [], []
    for transpose in (False, True):
        responses = []
        for scale in (1, 2, 3):
            kernel = np.ones((2**scale, 2**scale)) / 2**scale
            kernel[: 2 ** (scale - 1)] *= -1
            kernel = kernel.T if transpose else kernel
            responses.append([np.abs(conv2_same(planes[0], kernel)) for planes in halved])
        similarities.append((similarity(*responses[0]) + similarity(*responses[1])) / 2)
        weights.append(np.maximum(*responses[2]))
    chroma = [similarity(*(np.abs(conv2_same(planes[row], mean)) for planes in halved)) for row in (1, 2)]
    similarities, weights = [*similarities, sum(chroma) / 2], [*weights, sum(weights) / 2]
    squashed = 1 / (1 + np.exp(-4.2 * np.stack(similarities)))
    share = (squashed * np.stack(weights)).sum() / np.stack(weights).sum()
    return (np.log(share / (1 - share)) / 4.2) ** 2


@pytest.mark.parametrize("shape", [(32, 32), (33, 40), (31, 47), (16, 16)])
def test_definition(shape: tuple[int, int]) -> None:
    """Planes, Haar responses, borders, weights and pooling are the paper's, at odd sizes too."""
    images, references = textured(0, 2, *shape)
    pairs = zip(images.numpy(), references.numpy(), strict=True)
    expected = torch.tensor([haarpsi_by_convolution(*pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(haarpsi(images, references), expected, **FORMULA_FP32)


def test_black_pictures() -> None:
    """Two black pictures have no edge to weigh by and score 1; against black a texture scores low."""
    black = torch.zeros(1, 3, 64, 64)
    _, references = textured(1, 1, 64, 64)
    torch.testing.assert_close(haarpsi(black, black), torch.ones(1), **EXACT)
    assert haarpsi(black, references.float()).item() < 0.3


def test_colour_counts() -> None:
    """Swapping red and blue of a coloured texture lowers the score although every edge stays in place."""
    _, references = textured(2, 2, 64, 64)
    luma_weights = torch.tensor(YIQ[0]).reshape(3, 1, 1)
    swapped = references.flip(1)
    swapped = swapped + ((references - swapped) * luma_weights).sum(1, keepdim=True)  # the same luma
    assert (haarpsi(swapped, references) < 0.99).all()
