"""Alternatives to `AdaptiveWeighter` for weighing RL against SFT: a constant baseline, and published formulas.

A formula is a function. `Schedule` makes a weighter of it, with its options bound by `functools.partial`:

    weighter = Schedule(partial(cosine, peak=0.9, valley=0.05, warmup_steps=100, decay_steps=1000))

Some formulas take a `difficulty` (large = hard), others a `pass_rate` (small = hard), which is always passed by name.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from iqareward.groups import check_rows
from iqareward.types import Groups
from iqareward.weighting import Direction, LossWeights, mix

__all__ = [
    "Schedule",
    "Weighter",
    "check_signal",
    "constant",
    "cosine",
    "gate",
    "logistic_success",
    "soft_gate",
    "softmax_batch",
]

Signal: TypeAlias = Literal["difficulty", "pass_rate"]
"""The signal that a weighting takes.

"difficulty": a distance to the ground truth; large means hard.
"pass_rate": the share of an input's rollouts that pass; small means hard.
"""

# HPT's: (RL, SFT) for 0 to 8 solved of 8 rollouts.
_HPT_TABLE = ((0.0, 1.0), (0.0, 1.0), (0.125, 0.5), (0.25, 0.25), (0.5, 0.125), *[(1.0, 0.0)] * 4)
_ROUNDING = 1e-3  # of a mean in float16


class Weighter(Protocol):
    """What a training loop needs of a weighting, such as `AdaptiveWeighter` or `Schedule`.

    Attributes:
        signal: name of the argument that it takes. A loop that measures something else refuses the weighting with
            `check_signal`.

    Example:
        >>> weighter: Weighter = Schedule(softmax_batch)
    """

    @property
    def signal(self) -> Signal: ...

    def __call__(self, *args: Any, **kwargs: Any) -> LossWeights:
        """Compute the weights of one step from `difficulty=` or `pass_rate=`, with `bins=`, `has_signal=`, `valid=`."""
        ...

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Learn from the same `difficulty=` or `pass_rate=` after the optimiser step, with `bins=`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return everything that `load_state_dict` needs to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        ...


def check_signal(caller: str, weighter: Any, given: Sequence[Signal] = ("difficulty",)) -> None:
    """Refuse a weighting that does not take what `caller` measures.

    Args:
        caller: name of the loop, for the message.
        weighter: any object.
        given: the signals that the caller can give; "pass_rate" only with the weighter's own `pass_distance`.

    Raises:
        ValueError: the weighter names no signal, or one that it would not be given.

    Example:
        >>> check_signal("loop", Schedule(gate))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: loop expected a weighter whose `signal` is 'difficulty', got Schedule with 'pass_rate'. ...
    """
    signal = getattr(weighter, "signal", None)
    missing = signal == "pass_rate" and getattr(weighter, "pass_distance", None) is None
    if signal in given and not missing:
        return
    got, advice = f"{type(weighter).__name__} with {signal!r}", "Say what it takes with an attribute `signal`."
    if signal == "pass_rate" and signal in given:
        got += " and no `pass_distance`"
        advice = (
            "Name the largest distance to the ground truth at which a rollout passes: "
            'Schedule(partial(gate, direction="hard_to_rl"), pass_distance=0.05).'
        )
    elif signal in ("difficulty", "pass_rate"):
        advice = "Choose a weighting that takes that, such as AdaptiveWeighter for a difficulty."
    raise ValueError(
        f"{caller} expected a weighter whose `signal` is {' or '.join(map(repr, given))}, got {got}. {advice}"
    )


@dataclass
class Schedule:
    """Make a weighter of a formula, and count the optimiser steps for formulas that depend on them.

    Args:
        formula: function from `difficulty` or `pass_rate` `[B]` to `LossWeights`, its options bound by `partial`. The
            name of its first parameter says which signal it takes; rows without a signal are NaN. A formula that has a
            parameter `step` is given the number of optimiser steps.
        step: number of `update` calls so far.
        pass_distance: largest distance to the ground truth at which a rollout passes, for loops that measure distances
            and make pass rates of them, such as `DifficultyAdaptiveTrainer`. Only with formulas of pass rates.

    Raises:
        ValueError: the formula's first parameter has another name, or it takes a difficulty and `pass_distance` is
            given.

    Example:
        >>> from functools import partial
        >>> Schedule(partial(constant, share=0.25))(torch.tensor([0.1])).sft
        tensor([0.7500])
        >>> Schedule(gate)(pass_rate=torch.tensor([0.0, 0.5])).sft
        tensor([1., 0.])
    """

    formula: Callable[..., LossWeights]
    step: int = 0
    pass_distance: float | None = None
    signal: Signal = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.formula).parameters
        first = next(iter(parameters), None)
        if first not in ("difficulty", "pass_rate"):
            raise ValueError(
                "Schedule expected a formula whose first parameter is named `difficulty` (large = hard) or `pass_rate` "
                f"(small = hard), got `{first}`. Rename it after what the formula takes."
            )
        if first == "difficulty" and self.pass_distance is not None:
            raise ValueError(
                "Schedule expected `pass_distance` only with a formula of `pass_rate`, got one of `difficulty`."
            )
        self.signal, self._takes_step = first, "step" in parameters

    def __call__(
        self,
        difficulty: Tensor | None = None,
        *,
        pass_rate: Tensor | None = None,
        bins: Groups | None = None,
        has_signal: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LossWeights:
        """Compute the formula's weights at this step.

        Args:
            difficulty: `[B]` >= 0, large = hard.
            pass_rate: `[B]` in [0, 1], small = hard.
            bins: ignored; formulas have no statistics per bin.
            has_signal: `[B]` bool; False (the rewards of the input have no spread) gives no RL.
            valid: `[B]` bool; False gives weight 0 to both losses.

        Raises:
            TypeError: the formula takes the other signal, or both or none are given.
        """
        signals = {"difficulty": difficulty, "pass_rate": pass_rate}
        rows = signals[self.signal]
        if rows is None or (difficulty is not None and pass_rate is not None):
            got = [name for name, given in signals.items() if given is not None]
            raise TypeError(
                f"This Schedule expected `{self.signal}=`, because its formula takes that, got {got}. "
                "iqareward.difficulty.pass_rate makes pass rates."
            )
        rows = check_rows("Schedule", rows)
        for mask in (has_signal, valid):
            rows = rows if mask is None else torch.where(mask, rows, torch.nan)
        options = {"step": self.step} if self._takes_step else {}
        rl, sft = self.formula(**{self.signal: rows}, **options)
        return LossWeights(rl, sft) if valid is None else LossWeights(rl * valid, sft * valid)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """Count one optimiser step."""
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        """Return the step."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at the step of `state_dict()`."""
        self.step = state["step"]


def constant(difficulty: Tensor, *, share: float) -> LossWeights:
    """Give every row the same RL share: `rl = share`, `sft = 1 - share`.

    Args:
        difficulty: `[B]`; only its NaN matter, which get SFT.
        share: in [0, 1]; 0 is SFT, 1 is pure RL.

    Returns:
        `LossWeights` of `[B]`.

    Example:
        >>> constant(torch.tensor([0.1, 9.0]), share=0.75).rl
        tensor([0.7500, 0.7500])
    """
    rows = check_rows("constant", difficulty)
    return mix(torch.where(rows.isnan(), 0.0, torch.full_like(rows, share)))


def cosine(
    difficulty: Tensor, *, step: int, peak: float, valley: float, warmup_steps: int, decay_steps: int
) -> LossWeights:
    """Let the SFT share mu follow time (CHORD-mu): up to `peak`, then down to `valley` along a half cosine.

    mu = peak * t / warmup_steps for t < warmup_steps, then
    valley + (peak - valley) * (1 + cos(pi * (t - warmup_steps) / decay_steps)) / 2 for decay_steps, then valley.

    Args:
        difficulty: `[B]`; only its NaN matter, which get SFT.
        step: t, the number of optimiser steps so far.
        peak: largest SFT share.
        valley: last SFT share.
        warmup_steps: steps up to the peak.
        decay_steps: steps from there to the valley.

    Returns:
        `LossWeights` of `[B]`.

    Example:
        >>> options = dict(peak=0.8, valley=0.2, warmup_steps=10, decay_steps=10)
        >>> tuple(round(cosine(torch.zeros(1), step=t, **options).sft.item(), 2) for t in (0, 5, 10, 15, 99))
        (0.0, 0.4, 0.8, 0.5, 0.2)

    References:
        Zhang et al., On-Policy RL Meets Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement
        Learning via Dynamic Weighting, 2025, https://arxiv.org/abs/2508.11408
    """
    if step < warmup_steps:
        sft = peak * step / warmup_steps
    else:
        progress = min(1.0, (step - warmup_steps) / max(1, decay_steps))
        sft = valley + (peak - valley) * (1 + math.cos(math.pi * progress)) / 2
    return constant(difficulty, share=1 - sft)


def gate(*, pass_rate: Tensor, threshold: float = 0.0, direction: Direction = "hard_to_sft") -> LossWeights:
    """Give each row either RL or SFT (HPT, SuperRL): `rl = 1[P > threshold]`, or `1[P <= threshold]` for "hard_to_rl".

    Args:
        pass_rate: `[B]` share P of an input's rollouts that pass, see `iqareward.difficulty.pass_rate`; NaN gets SFT.
        threshold: largest P that counts as hard; 0 for "none passes". HPT also uses 2/8.
        direction: "hard_to_sft" as published, or "hard_to_rl" as `AdaptiveWeighter`.

    Returns:
        `LossWeights` of `[B]`.

    Raises:
        ValueError: a pass rate on the CPU lies outside [0, 1]; on other devices that is not checked.

    Example:
        >>> gate(pass_rate=torch.tensor([0.0, 0.5])).rl
        tensor([0., 1.])

    References:
        Lv et al., Towards a Unified View of Large Language Model Post-Training, 2025, https://arxiv.org/abs/2509.04419;
        SuperRL, 2025, https://arxiv.org/abs/2506.01096
    """
    rows = _pass_rates("gate", pass_rate)
    passed = rows > threshold if direction == "hard_to_sft" else rows <= threshold  # both false for NaN
    return mix(passed.to(rows.dtype))


def soft_gate(
    *,
    pass_rate: Tensor,
    table: Sequence[tuple[float, float]] = _HPT_TABLE,
    direction: Direction = "hard_to_sft",
) -> LossWeights:
    """Read the weights from a table over the pass rate (HPT's soft form); an entry need not sum to 1.

    Args:
        pass_rate: `[B]` in [0, 1]; the nearest entry of the table counts, NaN gets SFT.
        table: (rl, sft) for pass rates from 0 to 1 in equal steps.
        direction: "hard_to_sft" as published; "hard_to_rl", as `AdaptiveWeighter`, reads the table from its end.

    Returns:
        `LossWeights` of `[B]`.

    Raises:
        ValueError: a pass rate on the CPU lies outside [0, 1]; on other devices that is not checked.

    Example:
        >>> soft_gate(pass_rate=torch.tensor([0.0, 0.375, 1.0])).rl
        tensor([0.0000, 0.2500, 1.0000])

    References:
        Lv et al., Towards a Unified View of Large Language Model Post-Training, 2025, https://arxiv.org/abs/2509.04419
    """
    rows = _pass_rates("soft_gate", pass_rate)
    place = ((rows if direction == "hard_to_sft" else 1 - rows) * (len(table) - 1)).round().clamp(0, len(table) - 1)
    rl, sft = torch.zeros_like(rows), torch.ones_like(rows)  # rows whose pass rate is NaN keep these
    for entry, (rl_weight, sft_weight) in enumerate(table):  # a tensor of the table would make the host wait
        rl, sft = torch.where(place == entry, rl_weight, rl), torch.where(place == entry, sft_weight, sft)
    return LossWeights(rl, sft)


def logistic_success(
    *,
    pass_rate: Tensor,
    output_range: tuple[float, float] = (0.4, 1.5),
    centre: float = 0.75,
    steepness: float = 10.0,
    sft: float = 0.0,
) -> LossWeights:
    """Give more RL to inputs of which less succeeds (GRPO-LEAD), beside a constant SFT weight.

    rl = low + (high - low) / (1 + exp(steepness * (P - centre))). The paper takes 1 - P for rollouts whose advantage is
    negative; here rollouts of one input have one weight.

    Args:
        pass_rate: `[B]` in [0, 1]; NaN gets rl = 0.
        output_range: (low, high): RL weight of inputs that always succeed, and of those that never do.
        centre: pass rate in the middle of the slope.
        steepness: slope of the sigmoid.
        sft: SFT weight of every row; 0 as published.

    Returns:
        `LossWeights` of `[B]`.

    Raises:
        ValueError: a pass rate on the CPU lies outside [0, 1]; on other devices that is not checked.

    Example:
        >>> logistic_success(pass_rate=torch.tensor([0.0, 0.75, 1.0])).rl
        tensor([1.4994, 0.9500, 0.4834])

    References:
        Zhang and Zuo, GRPO-LEAD: A Difficulty-Aware Reinforcement Learning Approach for Concise Mathematical Reasoning
        in Language Models, 2025, https://arxiv.org/abs/2504.09696
    """
    rows = _pass_rates("logistic_success", pass_rate)
    low, high = output_range
    rl = low + (high - low) * torch.sigmoid(-steepness * (rows - centre))
    return LossWeights(rl.nan_to_num(nan=0.0), torch.full_like(rl, sft))


def softmax_batch(difficulty: Tensor, *, temperature: float = 2.0, sft: float = 0.0) -> LossWeights:
    """Give more RL to rows that are harder than the rest of their batch (as DGPO), beside a constant SFT weight.

    rl = N * softmax(log d / temperature) over the N rows that have a difficulty, so that their mean is 1. DGPO takes
    the softmax of the negative mean reward instead of log d.

    Args:
        difficulty: `[B]` >= 0; NaN gets rl = 0 and is not counted.
        temperature: larger values make the weights more alike.
        sft: SFT weight of every row; 0 as published.

    Returns:
        `LossWeights` of `[B]`.

    Example:
        >>> softmax_batch(torch.tensor([0.1, 0.9]), temperature=1.0).rl
        tensor([0.2000, 1.8000])

    References:
        Dai et al., Harder Is Better: Boosting Mathematical Reasoning via Difficulty-Aware GRPO and Multi-Aspect
        Question Reformulation, 2026, https://arxiv.org/abs/2601.20614
    """
    logits = check_rows("softmax_batch", difficulty).log() / temperature
    counted = logits.isfinite()
    rl = torch.softmax(torch.where(counted, logits, -torch.inf), dim=0).nan_to_num(nan=0.0) * counted.sum()
    return LossWeights(rl, torch.full_like(rl, sft))


def _pass_rates(caller: str, pass_rate: Tensor) -> Tensor:
    """`check_rows`, and no distances; on other devices a check of values would wait."""
    rows = check_rows(caller, pass_rate)
    outside = (rows - 0.5).abs() > 0.5 + _ROUNDING
    if rows.device.type == "cpu" and outside.any():
        raise ValueError(
            f"{caller} expected `pass_rate` in [0, 1], small = hard, got {rows[outside][:5].tolist()}. Make pass rates "
            "of distances with iqareward.difficulty.pass_rate(-distances, groups, threshold=-pass_distance)."
        )
    return rows
