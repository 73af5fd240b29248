"""How good a latent model's images can be at most: the ground truth through its own autoencoder."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from iqareward.functional._checks import check_images
from iqareward.functional.color import luma
from iqareward.types import Reward


class CeilingReport(NamedTuple):
    """Per image `[B]`: reward after the autoencoder, reward of the image itself, visibility of tile borders."""

    scores: Tensor
    reference_scores: Tensor
    seams: Tensor


@torch.no_grad()
def decoder_ceiling(
    encode: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor],
    images: Tensor,
    reward: Reward,
    *,
    tile: int | None = None,
) -> CeilingReport:
    """What a policy can reach at most: the reward of ground truth that has been encoded and decoded.

    A reward above it is a sign that the policy makes up what the judge likes. With tiled encoding or decoding also look
    at `seams`: some judges punish them, some do not see them.

    Args:
        encode: `policy.encode`.
        decode: `policy.decode`.
        images: `[B, 3, H, W]` ground truth in [0, 1].
        reward: scores each image; called with `references=images`.
        tile: side of a tile in pixels, of tiled decoding; the whole image if not given, then `seams` is 1.

    Returns:
        A `CeilingReport`.

    Example:
        >>> import iqareward
        >>> photos = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> report = decoder_ceiling(lambda x: x, lambda x: 0.5 * x, photos, iqareward.load("ssim"))
        >>> bool((report.scores < report.reference_scores).all())
        True
    """
    decoded = decode(encode(images)).float().clamp(0, 1)
    scores, reference_scores = reward(decoded, references=images), reward(images, references=images)
    seams = torch.ones_like(scores) if tile is None else seam_strength(decoded, period=tile)
    return CeilingReport(scores, reference_scores, seams)


def seam_strength(images: Tensor, *, period: int, offset: int = 0) -> Tensor:
    """How much larger luma jumps are across tile borders than elsewhere: 1 = no seams.

    Args:
        images: `[B, 3, H, W]` in [0, 1].
        period: distance of borders in pixels, at least 2 and smaller than both sides.
        offset: place of the first border; `period` itself if 0.

    Returns:
        `[B]` fp32 >= 0; NaN for images with non-finite pixels, 1 for flat ones.

    Raises:
        ValueError: the images hold no border or nothing else.

    Example:
        >>> tiles = torch.tensor([0.2, 0.8]).repeat_interleave(4).expand(1, 3, 8, 8) + 0.01 * torch.rand(1, 3, 8, 8)
        >>> bool(seam_strength(tiles, period=4) > 10)
        True
    """
    images = check_images("seam_strength", images, min_side=2)
    plane, sums, counts = luma(images), [], []
    if not 2 <= period < min(images.shape[2:]):
        raise ValueError(f"seam_strength expected 2 <= period < sides of {list(images.shape)}, got {period}.")
    for dim in (1, 2):
        jumps = plane.diff(dim=dim).abs().mean(3 - dim)
        border = torch.arange(1, jumps.shape[1] + 1, device=images.device) % period == offset % period
        for mask in (border, ~border):
            sums.append((jumps * mask).sum(1))
            counts.append(mask.sum())
    at_borders = (sums[0] + sums[2]) / (counts[0] + counts[2])
    elsewhere = (sums[1] + sums[3]) / (counts[1] + counts[3])
    flat = (at_borders == 0) & (elsewhere == 0)
    return torch.where(flat, 1.0, at_borders / elsewhere)
