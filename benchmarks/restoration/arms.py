"""The weightings that are compared."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.toy.controllers import TargetTracking
from iqareward.schedules import Schedule, Weighter, constant, cosine, gate, logistic_success, soft_gate
from iqareward.schedules import softmax_batch as softmax
from iqareward.weighting import AdaptiveWeighter, LossWeights

FIXED = (0.25, 0.5, 0.75, 0.9)


@dataclass
class ByPassing:
    """Feeds a formula of pass rates: 1 where an input's mean difficulty is below the model's before RL, else 0."""

    schedule: Schedule
    threshold: float = float("nan")

    signal: Literal["difficulty"] = field(default="difficulty", init=False, repr=False)

    def __call__(self, difficulty: Tensor, **options: Any) -> LossWeights:
        """The formula's weights."""
        return self.schedule(pass_rate=(difficulty < self.threshold).float(), **options)

    def calibrate(self, difficulty: Tensor) -> None:
        """The median before RL counts as passing."""
        self.threshold = float(difficulty.nanmedian())

    def update(self, difficulty: Tensor) -> None:
        """Count the step."""
        self.schedule.update()

    def state_dict(self) -> dict[str, Any]:
        """Threshold and step."""
        return {"threshold": self.threshold, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.threshold = state["threshold"]
        self.schedule.load_state_dict(state["schedule"])


class AdvantageScaling(AdaptiveWeighter):
    """The adaptive share multiplies the RL loss, mean one over the batch, beside SFT of constant weight one half."""

    def __call__(self, difficulty: Tensor, **options: Any) -> LossWeights:
        """`rl = w / mean(w)`, `sft = 0.5`."""
        rl = super().__call__(difficulty, **options).rl
        return LossWeights((rl / rl.mean()).nan_to_num(nan=0.0), torch.full_like(rl, 0.5))


@dataclass
class InverseError(AdaptiveWeighter):
    """RL with weight 1 everywhere, SFT with the weight 0.5 * d0 / d, d0 being the geometric mean before RL, at most 2.

    SFT : RL proportional to 1 / d is what maximises reward at a given mean RMSE (docs/explanation/weighting.md).
    """

    def __call__(self, difficulty: Tensor, **options: Any) -> LossWeights:
        """The two weights; SFT alone where the rewards have no spread, as everywhere."""
        rl = super().__call__(difficulty, **options).rl
        sft = 0.5 * (self.state_dict()["anchor"][0] - difficulty.log()).exp()
        return LossWeights(rl, sft.nan_to_num(nan=1.0).clamp(max=2.0))


@dataclass(frozen=True)
class Arm:
    """A weighting, and what else differs.

    Attributes:
        build: makes the weighter.
        headroom: difficulty is the reward's distance to that of the ground truth.
        reward: name in the reward study.
        watched: the monitor looks on.
        sampled: RL compares rollouts (DiffusionNFT) instead of following the reward's own gradient.
    """

    build: Callable[[], Weighter]
    headroom: bool = False
    reward: str = "haarpsi"
    watched: bool = False
    sampled: bool = False


def share(value: float) -> Schedule:
    """The same RL share everywhere."""
    return Schedule(partial(constant, share=value))


FOLLOWED = ("psnr", "haarpsi", "judge", "ensemble", "judge with floor")  # rewards with a gradient
SAMPLED = ("piqe", "niqe", "judge", "haarpsi")  # the first two have none, the others are there to compare
ALWAYS = ("frozen", "sft, all compute")  # they do without the loop
MAIN = (
    *ALWAYS,
    "sft",
    *(f"fixed {value:g}" for value in FIXED),
    "rl",
    "adaptive",
    "reversed",
    "headroom",
    "advantage scaling",
    "inverse error",
)


def arms(num_updates: int) -> dict[str, Arm]:
    """All arms that train with the loop."""
    decay = partial(cosine, peak=0.9, valley=0.1, warmup_steps=0, decay_steps=num_updates)
    found = {"sft": Arm(partial(share, 0.0)), "rl": Arm(partial(share, 1.0))}
    found |= {f"fixed {value:g}": Arm(partial(share, value)) for value in FIXED}
    found |= {
        "adaptive": Arm(AdaptiveWeighter),
        "reversed": Arm(partial(AdaptiveWeighter, direction="hard_to_sft")),
        "headroom": Arm(AdaptiveWeighter, headroom=True),
        "advantage scaling": Arm(partial(AdvantageScaling, mode="convex")),
        "inverse error": Arm(InverseError),
        "adaptive, convex": Arm(partial(AdaptiveWeighter, mode="convex")),
        "cosine": Arm(lambda: Schedule(decay)),
        "gate": Arm(lambda: ByPassing(Schedule(partial(gate, threshold=0.5)))),
        "gate, hard to RL": Arm(lambda: ByPassing(Schedule(partial(gate, threshold=0.5, direction="hard_to_rl")))),
        "soft gate": Arm(lambda: ByPassing(Schedule(soft_gate))),
        "logistic": Arm(lambda: ByPassing(Schedule(partial(logistic_success, sft=0.5)))),
        "softmax": Arm(lambda: Schedule(partial(softmax, sft=0.5))),
        "target tracking": Arm(partial(TargetTracking, centre=-3.0, target=0.75)),
    }
    options: dict[str, Any] = {"build": partial(share, 1.0), "watched": True}
    found |= {f"reward: {name}": Arm(reward=name, **options) for name in FOLLOWED}
    return found | {f"reward: {name}, sampled": Arm(reward=name, sampled=True, **options) for name in SAMPLED}
