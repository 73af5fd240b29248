"""The weightings and rewards that are compared, and the studies they belong to."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from examples.small_restorer.tasks import TASKS
from iqareward.schedules import Schedule, Weighter, constant
from iqareward.weighting import AdaptiveWeighter, LossWeights, mix

FIXED = (0.25, 0.5, 0.75, 0.9, 0.95)
FRONT = ("sft", *(f"fixed {share:g}" for share in FIXED), "rl")  # arms with the same share for all inputs
UNTRAINED = ("degraded", "frozen", "one step")
SFT = "sft, all compute"
PICTURED = (*UNTRAINED, SFT, "rl", "adaptive")  # with seed 0
MOST_SFT = 4.0  # times the RL weight


class Job(NamedTuple):
    """One run: the model that it starts from, the reward, the weighting, and the seed."""

    start: str
    reward: str
    arm: str
    seed: int


@dataclass
class Relative:
    """Weights by an input's error relative to that of the start.

    Args:
        formula: From ratios d / d0 `[B]` to weights; d0 is a quantile of the errors before RL.
        quantile: Which one.
    """

    formula: Callable[[Tensor], LossWeights]
    quantile: float = 0.5
    scale: float = float("nan")

    signal: Literal["difficulty"] = field(default="difficulty", init=False, repr=False)

    def __call__(
        self, difficulty: Tensor, *, has_signal: Tensor | None = None, valid: Tensor | None = None, **options: Any
    ) -> LossWeights:
        """The formula's weights; SFT only where rewards have no spread or there is no difficulty."""
        known = difficulty.isfinite()
        rl, sft = self.formula(torch.where(known, difficulty / self.scale, 1.0))
        rl = rl * known if has_signal is None else rl * known * has_signal
        return LossWeights(rl, sft) if valid is None else LossWeights(rl * valid, sft * valid)

    def calibrate(self, difficulty: Tensor) -> None:
        """Take the quantile of the difficulties before RL."""
        self.scale = float(difficulty.float().nanquantile(self.quantile))

    def update(self, difficulty: Tensor) -> None:
        """Do nothing."""

    def state_dict(self) -> dict[str, Any]:
        """The scale."""
        return {"scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.scale = state["scale"]


def inverse_power(ratio: Tensor, *, power: float) -> LossWeights:
    """RL 1, SFT half of the inverse power of the ratio."""
    return LossWeights(torch.ones_like(ratio), (0.5 * ratio**-power).clamp(max=MOST_SFT))


def above(ratio: Tensor) -> LossWeights:
    """RL above a ratio of 1, nothing below."""
    return LossWeights((ratio > 1).float(), torch.zeros_like(ratio))


@dataclass
class LearningProgress:
    """SFT for tasks whose error still falls, RL for those where it has stopped.

    For each task it keeps a fast and a slow running mean of log(d / d before). The SFT share is how far the fast one is
    below the slow one, in units of `unit`, clamped to [0, 1].

    Args:
        before: `[N]` error of each training input before RL.
        unit: Fall of the logarithm that counts as full progress; the two means lie about 15 updates apart.
        decays: Of the two means, per update.
    """

    before: Tensor
    unit: float = 0.03
    decays: tuple[float, float] = (0.8, 0.95)
    ids: Callable[[int], list[int]] | None = None  # of an update: the trainer's order
    step: int = 0
    means: Tensor = field(default_factory=lambda: torch.zeros(2, len(TASKS)))

    signal: Literal["difficulty"] = field(default="difficulty", init=False, repr=False)

    def __call__(
        self, difficulty: Tensor, *, has_signal: Tensor | None = None, valid: Tensor | None = None, **options: Any
    ) -> LossWeights:
        """`sft` is the progress of the row's task, `rl = 1 - sft`."""
        tasks, _ = self._rows(difficulty)
        fast, slow = self.means[:, tasks].to(difficulty.device)
        return mix(1 - ((slow - fast) / self.unit).clamp(0, 1), has_signal=has_signal, valid=valid)

    def update(self, difficulty: Tensor) -> None:
        """Move both means of the tasks in this update."""
        tasks, logs = self._rows(difficulty)
        self.means = self.means.clone()
        for task in tasks.unique().tolist():
            new = logs[tasks == task].nanmean()
            for row, decay in enumerate(self.decays):
                self.means[row, task] = decay * self.means[row, task] + (1 - decay) * new
        self.step += 1

    def _rows(self, difficulty: Tensor) -> tuple[Tensor, Tensor]:
        assert self.ids is not None, "the order of the trainer"
        ids = torch.tensor(self.ids(self.step))
        return ids % len(TASKS), (difficulty.detach().cpu() / self.before[ids]).log()

    def state_dict(self) -> dict[str, Any]:
        """Step and means."""
        return {"step": self.step, "means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        self.step, self.means = state["step"], state["means"]


def share(value: float) -> Schedule:
    """The same RL share everywhere."""
    return Schedule(partial(constant, share=value))


WEIGHTERS: dict[str, Callable[[], Weighter]] = {
    "sft": partial(share, 0.0),
    "rl": partial(share, 1.0),
    **{f"fixed {value:g}": partial(share, value) for value in FIXED},
    "adaptive": AdaptiveWeighter,
    "adaptive, convex": partial(AdaptiveWeighter, mode="convex"),
    "reversed": partial(AdaptiveWeighter, direction="hard_to_sft"),
    "worst 30 %": partial(Relative, above, 0.7),
    "inverse error": partial(Relative, partial(inverse_power, power=1.0)),
    "inverse square": partial(Relative, partial(inverse_power, power=2.0)),
    "headroom": AdaptiveWeighter,  # its difficulty is another one, see run.py
}  # and "learning progress", which is built from the errors before RL
MAIN = (
    *UNTRAINED, SFT, "sft", "rl", "adaptive", "fixed 0.5", "fixed 0.9", "inverse square", "fixed 0.75", "fixed 0.25",
    "fixed 0.95", "adaptive, convex", "reversed", "worst 30 %", "inverse error", "headroom", "learning progress",
)  # fmt: skip
EARLY = (
    *UNTRAINED, SFT, "sft", "rl", "adaptive", "fixed 0.5", "fixed 0.9", "fixed 0.75", "fixed 0.25", "learning progress",
)  # fmt: skip
REWARDS = ("quick", "stlpips", "psnr", "quick, floor", "stlpips, floor", "haarpsi, floor", "quick, gain")
REWARD_ARMS = ("rl", "adaptive", "fixed 0.5")
SAMPLED_REWARDS = ("haarpsi, sampled", "haarpsi, patches", "quick, sampled")  # by comparing rollouts; arm rl only
SEEDS, VARIANT_SEEDS, REWARD_SEEDS = 5, 3, 2
STUDIES = ("main", "early", "variants", "rewards")  # in order of importance


class Variant(NamedTuple):
    """An arm with another sampler in the test, or another learning rate.

    Attributes:
        arm: Whose weights are used.
        steps: Of the sampler in the test; its own if not given.
        rate: Factor of the learning rate.
    """

    arm: str
    steps: int | None = None
    rate: float = 1.0


VARIANTS = {
    "one step": Variant("frozen", steps=1),
    "fixed 0.5, one step": Variant("fixed 0.5", steps=1),
    "adaptive, one step": Variant("adaptive", steps=1),
    "rl, one step": Variant("rl", steps=1),
    "rl, a third of the rate": Variant("rl", rate=1 / 3),
    "rl, a tenth of the rate": Variant("rl", rate=0.1),
}


def jobs(study: str, seeds: int = SEEDS) -> Iterator[Job]:
    """All jobs of a study, so that a cut leaves whole seeds; what is not trained runs once."""
    if study == "rewards":
        for seed in range(min(seeds, REWARD_SEEDS)):
            for arm in REWARD_ARMS:
                rewards = (*REWARDS, *SAMPLED_REWARDS) if arm == "rl" else REWARDS
                yield from (Job("converged", reward, arm, seed) for reward in rewards)
        return
    if study == "variants":
        for seed in range(min(seeds, VARIANT_SEEDS)):
            yield from (Job("converged", "haarpsi", arm, seed) for arm in VARIANTS if arm not in UNTRAINED)
        return
    start, arms = ("converged", MAIN) if study == "main" else ("early", EARLY)
    for seed in range(seeds):
        yield from (Job(start, "haarpsi", arm, seed) for arm in arms if arm not in UNTRAINED or seed == 0)
