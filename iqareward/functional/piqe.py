"""PIQE: perception-based quality of one image, from its 16x16 blocks, with neither references nor weights."""

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward.functional._checks import check_images
from iqareward.functional._chunks import map_chunks
from iqareward.functional.nss import clipped_luma, mscn

MIN_SIDE = 16
BLOCK = 16
_SEGMENT = 6
_ACTIVE_VARIANCE = 0.1
_IMPAIRED_STD = 0.1


@torch.no_grad()
def piqe(images: Tensor) -> Tensor:
    """Share of the busy 16x16 blocks that look blocky, blurred or noisy: 0 is best, 100 is worst.

    Reproduces the published figures of MATLAB's `piqe` to both decimals. As in its public ports, luminance is scaled to
    a maximum of 255 and rounded to whole levels. A side that is not a multiple of 16 repeats its last pixel up to the
    next one; for such sizes no official figure is known.

    Limits. Light noise improves it: white noise with a standard deviation of 3/255 does so on 22 of the 24 Kodak
    photographs, so do not train on it alone. The score is piecewise constant: its gradient is zero, so no graph is
    built. It ties at 100 under heavy degradation, is not monotone over fine steps of blur, cannot see a global
    darkening (luminance is scaled to its maximum), and on 3 to 6 of 10 photographs, depending on the filter, a
    sharpened copy beats the original.

    Args:
        images: `[B, 3, H, W]` RGB in [0, 1], H, W >= 16; luminance outside [0, 1] saturates.

    Returns:
        `[B]` scores in [0, 100], lower is better. A flat image scores 100, one with a NaN or infinite pixel NaN.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: `images` is not `[B, 3, H, W]` with H, W >= 16.

    Example:
        >>> piqe(torch.zeros(2, 3, 32, 32))
        tensor([100., 100.])

    References:
        Venkatanath, Praneeth, Bh, Channappayya, Medasani, "Blind Image Quality Evaluation Using Perception Based
        Features", NCC 2015. https://doi.org/10.1109/NCC.2015.7084843
        MATLAB `piqe`, https://www.mathworks.com/help/images/ref/piqe.html
    """
    return map_chunks(_piqe, check_images("piqe", images, min_side=MIN_SIDE))


def _piqe(images: Tensor) -> Tensor:
    levels, finite = _luma_levels(images)
    coefficients = mscn(_pad_to_blocks(levels))
    blocks = coefficients.unflatten(2, (-1, BLOCK)).unflatten(1, (-1, BLOCK))  # [B, rows, 16, columns, 16]
    variance, noisy = _noise(blocks)
    active = variance > _ACTIVE_VARIANCE
    impaired = _has_flat_edge(blocks)
    distortion = impaired * (1 - variance) + noisy * variance
    num_active = active.sum(dim=(1, 2))
    scores = ((distortion * active).sum(dim=(1, 2)) + 1) / (num_active + 1) * 100
    return torch.where(finite, scores.clamp(0, 100), torch.nan)


def _luma_levels(images: Tensor) -> tuple[Tensor, Tensor]:
    """Whole luminance levels with the brightest pixel at 255, `[B, H, W]`, and which images are finite, `[B]`."""
    plane, finite = clipped_luma(images)
    brightest = plane.amax(dim=(1, 2), keepdim=True)
    return (plane / brightest.where(brightest > 0, 1.0) * 255).round(), finite


def _pad_to_blocks(levels: Tensor) -> Tensor:
    height, width = levels.shape[1:]
    if height % BLOCK == 0 and width % BLOCK == 0:
        return levels
    return F.pad(levels.unsqueeze(1), (0, -width % BLOCK, 0, -height % BLOCK), mode="replicate").squeeze(1)


def _noise(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Variance of each block, and whether its centre columns differ from their surround as white noise would."""
    sums, squares = blocks.sum(dim=2), blocks.square().sum(dim=2)  # of each column: [B, rows, columns, 16]
    variance = _variance(sums.sum(-1), squares.sum(-1), BLOCK * BLOCK)
    center = _variance(sums[..., 7] + sums[..., 8], squares[..., 7] + squares[..., 8], 2 * BLOCK)
    # The reference removes column 7 and then counts on: column 9 leaves the surround in place of column 8.
    surround_sums = sums.sum(-1) - sums[..., 7] - sums[..., 9]
    surround_squares = squares.sum(-1) - squares[..., 7] - squares[..., 9]
    surround = _variance(surround_sums, surround_squares, (BLOCK - 2) * BLOCK)
    # std > 2 |std - ratio| / max(std, ratio), ratio = center / surround, multiplied out so that nothing divides by 0
    std, center, surround = variance.sqrt(), center.sqrt(), surround.sqrt()
    noisy = std * torch.maximum(std * surround, center) > 2 * (std * surround - center).abs()
    return variance, noisy


def _has_flat_edge(blocks: Tensor) -> Tensor:
    """Whether any 6 neighbouring pixels along any of a block's four edges are nearly equal, `[B, rows, columns]`."""
    # the first and the last line of each; a tuple of indices would be copied to the device, and waited for
    horizontal = blocks[:, :, :: BLOCK - 1].permute(0, 1, 3, 2, 4)
    vertical = blocks[..., :: BLOCK - 1].permute(0, 1, 3, 4, 2)
    edges = torch.cat([horizontal, vertical], dim=3)  # [B, rows, columns, 4, 16]
    variance = _variance(_window_sum(edges), _window_sum(edges.square()), _SEGMENT)
    return variance.flatten(3).amin(-1) < _IMPAIRED_STD**2


def _window_sum(values: Tensor) -> Tensor:
    pairs = values[..., :-1] + values[..., 1:]
    return pairs[..., :-4] + pairs[..., 2:-2] + pairs[..., 4:]


def _variance(total: Tensor, total_squares: Tensor, count: int) -> Tensor:
    """Unbiased variance from sums; rounding must not make it negative."""
    return ((total_squares - total.square() / count) / (count - 1)).clamp_min(0)
