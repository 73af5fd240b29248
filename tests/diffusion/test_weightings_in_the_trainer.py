"""Every weighting of the library in the real trainer: hard and easy inputs get what its paper says."""

from functools import partial

import pytest
import torch

from iqareward.advantages import RewardMemory
from iqareward.diffusion import DifficultyAdaptiveTrainer, RolloutConfig, TrainConfig
from iqareward.rewards.metric import FullReference
from iqareward.schedules import (
    Schedule,
    constant,
    cosine,
    gate,
    logistic_success,
    soft_gate,
    softmax_batch,
)
from iqareward.weighting import AdaptiveWeighter
from tests.diffusion.tiny import SIZE, pixel_policy
from tests.diffusion.train_tiny import contrast, trainer

EASY, HARD, PASSES = 0.02, 0.6, 0.1  # distances to the ground truth; a rollout passes up to the last
passing = partial(Schedule, pass_distance=PASSES)
# The RL and the SFT weight of hard inputs against those of easy ones: 1 = larger, 0 = equal, -1 = smaller.
WEIGHTINGS = {
    "adaptive": (partial(AdaptiveWeighter), 0, -1),
    "adaptive, convex": (partial(AdaptiveWeighter, mode="convex"), 1, -1),
    "adaptive, reversed": (partial(AdaptiveWeighter, mode="convex", direction="hard_to_sft"), -1, 1),
    "constant": (partial(Schedule, partial(constant, share=0.25)), 0, 0),
    "cosine": (partial(Schedule, partial(cosine, peak=0.8, valley=0.2, warmup_steps=1, decay_steps=4)), 0, 0),
    "gate": (partial(passing, gate), -1, 1),
    "gate, hard to RL": (partial(passing, partial(gate, direction="hard_to_rl")), 1, -1),
    "soft_gate": (partial(passing, soft_gate), -1, 1),
    "soft_gate, hard to RL": (partial(passing, partial(soft_gate, direction="hard_to_rl")), 1, -1),
    "logistic_success": (partial(passing, partial(logistic_success, sft=0.5)), 1, 0),
    "softmax_batch": (partial(Schedule, partial(softmax_batch, sft=0.5)), 1, 0),
}


class EasyAndHard:
    """Inputs whose number is odd are hard: `brightness`, the metric of these tests, calls them far from the truth."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        """A grey image."""
        image = torch.full((3, SIZE, SIZE), HARD if index % 2 else EASY)
        return {"lq": image, "gt": image}


brightness = FullReference(
    lambda images, references: -references.mean((1, 2, 3)), name="brightness", higher_is_better=True, bounds=(None, 0.0)
)


class Watched:
    """A weighter that remembers what it was given and what it gave."""

    def __init__(self, weighter):
        self.weighter, self.seen = weighter, []

    def __getattr__(self, name):
        return getattr(self.weighter, name)

    def __call__(self, **given):
        weights = self.weighter(**given)
        self.seen.append((given[self.weighter.signal], weights))
        return weights


def trained(weighter, folder) -> DifficultyAdaptiveTrainer:
    """A trainer of the tiny policy on easy and hard inputs."""
    tiny = trainer(
        folder,
        train_config=TrainConfig(inputs_per_update=4),
        rollout_config=RolloutConfig(group_size=2, num_steps=2),
        validation=None,
        memory=None,
    )
    return DifficultyAdaptiveTrainer(
        pixel_policy(),
        tiny.rewards,
        EasyAndHard(),
        output_dir=folder,
        weighter=weighter,
        metric=brightness,
        rollout_config=tiny.rollout_config,
        train_config=tiny.train_config,
        accelerator=tiny.accelerator,
        show_progress=False,
    )


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_hard_and_easy_inputs_are_treated_as_the_paper_says(name, tmp_path):
    """The trainer hands each weighting the signal it takes, in every update."""
    build, rl_sign, sft_sign = WEIGHTINGS[name]
    watched = Watched(build())
    run = trained(watched, tmp_path)
    run.train(2)
    assert len(watched.seen) == 2
    for update, (rows, weights) in enumerate(watched.seen):
        hard = torch.tensor(run.order.ids(update)) % 2 == 1
        assert 0 < hard.sum() < len(hard)
        of_hard, of_easy = (0.0, 1.0) if watched.signal == "pass_rate" else (HARD, EASY)
        torch.testing.assert_close(rows, torch.where(hard, of_hard, of_easy), rtol=1e-5, atol=0.0)
        signs = [torch.sign(found[hard][0] - found[~hard][0]) for found in weights]
        assert signs == [rl_sign, sft_sign]


def test_schedules_count_the_updates(tmp_path):
    """CHORD's share of SFT is 0 before the first update and at its peak after the warm-up."""
    build, _, _ = WEIGHTINGS["cosine"]
    history = trained(build(), tmp_path).train(2)
    assert [line["sft_share"] for line in history[1:]] == pytest.approx([0.0, 0.8])


@pytest.mark.parametrize(
    ("weighter", "advice"),
    [
        (Schedule(gate), "pass_distance"),
        (Schedule(soft_gate), "pass_distance"),
        (Schedule(logistic_success), "pass_distance"),
        (contrast, "attribute `signal`"),
    ],
)
def test_weightings_that_would_not_get_their_signal_are_refused(weighter, advice, tmp_path):
    """When the trainer is built, with what to do instead."""
    with pytest.raises(ValueError, match=advice):
        trained(weighter, tmp_path)


def test_a_memory_of_fewer_inputs_is_refused(tmp_path):
    """On a GPU ids beyond it could not be seen, and their inputs would never learn by RL."""
    with pytest.raises(ValueError, match="16 inputs, got 15"):
        trainer(tmp_path, memory=RewardMemory(15))


def test_formulas_name_their_signal():
    """A schedule takes it from its formula, whatever is bound, and refuses one that does not say."""
    assert Schedule(partial(gate, threshold=0.25)).signal == "pass_rate"
    assert Schedule(partial(constant, share=0.5)).signal == "difficulty"
    with pytest.raises(ValueError, match="first parameter"):
        Schedule(lambda rows, **options: constant(rows, share=0.5))
    with pytest.raises(ValueError, match="pass_distance"):
        Schedule(softmax_batch, pass_distance=0.1)
