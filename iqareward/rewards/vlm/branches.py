"""All beginnings of a numeric answer as one tree of tokens, and the expected number under the model's digits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from iqareward.rewards.readout import expected_value
from iqareward.rewards.vlm.ratings import Ratings


@dataclass(frozen=True)
class Branches:
    """Tokens that stand side by side behind a prompt; each sees the prompt and its own ancestors only.

    Attributes:
        ids: token ids.
        parents: index of each token's parent; -1 = the prompt.
        depths: how many ancestors each token has: its position behind the prompt.
        read: tokens whose next-token logits are read.
    """

    ids: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    read: tuple[int, ...]

    def visible(self, length: int) -> Tensor:
        """`[L, L]` bool: what each token of a sequence may attend to, behind a prompt of `length` tokens."""
        total = length + len(self.ids)
        visible = torch.ones(total, total, dtype=torch.bool).tril()
        visible[length:, length:] = False
        for index, parent in enumerate(self.parents):
            row = length + index
            if parent >= 0:
                visible[row, length:] = visible[length + parent, length:]
            visible[row, row] = True
        return visible


@dataclass(frozen=True)
class DigitReadout:
    """How a rating is read digit by digit: which beginnings the model is asked about, and what its answers mean.

    Args:
        ratings: the answers that count.
        digits: token ids of 0 to 9.
        point: token id of the decimal point.
    """

    ratings: Ratings
    digits: tuple[int, ...]
    point: int

    @property
    def first(self) -> tuple[int, ...]:
        """Digits that a rating may begin with."""
        return self.ratings.digits_after("")

    @property
    def open(self) -> tuple[int, ...]:
        """First digits that decimals follow; behind the highest there are only zeros."""
        return tuple(digit for digit in self.first if len(self.ratings.digits_after(f"{digit}.")) > 1)

    @property
    def branches(self) -> Branches:
        """A digit and the point for each open first digit, then ten digits behind every beginning but the longest."""
        ids, parents, read = [], [], []
        for digit in self.open:
            ids += [self.digits[digit], self.point]
            parents += [-1, len(ids) - 2]
            read.append(len(ids) - 1)
        level = list(read)
        for _ in range(self.ratings.decimals - 1):
            level = [self._grow(ids, parents, parent, digit) for parent in level for digit in range(10)]
            read += level
        depths: list[int] = []
        for parent in parents:
            depths.append(0 if parent < 0 else depths[parent] + 1)
        return Branches(tuple(ids), tuple(parents), tuple(depths), tuple(read))

    def _grow(self, ids: list[int], parents: list[int], parent: int, digit: int) -> int:
        ids.append(self.digits[digit])
        parents.append(parent)
        return len(ids) - 1

    def expectation(self, first: Tensor, decimals: list[Tensor]) -> Tensor:
        """Mean rating when every digit is drawn from the digits that may stand there.

        Args:
            first: `[B, first]` logits of the digits a rating may begin with.
            decimals: logits of the ten digits behind every beginning, `[B, open, 10]`, `[B, open * 10, 10]`, ...

        Returns:
            `[B]` float32.
        """
        worth: list[Tensor | float] = [0.0] * 10  # of the decimals behind each digit, from the last place on
        below: Tensor | None = None
        for place in range(self.ratings.decimals, 0, -1):
            unit = 10.0**-place
            worth = [digit * unit for digit in range(10)]
            if below is not None:
                worth = [digit * unit + below[..., digit] for digit in range(10)]
            found = expected_value(decimals[place - 1], worth)  # [B, open * 10 ** (place - 1)]
            below = found.unflatten(-1, (-1, 10)) if place > 1 else found
        assert below is not None
        behind = dict(zip(self.open, below.unbind(-1), strict=True))
        return expected_value(first, [digit + behind.get(digit, 0.0) for digit in self.first])
