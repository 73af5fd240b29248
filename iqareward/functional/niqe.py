"""NIQE: how far the statistics of an image's blocks are from those of natural photographs."""

from functools import partial

import torch
from torch import Tensor

from iqareward.functional._checks import check_images
from iqareward.functional._chunks import free_threads, map_chunks
from iqareward.functional.natural_model import NaturalModel, packaged_model
from iqareward.functional.nss import clipped_luma, natural_features

MIN_SIDE = 96  # four blocks of the packaged model


@torch.no_grad()
def niqe(images: Tensor, *, model: NaturalModel | None = None) -> Tensor:
    """Distance between the statistics of an image's blocks and those of natural photographs: 0 is best, no upper end.

    With the published parameters (`NaturalModel.from_npz`) this comes within 0.6 % of figures of the authors' MATLAB
    release. Where a region is exactly flat, MATLAB counts its own rounding noise by sign, and here it is zero; that
    alone moves the score as much. As there, luma is rounded to 8 bits and shapes come from a table, so no gradient
    exists and no graph is built. Local statistics are computed in float64, which consumer GPUs do at a 64th of their
    speed in float32.

    Limits. Statistics need blocks: judge images with a short side of 256 pixels or more. Of degraded photographs 3 %
    beat their original at 384x512, 10 % at 256x256 and 20 % at 128x128. An over-contrasted copy beats the original on
    5 to 8 of 10 photographs, a sharpened one on 3, and light noise on a smooth photograph can pass for texture. A
    latent autoencoder improves it: TAESD's round trip beats the truth on 17 of 24 crops of 256x256. Scores under
    different models do not compare.

    Args:
        images: `[B, 3, H, W]` RGB in [0, 1], H, W >= 96; luma outside [0, 1] saturates. Rows and columns beyond the
            last whole block are not scored.
        model: statistics to compare with, on the device of `images`; None is the packaged model, fitted on five
            photographs in the public domain with blocks of 48 pixels.

    Returns:
        `[B]` scores >= 0, lower is better. NaN for an image with a NaN or infinite pixel, and for one with fewer than
        two blocks of varying luma, such as a flat image.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: `images` is not `[B, 3, H, W]` with H, W >= 96, holds fewer than two blocks of the model, or is not
            on the model's device.

    Example:
        >>> images = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
        >>> images[1] = 0.5
        >>> niqe(images).isnan()
        tensor([False,  True])

    References:
        Mittal, Soundararajan, Bovik, "Making a 'Completely Blind' Image Quality Analyzer", IEEE SPL 2013.
        https://doi.org/10.1109/LSP.2012.2227726
    """
    images = check_images("niqe", images, min_side=MIN_SIDE)
    model = packaged_model(images.device) if model is None else model
    _check_model(images, model)
    features = map_chunks(partial(_features, side=model.block_size), images)
    with free_threads(images.device):
        return _distance(features, model).to(images.dtype)


def _check_model(images: Tensor, model: NaturalModel) -> None:
    if model.mean.device != images.device:
        raise ValueError(
            f"niqe expected `model` on the device of `images` ({images.device}), got {model.mean.device}. "
            "Move it once with model.to(images.device)."
        )
    side, (height, width) = model.block_size, images.shape[2:]
    if (height // side) * (width // side) < 2:
        raise ValueError(
            f"niqe expected `images` that hold at least two blocks of {side}x{side}, got {list(images.shape)}. "
            f"Resize the images to at least {2 * side} on a side, or pass a model with a smaller block_size."
        )


def _features(images: Tensor, side: int) -> Tensor:
    """`[B, n, 36]` float64; NaN for every block of an image with a NaN or infinite pixel."""
    plane, finite = clipped_luma(images)
    features = natural_features((plane * 255).round(), side)
    return torch.where(finite[:, None, None], features, torch.nan)


def _distance(features: Tensor, model: NaturalModel) -> Tensor:
    """Mahalanobis distance `[B]` under the mean of both covariances, float64; NaN below two usable blocks.

    A block is left out whole if any of its features is undefined; the MATLAB release leaves such a block out of the
    covariance and single features of it out of the mean.
    """
    usable = features.isfinite().all(-1, keepdim=True)  # [B, n, 1]
    count = usable.sum(dim=1)  # [B, 1]
    features = torch.where(usable, features, 0.0)
    mean = features.sum(1) / count.clamp_min(1)
    centered = torch.where(usable, features - mean.unsqueeze(1), 0.0)
    covariance = centered.mT @ centered / (count - 1).clamp_min(1).unsqueeze(-1)
    pooled = (covariance + model.covariance) / 2
    delta = (model.mean - mean).unsqueeze(-1)  # [B, 36, 1]
    if model.is_definite:  # then so is the pooled matrix, whatever the image
        factor = torch.linalg.cholesky_ex(pooled).L
        squared = torch.linalg.solve_triangular(factor, delta, upper=False).square().sum(dim=(1, 2))
    else:
        squared = (delta.mT @ torch.linalg.pinv(pooled, hermitian=True) @ delta).flatten(1).sum(1).clamp_min(0)
    return torch.where(count[:, 0] >= 2, squared.sqrt(), torch.nan)
