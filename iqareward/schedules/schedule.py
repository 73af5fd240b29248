"""What a training loop needs of a weighting, and how a formula becomes one."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from iqareward.losses import LossWeights
from iqareward.types import Groups


class Weighter(Protocol):
    """What a training loop needs of a weighting; `AdaptiveWeighter` is one, and so is each of `iqareward.schedules`.

    Example:
        >>> from iqareward.schedules import TargetTracking
        >>> weighter: Weighter = TargetTracking(centre=-2.0)
    """

    def __call__(
        self,
        difficulty: Tensor,
        *,
        bucket: Groups | None = None,
        active: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LossWeights:
        """Weights of the rows of one step."""
        ...

    def update(self, difficulty: Tensor, bucket: Groups | None = None) -> None:
        """Learn from one optimiser step, after its weights were used."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        ...


@dataclass
class Schedule:
    """Make a formula a weighter; it counts the optimiser steps for the formulas that depend on them.

    Args:
        formula: `formula(rows, step=..., active=..., valid=...) -> LossWeights`, its options bound by `partial`.
        step: number of `update` calls so far.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from iqareward.schedules import constant
        >>> Schedule(partial(constant, share=0.25))(torch.tensor([0.1])).sft
        tensor([0.7500])
    """

    formula: Callable[..., LossWeights]
    step: int = 0

    def __call__(
        self,
        difficulty: Tensor,
        *,
        bucket: Groups | None = None,
        active: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LossWeights:
        """The formula's weights at this step; `difficulty` is what the formula takes first, `bucket` is not used."""
        return self.formula(difficulty, step=self.step, active=active, valid=valid)

    def update(self, difficulty: Tensor, bucket: Groups | None = None) -> None:
        """Count one optimiser step."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step of `state_dict()`."""
        self.step = state["step"]
