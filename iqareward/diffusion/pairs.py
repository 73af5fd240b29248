"""Training data: pairs of a degraded image and its reference, by id, and the order in which they are used."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from iqareward.diffusion.degradations import Degradation
from iqareward.diffusion.finite import finite_inputs
from iqareward.diffusion.textures import synthetic_images
from iqareward.image_files import References, UnreadableImageError, find_images, read_image
from iqareward.images import to_images
from iqareward.seeds import generator, id_list, uniform

READERS = 8  # threads that read a batch; Pillow decodes outside the interpreter lock


class Pairs(Protocol):
    """Training data as the trainer reads it: the number of inputs, and the degraded image and reference of each.

    An id always gives the same pair, because difficulty and reward histories are kept per id.

    Example:
        >>> pairs: Pairs = SyntheticPairs(4, size=16)  # any object with these two methods
        >>> len(pairs), pairs.batch([0, 3])[0].shape
        (4, torch.Size([2, 3, 16, 16]))
    """

    def __len__(self) -> int:
        """Number of inputs; ids are 0 to this number - 1."""
        ...

    def batch(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(degraded, references), both `[B, 3, H, W]` float32 in [0, 1] on the CPU, in the order of `ids`."""
        ...


@dataclass(frozen=True)
class SyntheticPairs:
    """Synthetic images, degraded as they are read, with a known severity each: experiments without a download.

    Args:
        num_inputs: Ids are 0 to this number - 1.
        size: Side in pixels.
        degradation: How the images are degraded.
        seed: Integer >= 0; another seed is another data set, for instance a held-out one.

    Raises:
        ValueError: There would be no inputs or no pixels.

    Example:
        >>> pairs = SyntheticPairs(100, size=32)
        >>> degraded, references = pairs.batch([4, 7])
        >>> degraded.shape, pairs.severities([4, 7]).shape
        (torch.Size([2, 3, 32, 32]), torch.Size([2]))
    """

    num_inputs: int
    size: int = 32
    degradation: Degradation = field(default_factory=Degradation)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_inputs < 1 or self.size < 1:
            raise ValueError(f"SyntheticPairs expected num_inputs >= 1 and size >= 1, got {self}.")

    def __len__(self) -> int:
        return self.num_inputs

    def severities(self, ids: Sequence[int]) -> Tensor:
        """How strongly each input is degraded, `[B]` uniform in [0, 1), larger = worse."""
        return _severities(_checked_ids("SyntheticPairs", ids, len(self)), self.seed)

    def batch(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(degraded, references), both `[B, 3, size, size]` float32 in [0, 1] on the CPU, in the order of `ids`."""
        ids = _checked_ids("SyntheticPairs", ids, len(self))
        references = synthetic_images(ids, size=self.size, seed=self.seed)
        return self.degradation(references, _severities(ids, self.seed), ids, seed=self.seed), references


@dataclass(frozen=True)
class FolderPairs:
    """Pairs from the images of a folder, degraded as they are read, or from two folders that hold the same scenes.

    Each id is one random crop of one file: with C crops per file, ids k * C to k * C + C - 1 belong to file k, in the
    order of the names.

    Args:
        folder: The references, searched with all folders inside.
        size: Side of the crop in pixels.
        degradation: How the crops are degraded; not used with `degraded_folder`.
        seed: Integer >= 0; it decides crops, severities and noise.
        degraded_folder: The degraded images, with the relative names (any image suffix) and sizes of the references.
        crops: Number of crops of each file.

    Raises:
        ValueError: A folder is missing, holds no image or cannot be searched whole, a degraded image is missing, or a
            number is below 1.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (40, 30), "red").save(f"{folder}/red.png")
        ...     degraded, references = FolderPairs(folder, size=16).batch([0])
        >>> references.amax((2, 3))
        tensor([[1., 0., 0.]])
    """

    folder: str | Path
    size: int
    degradation: Degradation = field(default_factory=Degradation)
    seed: int = 0
    degraded_folder: str | Path | None = None
    crops: int = 1

    def __post_init__(self) -> None:
        if self.size < 1 or self.crops < 1:
            raise ValueError(f"FolderPairs expected size >= 1 and crops >= 1, got {self.size} and {self.crops}.")
        _ = self._paths  # a missing file is an error now, not after hours

    @cached_property
    def names(self) -> list[str]:
        """The files relative to the folder, sorted."""
        if not Path(self.folder).is_dir():
            raise ValueError(f"FolderPairs expected a folder of images, got {self.folder}.")
        files, problems = find_images([self.folder])
        for path, problem in problems.items():  # a part of the data must not be missing without a word
            raise ValueError(f"FolderPairs cannot use {path}: {problem}. Repair or remove it.")
        return sorted(relative.as_posix() for relative in files.values())

    @cached_property
    def _paths(self) -> list[tuple[Path, ...]]:
        """Of each name: the reference, followed by the degraded image if it is a file."""
        names = [Path(name) for name in self.names]
        paths = [Path(self.folder) / name for name in names]
        if self.degraded_folder is None:
            return [(path,) for path in paths]
        degraded, problems = References(self.degraded_folder), []
        found: list[tuple[Path, ...]] = []
        for name, path in zip(names, paths, strict=True):
            try:
                found.append((path, degraded.find(name)))
            except FileNotFoundError as error:
                problems.append(str(error))
        if problems:
            raise ValueError(
                f"FolderPairs expected {self.degraded_folder} to hold an image of each name in {self.folder}, but "
                f"{len(problems)} of {len(names)} are missing, the first being: {problems[0]}."
            )
        return found

    def __len__(self) -> int:
        return len(self.names) * self.crops

    def batch(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(degraded, references), both `[B, 3, size, size]` float32 in [0, 1] on the CPU, in the order of `ids`.

        Raises:
            ValueError: A file cannot be read, is smaller than the crop, or its pair differs in size; it is named.
        """
        ids = _checked_ids("FolderPairs", ids, len(self))
        corners = uniform(ids, 2, seed=self.seed, purpose="crop").tolist()
        with ThreadPoolExecutor(READERS) as readers:
            rows = list(readers.map(self._crops, ids, corners))
        references = torch.stack([row[0] for row in rows])
        if self.degraded_folder is not None:
            return torch.stack([row[1] for row in rows]), references
        return self.degradation(references, _severities(ids, self.seed), ids, seed=self.seed), references

    def _crops(self, input_id: int, corner: tuple[float, float]) -> list[Tensor]:
        """The reference `[3, size, size]`, followed by the degraded image if it is a file."""
        paths = self._paths[input_id // self.crops]
        images = [_read(path) for path in paths]
        height, width = images[0].shape[:2]
        if images[0].shape[:2] != images[-1].shape[:2]:
            raise ValueError(
                f"FolderPairs expected {paths[1]} in the size of its reference, {width} x {height}, got "
                f"{images[1].shape[1]} x {images[1].shape[0]}. Resize it."
            )
        if min(height, width) < self.size:
            raise ValueError(
                f"FolderPairs expected images of at least {self.size} x {self.size}, got {paths[0]} of "
                f"{width} x {height}. Lower `size` or remove the file."
            )
        top, left = (int(at * (side - self.size + 1)) for at, side in zip(corner, (height, width), strict=True))
        crops = (image[top : top + self.size, left : left + self.size] for image in images)
        return [to_images(crop, value_range=(0, 1))[0] for crop in crops]


def _read(path: Path) -> np.ndarray:
    try:
        pixels = read_image(path)
    except UnreadableImageError as error:
        raise ValueError(f"FolderPairs could not read {error}. Repair or remove the file.") from error
    if pixels.dtype == np.float32 and not 0 <= pixels.min() <= pixels.max() <= 1:  # false for NaN too
        span = f"{pixels.min():g} to {pixels.max():g}"
        raise ValueError(f"FolderPairs expected floats in [0, 1], got {path} with {span}. Scale them.")
    return pixels


def _severities(ids: list[int], seed: int) -> Tensor:
    return uniform(ids, seed=seed, purpose="severity")


def _checked_ids(caller: str, ids: Sequence[int], num_inputs: int) -> list[int]:
    checked = id_list(caller, ids)
    if max(checked) >= num_inputs:
        raise ValueError(f"{caller} expected ids in [0, {num_inputs}), got {max(checked)}.")
    return checked


@dataclass(frozen=True)
class Subset:
    """Some inputs of a data set, with ids from 0, for example to split a folder into training and held-out inputs.

    Args:
        pairs: The data set.
        ids: The inputs that belong to this subset.

    Raises:
        ValueError: There is no id, or one that the data set does not have.

    Example:
        >>> everything = SyntheticPairs(10, size=16)
        >>> held_out = Subset(everything, (8, 9))
        >>> bool((held_out.batch([1])[0] == everything.batch([9])[0]).all())
        True
    """

    pairs: Pairs
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids or not 0 <= min(self.ids) <= max(self.ids) < len(self.pairs):
            raise ValueError(f"Subset expected one or more ids in [0, {len(self.pairs)}), got {self.ids}.")

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(degraded, references) of these ids, in their order."""
        return self.pairs.batch([self.ids[place] for place in ids])


@dataclass(frozen=True, eq=False)
class StoredPairs:
    """Pairs that are made once and kept in memory.

    Args:
        degraded: `[N, 3, H, W]` in [0, 1].
        references: `[N, 3, H, W]` in [0, 1].

    Example:
        >>> len(StoredPairs.of(SyntheticPairs(3, size=16)))
        3
    """

    degraded: Tensor
    references: Tensor

    @classmethod
    def of(cls, pairs: Pairs) -> "StoredPairs":
        """All of `pairs`."""
        return cls(*pairs.batch(range(len(pairs))))

    def __len__(self) -> int:
        return len(self.degraded)

    def batch(self, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(degraded, references) of these ids, in their order."""
        rows = list(ids)
        return self.degraded[rows], self.references[rows]


@dataclass(frozen=True)
class InputOrder:
    """The ids of each update: all inputs once per epoch in random order, without those that fill no whole batch.

    Ids are integers in [0, num_inputs), and `batch_size` counts the inputs per update over all processes.
    """

    num_inputs: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= self.num_inputs:
            raise ValueError(
                f"InputOrder expected 1 <= batch_size <= number of inputs, got {self.batch_size} and "
                f"{self.num_inputs}. Use fewer inputs per update or more images."
            )

    def ids(self, update: int, *, rank: int = 0, world: int = 1) -> list[int]:
        """The inputs of update number `update`; the share of process `rank` of `world`."""
        per_epoch = self.num_inputs // self.batch_size
        epoch, batch = divmod(update, per_epoch)
        order = torch.randperm(self.num_inputs, generator=generator(self.seed, epoch)).tolist()
        start = batch * self.batch_size
        first, last = (self.batch_size * place // world for place in (rank, rank + 1))
        return order[start + first : start + last]


def read_batch(pairs: Pairs, ids: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Degraded images and references `[B, 3, H, W]` on `device`, and `[B]` whether all their pixels are finite.

    A pair with a pixel that is not finite becomes grey, so that it cannot spoil the others of its batch; give it no
    weight in the loss.
    """
    images = pairs.batch(ids)
    usable = finite_inputs(*images)
    degraded, references = (torch.where(usable.view(-1, 1, 1, 1), batch, 0.5).to(device) for batch in images)
    return degraded, references, usable.to(device)
