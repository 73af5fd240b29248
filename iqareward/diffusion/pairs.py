"""Training data: pairs of a degraded image and its reference, by id, and the order in which they are used."""

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from iqareward.diffusion.degradations import Degradation, DegradationModel
from iqareward.diffusion.textures import synthetic_images
from iqareward.seeds import generator, id_list, sub_seed, uniform

_ROUNDING = 1e-3  # a resized image in [0, 1] may leave it by this


Item: TypeAlias = Mapping[str, Any]
"""One input: "lq", and where there is one "gt", "prompt" and "task"."""


class Pairs(Protocol):
    """A data set of the training loop: any map-style `torch.utils.data.Dataset`, or a list.

    An item is a mapping with `lq`, the degraded image `[3, h, w]` float in [0, 1]; optionally `gt`, its ground truth
    `[3, H, W]`, which may be larger; and optionally the strings `prompt` and `task`. `degraded` and `reference` are
    accepted as other names of `lq` and `gt`. An id always gives the same item, because difficulty and reward histories
    are kept per id; random numbers of torch, NumPy and Python that a data set draws are seeded by the id while it is
    read.

    Example:
        >>> pairs: Pairs = [{"lq": torch.zeros(3, 16, 16), "gt": torch.zeros(3, 64, 64), "task": "x4"}]
        >>> len(pairs), sorted(pairs[0])
        (1, ['gt', 'lq', 'task'])
    """

    def __len__(self) -> int:
        """Number of inputs; ids are 0 to this number - 1."""
        ...

    def __getitem__(self, index: int, /) -> Item:
        """The input with this id."""
        ...


class PairSet(Dataset[Item], ABC):
    """A data set whose items depend on their ids alone, and of which several are read at once."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _items(self, ids: list[int]) -> list[Item]: ...

    def __getitem__(self, index: int) -> Item:
        return self.__getitems__([index])[0]

    def __getitems__(self, ids: Sequence[int]) -> list[Item]:
        """The items of these ids, in their order."""
        checked = id_list(type(self).__name__, ids)
        if max(checked) >= len(self):  # IndexError ends a `for` loop over the data set
            raise IndexError(f"{type(self).__name__} expected ids in [0, {len(self)}), got {max(checked)}.")
        return self._items(checked)


def read_items(pairs: Pairs, ids: Sequence[int]) -> list[Item]:
    """The items of these ids; a data set that draws random numbers draws the same ones each time an id is read."""
    if isinstance(pairs, PairSet):
        return pairs.__getitems__(ids)
    items: list[Item] = []
    before = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        for input_id in ids:
            seed = sub_seed(0, input_id)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002  # what data sets use
            torch.default_generator.manual_seed(seed)  # that of the CPU: torch.manual_seed would disturb the GPU's too
            items.append(pairs[input_id])
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.default_generator.set_state(before[2])
    return items


def checked_item(item: Any, input_id: int) -> dict[str, Any]:
    """The item with the names `lq`, `gt`, `prompt`, `task` and fp32 images; ValueError for one that is not an item."""
    if not isinstance(item, Mapping):
        raise ValueError(f"Input {input_id}: expected a mapping with 'lq', got {type(item).__name__}. Return a dict.")
    found: dict[str, Any] = {}
    for name, other in (("lq", "degraded"), ("gt", "reference"), ("prompt", ""), ("task", "")):
        values = [item[key] for key in (name, other) if item.get(key) is not None]
        if len(values) > 1:
            raise ValueError(f"Input {input_id}: expected '{name}' or '{other}', got both. Remove one.")
        if values:
            found[name] = _checked_image(values[0], name, input_id) if other else values[0]
    if "lq" not in found:
        raise ValueError(f"Input {input_id}: expected the degraded image as 'lq', got the keys {list(item)}.")
    for name in ("prompt", "task"):
        if not isinstance(found.get(name, ""), str):
            raise ValueError(f"Input {input_id}: expected '{name}' as a string, got {type(found[name]).__name__}.")
    return found


def _checked_image(image: Any, name: str, input_id: int) -> Tensor:
    expected = f"Input {input_id}: expected '{name}' as a float tensor [3, h, w] in [0, 1], got"
    if not isinstance(image, Tensor):
        raise ValueError(f"{expected} {type(image).__name__}. Convert it with iqareward.to_images(...)[0].")
    if image.ndim != 3 or image.shape[0] != 3 or not image.numel() or not image.is_floating_point():
        raise ValueError(f"{expected} {image.dtype} {list(image.shape)}. Convert it with iqareward.to_images(...)[0].")
    image = image.detach().float()
    low, high = (float(value) for value in image.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        return image  # this costs the input and not the run: it will not be used
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise ValueError(f"{expected} {low:g} to {high:g}. Scale or clamp it.")
    return image.clamp(0, 1) if low < 0 or high > 1 else image


@dataclass(frozen=True)
class SyntheticPairs(PairSet):
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
        >>> pairs[4]["lq"].shape, pairs.severities([4, 7]).shape
        (torch.Size([3, 32, 32]), torch.Size([2]))
    """

    num_inputs: int
    size: int = 32
    degradation: DegradationModel = field(default_factory=Degradation)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_inputs < 1 or self.size < 1:
            raise ValueError(f"SyntheticPairs expected num_inputs >= 1 and size >= 1, got {self}.")

    def __len__(self) -> int:
        return self.num_inputs

    def severities(self, ids: Sequence[int]) -> Tensor:
        """How strongly each input is degraded, `[B]` uniform in [0, 1), larger = worse."""
        return uniform(id_list("SyntheticPairs", ids), seed=self.seed, purpose="severity")

    def _items(self, ids: list[int]) -> list[Item]:
        references = synthetic_images(ids, size=self.size, seed=self.seed)
        degraded = self.degradation(references, self.severities(ids), ids, seed=self.seed)
        return _pairs(degraded, references)


def _pairs(degraded: Iterable[Tensor], references: Iterable[Tensor]) -> list[Item]:
    return [{"lq": lq, "gt": gt} for lq, gt in zip(degraded, references, strict=True)]


@dataclass(frozen=True)
class Subset(PairSet):
    """Some inputs of a data set, with ids from 0, for example to split a folder into training and held-out inputs.

    Args:
        pairs: The data set.
        ids: The inputs that belong to this subset.

    Raises:
        ValueError: There is no id, or one that the data set does not have.

    Example:
        >>> everything = SyntheticPairs(10, size=16)
        >>> held_out = Subset(everything, (8, 9))
        >>> bool((held_out[1]["lq"] == everything[9]["lq"]).all())
        True
    """

    pairs: Pairs
    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids or not 0 <= min(self.ids) <= max(self.ids) < len(self.pairs):
            raise ValueError(f"Subset expected one or more ids in [0, {len(self.pairs)}), got {self.ids}.")

    def __len__(self) -> int:
        return len(self.ids)

    def _items(self, ids: list[int]) -> list[Item]:
        return read_items(self.pairs, [self.ids[place] for place in ids])


@dataclass(frozen=True, eq=False)
class StoredPairs(PairSet):
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
        """All of `pairs`, which have one size and a ground truth; `list(pairs)` stores any others."""
        ids = range(len(pairs))
        items = [checked_item(*item) for item in zip(read_items(pairs, ids), ids, strict=True)]
        shapes = {tuple(item[name].shape if name in item else None for name in ("lq", "gt")) for item in items}
        if len(shapes) != 1 or "gt" not in items[0]:
            raise ValueError(
                f"StoredPairs expected inputs of one size with ground truth, got {shapes}. Use list(pairs)."
            )
        return cls(torch.stack([item["lq"] for item in items]), torch.stack([item["gt"] for item in items]))

    def __len__(self) -> int:
        return len(self.degraded)

    def _items(self, ids: list[int]) -> list[Item]:
        return _pairs(self.degraded[ids], self.references[ids])


@dataclass(frozen=True)
class InputOrder:
    """The ids of each update: all inputs once per epoch in random order, without those that fill no whole batch.

    Ids are integers in [0, num_inputs), and `batch_size` counts the inputs per update over all processes. Each process
    gets a share of each of the `minibatches`, so that they are the same on any number of processes.
    """

    num_inputs: int
    batch_size: int
    seed: int
    minibatches: int = 1

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
        start, parts = batch * self.batch_size, self.minibatches
        ends = [start + self.batch_size * place // (parts * world) for place in range(parts * world + 1)]
        own = range(rank, parts * world, world)
        return [each for place in own for each in order[ends[place] : ends[place + 1]]]
