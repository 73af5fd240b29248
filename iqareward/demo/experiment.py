"""The measurement behind the report: damage, scores, difficulty and weights, and nothing about how they are shown."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from iqareward.demo.degradations import Degradation, degrade
from iqareward.demo.photographs import Photograph, load_photograph
from iqareward.difficulty import reference_distance
from iqareward.rewards.compose import evaluate
from iqareward.types import Reward
from iqareward.weighting import AdaptiveWeighter, LossWeights

SEED = 0
NUM_SAMPLES = 10
ERROR_FACTORS = (1.0, 0.8, 0.5, 0.2)
"""What remains of every sample's error as the model improves, for the handover."""


@dataclass(frozen=True)
class Experiment:
    """Everything measured; P photographs, D degradations, L levels of damage.

    Attributes:
        photographs: P of them.
        degradations: D of them.
        rewards: R of them.
        pictures: one per photograph, `[D, L + 1, 3, H, W]`, the original first.
        scores: name of the reward -> `[P, D, L + 1]`.
        difficulty: `[P, D, L]` root mean squared error to the original.
        handover: factor on all errors -> the two weights, `[P, D, L]` each; factor 1 is now.
    """

    photographs: tuple[Photograph, ...]
    degradations: tuple[Degradation, ...]
    rewards: tuple[Reward, ...]
    pictures: tuple[Tensor, ...]
    scores: dict[str, Tensor]
    difficulty: Tensor
    handover: dict[float, LossWeights]

    @property
    def weights(self) -> LossWeights:
        """RL and SFT weight of each damaged picture, `[P, D, L]` each."""
        return self.handover[1.0]

    @property
    def num_levels(self) -> int:
        """L, without the original."""
        return self.difficulty.shape[2]


@dataclass(frozen=True)
class Sample:
    """A damaged picture with its difficulty and weights.

    Attributes:
        title: degradation and strength.
        picture: `[3, H, W]`.
        focus: middle of the part to show.
        difficulty: root mean squared error to the original, in [0, 1].
        rl: weight of reinforcement learning.
        sft: weight of supervised fine-tuning.
    """

    title: str
    picture: Tensor
    focus: tuple[float, float]
    difficulty: float
    rl: float
    sft: float


def samples(experiment: Experiment, num_samples: int) -> list[Sample]:
    """Damaged pictures from the easiest to the hardest, at equal distances in rank."""
    difficulty = experiment.difficulty
    order = difficulty.flatten().argsort(stable=True)
    picks = torch.linspace(0, len(order) - 1, min(num_samples, len(order))).round().long()
    chosen = []
    for index in order[picks]:
        p, d, level = (int(place) for place in torch.unravel_index(index, difficulty.shape))
        degradation = experiment.degradations[d]
        chosen.append(
            Sample(
                f"{degradation.name} {degradation.written(level + 1)}",
                experiment.pictures[p][d, level + 1],
                experiment.photographs[p].focus,
                float(difficulty[p, d, level]),
                float(experiment.weights.rl[p, d, level]),
                float(experiment.weights.sft[p, d, level]),
            )
        )
    return chosen


@contextmanager
def one_thread() -> Generator[None]:
    """Let torch compute on one thread and give it back the others afterwards.

    The batches are small. With two threads on two busy cores each of the many short operations waits for the other
    thread to be scheduled: 12 to 25 seconds for what one thread does in 1 to 2.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def damage(
    photographs: Sequence[Photograph], degradations: Sequence[Degradation], *, short_side: int, num_levels: int
) -> tuple[Tensor, ...]:
    """Every photograph in every condition, `[D, L + 1, 3, H, W]` each, the original first."""
    photos = [load_photograph(photograph.name, short_side) for photograph in photographs]
    return tuple(
        torch.stack([degrade(photo, degradation, num_levels, SEED + index) for degradation in degradations])
        for index, photo in enumerate(photos)
    )


def score(
    judges: Sequence[Sequence[Reward]], pictures: Sequence[Tensor], *, advance: Callable[[], None]
) -> dict[str, Tensor]:
    """Every reward's score of every picture.

    Args:
        judges: the rewards of each photograph, under the same names.
        pictures: of each photograph, `[D, L + 1, 3, H, W]`.
        advance: called after each of the P * D batches.

    Returns:
        name -> `[P, D, L + 1]`.
    """
    rows: dict[str, list[Tensor]] = {reward.name: [] for reward in judges[0]}
    for rewards, photo in zip(judges, pictures, strict=True):
        for versions in photo:
            for name, scores in evaluate(rewards, versions, references=versions[:1].expand_as(versions)).items():
                rows[name].append(scores)
            advance()
    shape = (len(pictures), pictures[0].shape[0], pictures[0].shape[1])
    return {name: torch.stack(scores).reshape(shape) for name, scores in rows.items()}


def difficulty_of(pictures: Sequence[Tensor]) -> Tensor:
    """Distance of each damaged picture to its original as training would measure it; `[P, D, L]` RMSE in [0, 1]."""
    rows = []
    for photo in pictures:
        damaged = photo[:, 1:]
        originals = photo[:, :1].expand_as(damaged)
        rows.append(reference_distance(damaged.flatten(0, 1), originals.flatten(0, 1)).reshape(damaged.shape[:2]))
    return torch.stack(rows)


def weigh(difficulty: Tensor) -> dict[float, LossWeights]:
    """Weights of the samples as they are and as all errors shrink, by the factor; of the shape of `difficulty`."""
    rows = difficulty.flatten()
    weighter = AdaptiveWeighter()
    weighter.calibrate(rows)
    handover = {factor: weighter(rows * factor) for factor in ERROR_FACTORS}
    return {factor: LossWeights(*(row.view_as(difficulty) for row in pair)) for factor, pair in handover.items()}
