"""Haar wavelet-based perceptual similarity index."""

import torch
from torch import Tensor

from iqareward.functional._checks import check_pair
from iqareward.functional._chunks import map_chunks
from iqareward.functional.color import YIQ, weighted_channels
from iqareward.functional.filters import halve, mean_of_map, pad_zeros

MIN_SIDE = 16  # the coarsest Haar filter is 8 wide, after halving
_NUM_SCALES = 3
_SIMILARITY_CONSTANT = 30 / 255**2  # C of the paper, for pixels in [0, 1]
_SIGMOID_SLOPE = 4.2  # alpha of the paper
# Added to every weight: without a single edge in either image (two black ones) the weighted mean becomes the plain one,
# which is 1, rather than 0 / 0. A real picture's weights are 1e-3 to 1, so its score does not change.
_MIN_WEIGHT = 1e-12


def _haar_magnitudes(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Absolute Haar responses of `[..., H, W]`: `[4, ..., H, W]` of the two fine scales, `[2, ..., H, W]` of the last.

    Each scale has one across rows, then one across columns. Scale k answers with 2^-k (sum of one half of a 2^k square
    - sum of the other), from block sums that double in side and are halved at each scale. Zeros lie beyond the border
    as in MATLAB's `conv2(..., 'same')`.
    """
    height, width = maps.shape[-2:]
    widest = 2**_NUM_SCALES
    blocks = pad_zeros(maps * 0.5, widest // 2 - 1, widest // 2)
    responses = []
    for scale in range(1, _NUM_SCALES + 1):
        half = 2 ** (scale - 1)
        wide = blocks[..., :-half] + blocks[..., half:]
        tall = blocks[..., :-half, :] + blocks[..., half:, :]
        start = widest // 2 - half
        rows, columns = slice(start, start + height), slice(start, start + width)
        across_rows = (wide[..., :-half, :] - wide[..., half:, :])[..., rows, columns]
        across_columns = (tall[..., :-half] - tall[..., half:])[..., rows, columns]
        responses += [across_rows, across_columns]
        if scale < _NUM_SCALES:
            blocks = (wide[..., :-half, :] + wide[..., half:, :]).mul_(0.5)
    return torch.stack(responses[:-2]).abs(), torch.stack(responses[-2:]).abs()


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """1 where the magnitudes agree, towards 0 where they do not."""
    ratio = 2 * first * second + _SIMILARITY_CONSTANT
    return ratio / (first.square() + second.square() + _SIMILARITY_CONSTANT)


def _luma_maps(pair: Tensor) -> tuple[Tensor, Tensor]:
    """Similarities and weights `[2, B, H, W]`, one per orientation, of a luma pair `[2, B, H, W]`."""
    fine, coarse = _haar_magnitudes(pair)
    similarities = similarity(fine[:, 0], fine[:, 1])
    return (similarities[:2] + similarities[2:]) / 2, torch.maximum(coarse[:, 0], coarse[:, 1])


def _chroma_map(pair: Tensor) -> Tensor:
    """Mean similarity `[B, H, W]` of the two chroma planes of a halved RGB pair `[2, B, 3, H, W]`, after a 2x2 mean."""
    padded = pad_zeros(torch.stack([weighted_channels(pair, row) for row in YIQ[1:]]), 0, 1)
    rows = padded[..., :-1, :] + padded[..., 1:, :]
    means = (rows[..., :-1] + rows[..., 1:]).abs() / 4
    similarities = similarity(means[:, 0], means[:, 1])
    return (similarities[0] + similarities[1]) / 2


def haarpsi(images: Tensor, references: Tensor) -> Tensor:
    """Haar wavelet-based perceptual similarity in colour, one value per image; 1 for identical images.

    As in the authors' code: YIQ planes, 2x2 means, every second position, three Haar scales. Two black images leave the
    paper's formula 0 / 0; they are identical and score 1.

    Args:
        images: `[B, 3, H, W]` RGB in [0, 1], H and W at least 16.
        references: `[B, 3, H, W]` RGB in [0, 1].

    Returns:
        `[B]` in [0, 1], higher is better; NaN for images with non-finite pixels.

    Raises:
        ValueError: shapes or devices differ, or images are too small.
        TypeError: the images are not floating point.

    Example:
        >>> black = torch.zeros(1, 3, 32, 32)
        >>> haarpsi(black, black)
        tensor([1.])

    References:
        A Haar wavelet-based perceptual similarity index for image quality assessment, 2018,
        https://doi.org/10.1016/j.image.2017.11.001
    """
    images, references = check_pair("haarpsi", images, references, min_side=MIN_SIDE)

    def score(images: Tensor, references: Tensor) -> Tensor:
        pair = torch.stack((halve(images, replicate=False), halve(references, replicate=False)))
        similarities, weights = _luma_maps(weighted_channels(pair, YIQ[0]))
        similarities = torch.cat((similarities, _chroma_map(pair).unsqueeze(0)))
        weights = torch.cat((weights, weights.mean(0, keepdim=True))) + _MIN_WEIGHT
        # The share of disagreement is small for good images; 1 - it, as in the paper, would round its digits away.
        disagreement = torch.sigmoid(-_SIGMOID_SLOPE * similarities)
        share = mean_of_map((disagreement * weights).sum(0)) / mean_of_map(weights.sum(0))
        return (torch.logit(share) / _SIGMOID_SLOPE).square().clamp(max=1)  # above 1 by rounding only

    return map_chunks(score, images, references)
