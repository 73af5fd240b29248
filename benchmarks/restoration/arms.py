"""The weightings that are compared."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from iqareward.losses import LossWeights
from iqareward.schedules import Schedule, TargetTracking, constant, cosine, gate, logistic_success, soft_gate
from iqareward.schedules import softmax_batch as softmax
from iqareward.schedules.schedule import Weighter
from iqareward.types import Groups
from iqareward.weighting import AdaptiveWeighter

FIXED = (0.25, 0.5, 0.75, 0.9)


@dataclass
class ByPassing:
    """Feeds a formula of pass rates: 1 where an input's mean difficulty is below the model's before RL, else 0."""

    schedule: Schedule
    threshold: float = float("nan")

    def __call__(self, difficulty: Tensor, **options: Any) -> LossWeights:
        """The formula's weights."""
        return self.schedule((difficulty < self.threshold).float(), **options)

    def calibrate(self, difficulty: Tensor, bucket: Groups | None = None) -> None:
        """The median before RL counts as passing."""
        self.threshold = float(difficulty.nanmedian())

    def update(self, difficulty: Tensor, bucket: Groups | None = None) -> None:
        """Count the step."""
        self.schedule.update(difficulty)

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


@dataclass(frozen=True)
class Arm:
    """A weighting; `headroom` measures difficulty by the reward's distance to that of the ground truth."""

    build: Callable[[], Weighter]
    headroom: bool = False


def arms(num_updates: int) -> dict[str, Arm]:
    """All arms that train with the loop."""
    decay = partial(cosine, peak=0.9, valley=0.1, warmup_steps=0, decay_steps=num_updates)
    found = {"sft": Arm(lambda: Schedule(partial(constant, share=0.0)))}
    for share in FIXED:
        found[f"fixed {share:g}"] = Arm(lambda share=share: Schedule(partial(constant, share=share)))
    return found | {
        "rl": Arm(lambda: Schedule(partial(constant, share=1.0))),
        "adaptive": Arm(AdaptiveWeighter),
        "adaptive, convex": Arm(partial(AdaptiveWeighter, mode="convex")),
        "reversed": Arm(partial(AdaptiveWeighter, direction="hard_to_sft")),
        "cosine": Arm(lambda: Schedule(decay)),
        "gate": Arm(lambda: ByPassing(Schedule(partial(gate, threshold=0.5)))),
        "gate, hard to RL": Arm(lambda: ByPassing(Schedule(partial(gate, threshold=0.5, direction="hard_to_rl")))),
        "soft gate": Arm(lambda: ByPassing(Schedule(soft_gate))),
        "logistic": Arm(lambda: ByPassing(Schedule(partial(logistic_success, sft=0.5)))),
        "softmax": Arm(lambda: Schedule(partial(softmax, sft=0.5))),
        "target tracking": Arm(partial(TargetTracking, centre=-2.0, target=0.75)),
        "headroom": Arm(AdaptiveWeighter, headroom=True),
        "advantage scaling": Arm(partial(AdvantageScaling, mode="convex")),
    }
