"""Pairs made of other pairs: some of them, or all of them kept in memory."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from iqareward.diffusion.data.pairs import Pairs


@dataclass(frozen=True)
class Subset:
    """Some inputs of a data set, with ids from 0: for training inputs and held-out ones of one folder.

    Args:
        pairs: the data set.
        ids: the inputs of it that belong to this one.

    Raises:
        ValueError: there is no id, or one that the data set does not have.

    Example:
        >>> from iqareward.diffusion.data.pairs import SyntheticPairs
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
        references: of the same shape.

    Example:
        >>> from iqareward.diffusion.data.pairs import SyntheticPairs
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
