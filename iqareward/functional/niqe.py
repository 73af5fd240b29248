"""NIQE: how far the statistics of an image's blocks are from those of natural photographs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from iqareward.atomic import atomic_write
from iqareward.functional._checks import check_images
from iqareward.functional._chunks import free_threads, map_chunks
from iqareward.functional.nss import clipped_luma, fit_aggd, half_scale, local_statistics, mscn, neighbor_moments
from iqareward.functional.resize import pillow_resize
from iqareward.weight_files import WeightFile

MIN_SIDE = 96  # four blocks of the packaged model
_NUM_FEATURES = 36
PACKAGED = "niqe_natural.safetensors"
# Below this ratio of smallest to largest eigenvalue a Cholesky factor is noise and the pseudo-inverse takes over.
_SMALLEST_EIGENVALUE_RATIO = 1e-10


@dataclass(frozen=True, eq=False)
class NaturalModel:
    """Mean and covariance of the 36 NIQE features over sharp blocks of natural photographs.

    Attributes:
        mean: `[36]` float64.
        covariance: `[36, 36]` float64.
        block_size: side in pixels of the blocks, even; images are scored in blocks of the same size.
    """

    mean: Tensor
    covariance: Tensor
    block_size: int

    def __post_init__(self) -> None:
        shapes = (list(self.mean.shape), list(self.covariance.shape))
        if shapes != ([_NUM_FEATURES], [_NUM_FEATURES, _NUM_FEATURES]):
            raise ValueError(f"NaturalModel expected a mean [36] and a covariance [36, 36], got {shapes}.")
        if self.mean.dtype != torch.float64 or self.covariance.dtype != torch.float64:
            raise TypeError(
                f"NaturalModel expected float64 statistics, got {self.mean.dtype} and {self.covariance.dtype}. "
                "Convert with .double()."
            )
        if self.block_size < 16 or self.block_size % 2:
            raise ValueError(f"NaturalModel expected an even `block_size` >= 16, got {self.block_size}.")

    @cached_property
    def is_definite(self) -> bool:
        """Whether the covariance can be inverted; if not, NIQE takes the pseudo-inverse, as the original does."""
        eigenvalues = torch.linalg.eigvalsh(self.covariance)
        return bool(eigenvalues[0] > _SMALLEST_EIGENVALUE_RATIO * eigenvalues[-1])

    def to(self, device: torch.device | str) -> "NaturalModel":
        """The same statistics on `device`; do it once, not per call."""
        return NaturalModel(self.mean.to(device), self.covariance.to(device), self.block_size)

    def save(self, path: str | Path, metadata: Mapping[str, str]) -> None:
        """Write a safetensors file; `metadata` says where the statistics come from."""
        tensors = {"mean": self.mean.cpu().contiguous(), "covariance": self.covariance.cpu().contiguous()}
        with atomic_write(path) as file:
            file.write(save(tensors, metadata={**metadata, "block_size": str(self.block_size)}))

    @classmethod
    def load(cls, path: str | Path) -> "NaturalModel":
        """Read a safetensors file that `save` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: the file is damaged, or does not hold such statistics.
        """
        file = WeightFile(path)
        found = file.take({"mean": (_NUM_FEATURES,), "covariance": (_NUM_FEATURES, _NUM_FEATURES)})
        block_size = file.metadata.get("block_size", "")
        if not block_size.isdecimal():
            raise ValueError(f"{path} expected a whole number as block_size in its metadata, got {block_size!r:.100}.")
        return _read_model(path, found["mean"], found["covariance"], int(block_size[:9]))

    @classmethod
    def from_npz(cls, path: str | Path, *, block_size: int = 96) -> "NaturalModel":
        """Read published NIQE parameters: an npz with `mu_pris_param` and `cov_pris_param`, fitted on 96-pixel blocks.

        Raises:
            OSError: there is no such file.
            ValueError: the file is damaged, or does not hold such statistics.
        """
        with Path(path).open("rb") as file:
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    mean, covariance = (
                        torch.from_numpy(arrays[key].astype(np.float64, casting="same_kind"))
                        for key in ("mu_pris_param", "cov_pris_param")
                    )
            except Exception as error:  # a damaged file makes the decoders raise anything
                what = f"{type(error).__name__}: {error}"
                raise ValueError(
                    f"from_npz expected numbers mu_pris_param, cov_pris_param in {path}: {what}"
                ) from error
        return _read_model(path, mean.reshape(-1), covariance, block_size)


def _read_model(path: str | Path, mean: Tensor, covariance: Tensor, block_size: int) -> NaturalModel:
    """A model from a file; statistics that no photographs have are refused."""
    try:
        model = NaturalModel(mean, covariance, block_size)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a natural model: {error}") from error
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{path} expected a finite mean and covariance, got NaN or inf.")
    if not torch.allclose(covariance, covariance.T) or bool((covariance.diagonal() < 0).any()) or not covariance.any():
        raise ValueError(f"{path} expected a symmetric covariance with variances >= 0, got something else.")
    return model


@lru_cache(maxsize=8)
def packaged_model(device: torch.device) -> NaturalModel:
    """The model that comes with the package, on `device`: five photographs in the public domain, 48-pixel blocks.

    Fitted by benchmarks/fit_niqe.py; the metadata of the file names the photographs, options and versions.
    """
    with resources.as_file(resources.files("iqareward.functional") / "data" / PACKAGED) as path:
        return NaturalModel.load(path).to(device)


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


@torch.no_grad()
def fit_natural_model(
    photos: Sequence[Tensor],
    *,
    block_size: int = 48,
    sharpness: float = 0.75,
    scales: Sequence[float] = (1.0, 0.75, 0.5),
) -> NaturalModel:
    """NIQE statistics of your own pristine photographs, for images of another kind than the packaged ones.

    Each photograph is read at every scale, plain and mirrored, with blocks that start at the corner and half a block
    away. Of each reading only blocks count whose mean local contrast exceeds `sharpness` times that of the sharpest.

    Args:
        photos: `[3, H, W]` each, in [0, 1], of any sizes; five varied ones of 384x512 are enough.
        block_size: side of a block in pixels, even.
        sharpness: share of the sharpest block's contrast that a block needs.
        scales: factors by which each photograph is shrunk.

    Returns:
        The fitted model, on the device of the photographs.

    Raises:
        ValueError: fewer than 37 sharp blocks, of which no invertible covariance can come.

    References:
        Mittal, Soundararajan, Bovik, "Making a 'Completely Blind' Image Quality Analyzer", IEEE SPL 2013.
        https://doi.org/10.1109/LSP.2012.2227726
    """
    chosen = [
        _sharp_block_features(levels, block_size, sharpness)
        for photo in photos
        for scale in scales
        for levels in _readings(photo, scale, block_size)
    ]
    features = torch.cat(chosen) if chosen else torch.empty(0, _NUM_FEATURES, dtype=torch.float64)
    if features.shape[0] <= _NUM_FEATURES:
        raise ValueError(
            f"fit_natural_model expected photographs with more than {_NUM_FEATURES} sharp blocks, got "
            f"{features.shape[0]}. Add photographs, or lower `block_size` or `sharpness`."
        )
    return NaturalModel(features.mean(0), torch.cov(features.T), block_size)


def _sharp_block_features(levels: Tensor, block_size: int, sharpness: float) -> Tensor:
    """The features `[n, 36]` of those blocks of `levels` `[1, H, W]` that are in focus."""
    height, width = (length - length % block_size for length in levels.shape[1:])
    contrast = split_blocks(local_statistics(levels[:, :height, :width])[1], block_size).mean(dim=(2, 3))[0]
    features = natural_features(levels, block_size)[0]
    return features[(contrast > sharpness * contrast.max()) & features.isfinite().all(-1)]


def _readings(photo: Tensor, scale: float, block_size: int) -> list[Tensor]:
    images = check_images("fit_natural_model", photo.unsqueeze(0), min_side=block_size)
    if scale != 1.0:
        images = pillow_resize(images, (round(images.shape[2] * scale), round(images.shape[3] * scale)))
    levels = (clipped_luma(images)[0] * 255).round()
    half = block_size // 2
    starts = [view[:, start:, start:] for view in (levels, levels.flip(2)) for start in (0, half)]
    return [view for view in starts if min(view.shape[1:]) >= block_size]


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


def split_blocks(planes: Tensor, side: int) -> Tensor:
    """The square blocks `[B, n, side, side]` of `planes` `[B, H, W]`, H and W multiples of `side`, row by row."""
    rows, columns = planes.shape[1] // side, planes.shape[2] // side
    return planes.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3).flatten(1, 2)


def natural_features(levels: Tensor, side: int) -> Tensor:
    """Features `[B, n, 36]` of the whole blocks of `levels` `[B, H, W]` (0..255), 18 at full and 18 at half scale."""
    height, width = (length - length % side for length in levels.shape[1:])
    levels = levels[:, :height, :width]
    scales = ((levels, side), (half_scale(levels), side // 2))
    # In float32 the local variance keeps three digits where contrast is low, which moves the score by 0.002.
    features = [block_features(mscn(plane.double()).to(plane.dtype), block) for plane, block in scales]
    return torch.cat(features, dim=-1)


def block_features(coefficients: Tensor, side: int) -> Tensor:
    """Features `[B, n, 18]` float64 of each block of `coefficients` `[B, H, W]` from `mscn`.

    They are the shape and mean scale of the coefficients; then, for the right, lower, lower right and lower left
    neighbour, shape, mean, left scale and right scale of the products. NaN where one side of zero is empty.
    """
    fit = fit_aggd(neighbor_moments(split_blocks(coefficients, side)), side * side)  # [B, n, 5] each
    left, right = fit.left_std * fit.scale_per_std, fit.right_std * fit.scale_per_std
    symmetric = torch.stack((fit.shape[..., 0], (left[..., 0] + right[..., 0]) / 2), dim=-1)
    products = torch.stack((fit.shape, fit.mean, left, right), dim=-1)[..., 1:, :]
    return torch.cat((symmetric, products.flatten(-2)), dim=-1)
