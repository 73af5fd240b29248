"""A guard against reward hacking: a judge's opinion counts only for images that stay faithful."""

from typing import final

import torch
from torch import Tensor

from iqareward.rewards._names import exact
from iqareward.rewards.core import Combined
from iqareward.types import Reward, Scores


@final
class FidelityFloor(Combined):
    """A no-reference reward that counts only above a floor of fidelity: fidelity first, then the reward.

    Where `fidelity >= floor` the score is the reward's. Below, it is `low + (fidelity - floor)`: under every score
    above the floor, and rising with fidelity, so that an image which a judge likes but which lost its content cannot
    win.

    Args:
        reward: the judge.
        fidelity: a full-reference reward, e.g. `load("psnr")`.
        floor: in units of `fidelity`.
        low: the least score that `reward` gives; default: its lower bound.
        name: default: from the parts.

    Raises:
        ValueError: `reward` has no lower bound and `low` is not given, or both have one name.

    Example:
        >>> import torch, iqareward
        >>> judge = iqareward.load("niqe[-12, 0]")  # stands for a judge such as "qalign"
        >>> reward = iqareward.FidelityFloor(judge, iqareward.load("psnr"), floor=25.0)
        >>> references = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        >>> reward(1 - references, references=references) < 0  # below every score of the judge
        tensor([True])
    """

    def __init__(
        self,
        reward: Reward,
        fidelity: Reward,
        *,
        floor: float,
        low: float | None = None,
        name: str | None = None,
    ) -> None:
        low = reward.bounds[0] if low is None else low
        if low is None:
            raise ValueError(
                f"FidelityFloor expected a reward with a lower bound, but {reward.name} has none. "
                "Pass low=..., or wrap the reward in Calibrated."
            )
        self.floor, self.low = floor, low
        formula = f"{reward.name}[{fidelity.name}>={exact(floor)}]"
        super().__init__([reward, fidelity], name=name or formula, bounds=(None, reward.bounds[1]))

    def combine_rows(self, rows: Tensor) -> Scores:
        """The guarded score of each image."""
        scores, fidelity = rows.unbind()
        shortfall = fidelity - self.floor
        guarded = torch.where(shortfall >= 0, scores, self.low + shortfall)
        return torch.where(scores.isnan() | fidelity.isnan(), torch.nan, guarded)
