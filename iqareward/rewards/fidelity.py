"""A guard against reward hacking: a judge's opinion counts only for images that stay faithful."""

from collections.abc import Sequence
from typing import Any, final

import torch

from iqareward.rewards._names import exact
from iqareward.rewards.compose import joint_facts
from iqareward.rewards.scoring import reward_mode
from iqareward.types import Bounds, Images, Reward, Scores


@final
class FidelityFloor:
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
        ValueError: `reward` has no lower bound and `low` is not given.

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
        self.reward, self.fidelity = reward, fidelity
        self.floor, self.low = floor, low
        self.name = name or f"{reward.name}[{fidelity.name}>={exact(floor)}]"
        self.needs_references, self.needs_prompts, self.differentiable = joint_facts([reward, fidelity])
        self.bounds: Bounds = (None, reward.bounds[1])

    def __call__(
        self,
        images: Images,
        references: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """The guarded score of each image; `[B]` float32, higher is better, NaN where either part did not score."""
        rewards = self.reward(images, references=references, prompts=prompts)
        fidelity = self.fidelity(images, references=references, prompts=prompts)
        with reward_mode(rewards.device.type, differentiable=self.differentiable):
            shortfall = fidelity - self.floor
            guarded = torch.where(shortfall >= 0, rewards, self.low + shortfall)
            return torch.where(rewards.isnan() | fidelity.isnan(), torch.nan, guarded)
