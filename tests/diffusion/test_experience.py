"""What the trainer collects: scores of the right images, advantages among the right rollouts, nothing from noise."""

import pytest
import torch

from iqareward.advantages import combine_advantages, group_advantages
from iqareward.diffusion import Batch, RolloutConfig, TrainConfig
from iqareward.diffusion.rollouts import Sampled, Trajectory, compare
from iqareward.rewards.metric import NoReference
from tests.diffusion.tiny import ETA, KINDS, policy_of
from tests.diffusion.train_tiny import contrast, experience_of, trainer, use_reward
from tests.tolerances import EXACT, FORMULA_FP32

SMALL = {"validation": None, "memory": None}


def test_stepwise_rewards_score_the_predicted_images(tmp_path):
    """A row for each step asked for, of the clean image predicted there, then one for the sample."""
    sampling = RolloutConfig(group_size=2, num_steps=4, reward_steps=(0, 2), inputs_at_once=2)
    run = trainer(tmp_path, rollout_config=sampling, **SMALL)
    experience = experience_of(run)
    path = experience.trajectory
    assert experience.rewards.shape == experience.advantages.shape == (3, 8)
    for row, latents in zip(experience.rewards, [path.clean[0], path.clean[2], path.sample], strict=True):
        torch.testing.assert_close(row, contrast(run.policy.decode(latents, {}).clamp(0, 1)), **FORMULA_FP32)
    groups = torch.arange(4).repeat_interleave(2)
    for row, advantages in zip(experience.rewards, experience.advantages, strict=True):
        torch.testing.assert_close(advantages, group_advantages(row, groups).values, **FORMULA_FP32)


@pytest.mark.parametrize("kind", KINDS)
def test_every_policy_learns_in_a_window(tmp_path, kind):
    """With two stochastic steps of four (MixGRPO) and a scored step, an update moves every kind of model."""
    sampling = RolloutConfig(group_size=2, num_steps=4, eta=ETA[kind], window=range(1, 3), reward_steps=(1,))
    run = trainer(tmp_path, rollout_config=sampling, policy=policy_of(kind), **SMALL)
    before = [weight.detach().clone() for weight in run.learner.weights]
    assert experience_of(run).trajectory.stochastic == (1, 2)
    line = run.train(1)[-1]
    assert torch.tensor([line["rl_loss"], line["sft_loss"], line["grad_norm"]]).isfinite().all()
    assert any(not torch.equal(old, new) for old, new in zip(before, run.learner.weights, strict=True))


def test_inputs_without_spread_are_left_to_sft(tmp_path):
    """A reward that is the same for all, or differs less than its noise: no input has a signal, no weight is for RL."""
    flat = NoReference(lambda images: 0 * contrast(images) + 3, name="flat", higher_is_better=True)
    run = trainer(tmp_path / "flat", **SMALL)
    use_reward(run, flat)
    line = run.train(1)[-1]
    assert (line["has_signal"], line["rl_share"], line["rl_loss"]) == (0, 0, 0)
    noisy = trainer(tmp_path / "noisy", train_config=TrainConfig(inputs_per_update=4, std_floor=10.0), **SMALL)
    line = noisy.train(1)[-1]
    assert (line["has_signal"], line["rl_share"]) == (0, 0)
    assert line["sft_share"] == pytest.approx(1)


def compared(rewards, ids, weights=(1.0,), **options):
    """Rewards `[R, N]` of rollouts of these inputs, compared with each other."""
    parts = torch.tensor(rewards)[:, None]
    size = parts.shape[2] // len(ids)
    batch, path = Batch(ids, torch.zeros(len(ids), 3, 2, 2)), Trajectory((), torch.zeros(0, 0), (), (), ())
    sampled = Sampled(batch, {}, path, parts, torch.zeros(parts.shape[2]))
    return compare([sampled], RolloutConfig(group_size=size), weights=weights, std_floor=0.0, **options)[0]


def test_an_unscored_rollout_says_nothing():
    """NaN gets the advantage 0 and does not touch the other rollouts of its input."""
    scores = [1.0, float("nan"), 3.0, 0.0, 1.0, 2.0]
    found = compared([scores], (0, 1)).advantages[0]
    kept = [0, 2, 3, 4, 5]
    rewards, inputs = torch.tensor(scores)[kept], torch.tensor([0, 0, 1, 1, 1])
    assert found[1] == 0
    torch.testing.assert_close(found[kept], group_advantages(rewards, inputs).values, **FORMULA_FP32)


def test_several_rewards_are_normalised_before_they_are_added():
    """A hundred-point reward does not drown a one-point reward, as in a weighted sum (GDPO); weights still count."""
    small, large = [0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 100.0, 100.0]
    found = compared([small, large], (5,), weights=(1.0, 1.0))
    rewards = torch.tensor([small, large]).T
    expected = combine_advantages(rewards, torch.zeros(4, dtype=torch.int64), weights=[1.0, 1.0]).values
    torch.testing.assert_close(found.advantages[0], expected, **FORMULA_FP32)
    torch.testing.assert_close(found.advantages[0, 1], found.advantages[0, 2], rtol=0.0, atol=1e-3)  # 1e-4 beside a std
    torch.testing.assert_close(found.rewards[0], torch.tensor([0.0, 1.0, 100.0, 101.0]), **EXACT)
    alone = compared([small, large], (5,), weights=(1.0, 0.0)).advantages[0]
    assert alone[1] > alone[2]


def test_averaged_weights_are_lent_for_validation(tmp_path):
    """Inside `averaged` the model has the running average of its weights, afterwards its own again."""
    run = trainer(tmp_path, train_config=TrainConfig(learning_rate=1e-2, inputs_per_update=4, ema_decay=0.5), **SMALL)
    run.calibrate()
    snapshots = []
    for _ in range(2):
        run.update()
        snapshots.append([weight.detach().clone() for weight in run.learner.weights])
    with run.learner.averaged():
        lent = [weight.detach().clone() for weight in run.learner.weights]
    for first, second, average, after in zip(*snapshots, lent, run.learner.weights, strict=True):
        # diffusers warms the decay up: 0 in the first step, 2 / 11 in the second, 0.5 later.
        torch.testing.assert_close(average, torch.lerp(second, first, 2 / 11), **FORMULA_FP32)
        torch.testing.assert_close(after.detach(), second, **EXACT)
