"""Random numbers for the rows of a batch: each follows from a seed, the input's id and its copy alone."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from iqareward.seeds import generator, sub_seed


@dataclass(frozen=True)
class Noise:
    """Random numbers for N rows of a batch, the same in any batch, on any process and after a resume.

    Every row has a generator of its own for each purpose, so a row's numbers do not depend on its neighbours.

    Args:
        ids: Id of each row's input, N integers >= 0.
        copies: Number of each row among the rows of its input, N integers >= 0; all 0 if not given.
        seed: Integer >= 0; another seed gives other numbers.
        device: Where the numbers are drawn; CPU and GPU draw different ones.

    Example:
        >>> noise = Noise((7, 9), seed=0)
        >>> noise("start", (4, 8, 8)).shape
        torch.Size([2, 4, 8, 8])
        >>> noise("start", (2,))[1].equal(Noise((9,), seed=0)("start", (2,))[0])
        True
    """

    ids: tuple[int, ...]
    copies: tuple[int, ...] = ()
    seed: int = 0
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if not self.copies:
            object.__setattr__(self, "copies", (0,) * len(self.ids))
        if len(self.copies) != len(self.ids):
            raise ValueError(f"Noise expected one copy per id, got {len(self.copies)} for {len(self.ids)} ids.")

    @classmethod
    def of_groups(cls, ids: Sequence[int], group_size: int, *, seed: int, device: torch.device | str) -> "Noise":
        """For `group_size` rows of each input, side by side."""
        rows = tuple(input_id for input_id in ids for _ in range(group_size))
        return cls(rows, tuple(range(group_size)) * len(ids), seed, device)

    def __call__(self, purpose: str | int, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers `[N, *shape]` fp32."""
        rows = [torch.randn(tuple(shape), generator=own, device=self.device) for own in self.generators(purpose)]
        return torch.stack(rows)

    def uniform(self, purpose: str | int, shape: Sequence[int] = ()) -> Tensor:
        """Uniform numbers in [0, 1), `[N, *shape]` fp32."""
        rows = [torch.rand(tuple(shape), generator=own, device=self.device) for own in self.generators(purpose)]
        return torch.stack(rows)

    def generators(self, purpose: str | int) -> list[torch.Generator]:
        """One generator per row, for functions that draw their numbers themselves."""
        word = zlib.crc32(purpose.encode()) if isinstance(purpose, str) else purpose
        pairs = zip(self.ids, self.copies, strict=True)
        return [generator(self.seed, input_id, copy, word, device=self.device) for input_id, copy in pairs]

    def of(self, *path: int) -> "Noise":
        """Other numbers for the same rows."""
        return replace(self, seed=sub_seed(self.seed, *path))

    def rows(self, rows: slice | Sequence[int]) -> "Noise":
        """The numbers of these rows."""
        places = range(len(self.ids))[rows] if isinstance(rows, slice) else rows
        return replace(self, ids=tuple(self.ids[i] for i in places), copies=tuple(self.copies[i] for i in places))
