"""What NIQE compares with: the statistics of blocks of natural photographs, fitted, stored and loaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from iqareward.atomic import atomic_write
from iqareward.functional._checks import check_images
from iqareward.functional.nss import clipped_luma, local_statistics, natural_features, split_blocks
from iqareward.functional.resize import pillow_resize
from iqareward.weight_files import WeightFile

NUM_FEATURES = 36
PACKAGED = "niqe_natural.safetensors"
# Below this ratio of smallest to largest eigenvalue a Cholesky factor is noise and the pseudo-inverse takes over.
SMALLEST_EIGENVALUE_RATIO = 1e-10


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
        if shapes != ([NUM_FEATURES], [NUM_FEATURES, NUM_FEATURES]):
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
        return bool(eigenvalues[0] > SMALLEST_EIGENVALUE_RATIO * eigenvalues[-1])

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
        found = file.take({"mean": (NUM_FEATURES,), "covariance": (NUM_FEATURES, NUM_FEATURES)})
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
        sharp_block_features(levels, block_size, sharpness)
        for photo in photos
        for scale in scales
        for levels in _readings(photo, scale, block_size)
    ]
    features = torch.cat(chosen) if chosen else torch.empty(0, NUM_FEATURES, dtype=torch.float64)
    if features.shape[0] <= NUM_FEATURES:
        raise ValueError(
            f"fit_natural_model expected photographs with more than {NUM_FEATURES} sharp blocks, got "
            f"{features.shape[0]}. Add photographs, or lower `block_size` or `sharpness`."
        )
    return NaturalModel(features.mean(0), torch.cov(features.T), block_size)


def sharp_block_features(levels: Tensor, block_size: int, sharpness: float) -> Tensor:
    """The 36 features `[n, 36]` of those blocks of `levels` `[1, H, W]` that are in focus."""
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
