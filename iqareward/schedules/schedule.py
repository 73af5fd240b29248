"""What a training loop needs of a weighting, and how a formula becomes one."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from torch import Tensor

from iqareward.types import Groups
from iqareward.weighting import LossWeights

Signal: TypeAlias = Literal["difficulty", "pass_rate", "gradient_noise"]
"""What a weighting goes by: a distance to the ground truth (large = hard), the share of an input's rollouts that pass
(small = hard), or the noise of the two gradients, which `NoiseAware.observe` takes."""

ADVICE = {
    "pass_rate": "Name the largest distance to the ground truth at which a rollout passes: "
    'Schedule(partial(gate, direction="hard_to_rl"), pass_distance=0.05).',
    "gradient_noise": "Use it in a loop of your own that calls `observe(gradient_noise(...))`.",
}


class Weighter(Protocol):
    """What a training loop needs of a weighting; `AdaptiveWeighter` is one, and so is each of `iqareward.schedules`.

    Attributes:
        signal: what its first argument is. A loop that gives something else refuses the weighting with `check_signal`.

    Example:
        >>> from iqareward.schedules import TargetTracking
        >>> weighter: Weighter = TargetTracking(centre=-2.0)
    """

    @property
    def signal(self) -> Signal: ...

    def __call__(
        self,
        difficulty: Tensor,
        /,
        *,
        bucket: Groups | None = None,
        active: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LossWeights:
        """Weights of the rows of one step."""
        ...

    def update(self, difficulty: Tensor, /, bucket: Groups | None = None) -> None:
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
        formula: `formula(rows, step=..., active=..., valid=...) -> LossWeights`, its options bound by `partial`. The
            name of its first parameter, `difficulty` or `pass_rate`, says which signal it takes.
        step: number of `update` calls so far.
        pass_distance: largest distance to the ground truth at which a rollout passes, for loops that measure distances
            and make pass rates of them, such as `DifficultyAdaptiveTrainer`. Only with formulas of pass rates.

    Raises:
        ValueError: the formula's first parameter has another name, or it takes no pass rates and `pass_distance` is
            given.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from iqareward.schedules import constant
        >>> Schedule(partial(constant, share=0.25))(torch.tensor([0.1])).sft
        tensor([0.7500])
    """

    formula: Callable[..., LossWeights]
    step: int = 0
    pass_distance: float | None = None
    signal: Signal = field(init=False, repr=False)

    def __post_init__(self) -> None:
        first = next(iter(inspect.signature(self.formula).parameters), None)
        if first not in ("difficulty", "pass_rate"):
            raise ValueError(
                "Schedule expected a formula whose first parameter is named `difficulty` (large = hard) or `pass_rate` "
                f"(small = hard), got `{first}`. Rename it after what the formula takes."
            )
        if first == "difficulty" and self.pass_distance is not None:
            raise ValueError(
                "Schedule expected `pass_distance` only with a formula of `pass_rate`, got one of `difficulty`."
            )
        self.signal = first

    def __call__(
        self,
        rows: Tensor,
        *,
        bucket: Groups | None = None,
        active: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LossWeights:
        """The formula's weights at this step; `rows` `[B]` are the formula's `signal`, `bucket` is not used."""
        return self.formula(rows, step=self.step, active=active, valid=valid)

    def update(self, rows: Tensor, bucket: Groups | None = None) -> None:
        """Count one optimiser step."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """The step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step of `state_dict()`."""
        self.step = state["step"]


def check_signal(caller: str, weighter: Any, given: Sequence[Signal] = ("difficulty",)) -> None:
    """Refuse a weighting that does not take what `caller` gives it.

    Args:
        caller: named in the message.
        weighter: any object.
        given: the signals that the caller can give; "pass_rate" only with the weighter's own `pass_distance`.

    Raises:
        ValueError: the weighter names no signal, or one that it would not be given.

    Example:
        >>> from iqareward.schedules import NoiseAware
        >>> check_signal("loop", NoiseAware())  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: loop expected a weighter whose `signal` is 'difficulty', got NoiseAware with 'gradient_noise'. ...
    """
    signal = getattr(weighter, "signal", None)
    missing = signal == "pass_rate" and getattr(weighter, "pass_distance", None) is None
    if signal not in given or missing:
        raise ValueError(
            f"{caller} expected a weighter whose `signal` is {' or '.join(map(repr, given))}, got "
            f"{type(weighter).__name__} with {signal!r}"
            f"{' and no `pass_distance`' if missing and signal in given else ''}. "
            f"{ADVICE.get(str(signal), 'Say what it takes with an attribute `signal`.')}"
        )
