"""What users have: x4, sizes that differ, no ground truth, prompts and tasks, rewards that want to see all of it."""

import multiprocessing
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

import iqareward
from iqareward.advantages import RewardMemory, group_advantages, win_rates
from iqareward.diffusion import (
    ClippedPolicyGradient,
    DifficultyAdaptiveTrainer,
    DirectRewardGradient,
    FeedForwardPolicy,
    PixelPolicy,
    RolloutConfig,
    TrainConfig,
    TrainingError,
    Validation,
    batches,
)
from iqareward.diffusion.checkpoint import trained_weights
from iqareward.rewards import RankInGroup
from iqareward.rewards.metric import FullReference, NoReference
from tests.diffusion.tiny import pixel_policy, policy_of, unet
from tests.diffusion.train_tiny import contrast, experience_of
from tests.tolerances import EXACT, FORMULA_FP32

CONTRAST = NoReference(contrast, name="contrast", higher_is_better=True, bounds=(0.0, 1.0))


class Items:
    """A data set of a user: sizes of the degraded images in turn, enlarged references or none, prompts and tasks."""

    def __init__(self, sizes=((16, 16),), scale=1, truth=True, texts=True):
        self.sizes, self.scale, self.truth, self.texts = sizes, scale, truth, texts

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        generator = torch.Generator().manual_seed(index)
        height, width = self.sizes[index % len(self.sizes)]
        item = {"lq": torch.rand(3, height, width, generator=generator)}
        if self.truth:
            item["gt"] = torch.rand(3, self.scale * height, self.scale * width, generator=generator)
        return item | ({"prompt": f"photo {index}", "task": "ab"[index % 2]} if self.texts else {})


def x4_policy():
    """A pixel policy that enlarges four times."""
    return PixelPolicy(unet(), pixel_policy().process, scale=4)


def run_of(folder, pairs, policy=None, reward=CONTRAST, **options) -> DifficultyAdaptiveTrainer:
    """A trainer of two rollouts in three steps."""
    defaults = {
        "rollout_config": RolloutConfig(group_size=2, num_steps=3),
        "train_config": TrainConfig(learning_rate=1e-3, inputs_per_update=4, rows_at_once=3),
        "accelerator": Accelerator(cpu=True),
        "show_progress": False,
    }
    return DifficultyAdaptiveTrainer(policy or pixel_policy(), reward, pairs, output_dir=folder, **defaults | options)


def moved(run, before) -> bool:
    """Whether a weight differs."""
    return any(not torch.equal(weight, before[name]) for name, weight in trained_weights(run.policy.model).items())


def trains(run, updates=2) -> list[dict]:
    """The history of a run whose numbers are finite and whose weights move."""
    before = trained_weights(run.policy.model)
    history = run.train(updates, save_every=1, validate_every=1)
    assert moved(run, before)
    for line in history[1:]:
        assert torch.tensor([line["rl_loss"], line["sft_loss"], line["grad_norm"]]).isfinite().all()
        assert line["ratio"] < 1e-5, "the policy that learns is the one that sampled"
    return history


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize("truth", [True, False])
def test_sizes_may_differ_within_an_update(tmp_path, scale, truth):
    """Upright, wide and square images, restored, scored and validated each in its size; a resumed run is the same."""
    sizes = ((8, 8), (8, 12), (12, 8))
    data = Items(sizes, scale, truth)
    held_out = {"contrast": CONTRAST}

    def build(folder):
        quality = {} if truth else {"input_quality": CONTRAST}
        policy = x4_policy() if scale == 4 else pixel_policy()
        return run_of(folder, data, policy, validation=Validation(data, held_out, num_steps=2), **quality)

    whole = build(tmp_path / "a")
    history = trains(whole)
    assert len({part.degraded.shape for part in build(tmp_path / "b").validation.batches}) == 3
    if not truth:
        assert all(line["sft_loss"] == 0 for line in history[1:])
    with Image.open(tmp_path / "a" / "samples-000002.png") as grid:
        assert grid.width > 8 * 256
    half = build(tmp_path / "b")
    half.train(1, save_every=1, validate_every=1)
    again = build(tmp_path / "b")
    resumed = again.train(2, save_every=1, validate_every=1, resume=True)
    assert repr(resumed) == repr(history)
    for name, weight in trained_weights(again.policy.model).items():
        torch.testing.assert_close(weight, trained_weights(whole.policy.model)[name], **EXACT)


def test_an_input_does_not_depend_on_the_sizes_beside_it(tmp_path):
    """Its rollouts are the same among others of its size and among others of other sizes."""
    mixed, alike = (run_of(tmp_path, Items(sizes)) for sizes in (((8, 8), (8, 12)), ((8, 8),)))
    ids = mixed.order.ids(0)
    assert {each % 2 for each in ids} == {0, 1}

    def samples(run):
        found = {}
        for part in run.experiences(batches(run.pairs, ids), 0, 1):
            for place, each in enumerate(part.batch.ids):
                found[each] = part.trajectory.sample[2 * place : 2 * place + 2]
        return found

    for each in ids:
        if each % 2 == 0:
            torch.testing.assert_close(samples(mixed)[each], samples(alike)[each], rtol=1e-4, atol=1e-4)


def test_without_ground_truth_the_difficulty_must_come_from_somewhere(tmp_path):
    """An error names the option; with it there is no SFT, and difficulty is how far the inputs are from perfect."""
    with pytest.raises(ValueError, match=r"have no ground truth.*input_quality"):
        run_of(tmp_path / "no", Items(truth=False)).train(1)
    run = run_of(tmp_path / "yes", Items(truth=False), input_quality=CONTRAST)
    experience = experience_of(run)
    expected = 1 - contrast(experience.batch.degraded)
    torch.testing.assert_close(experience.difficulty, expected, **FORMULA_FP32)
    with pytest.raises(ValueError, match="bounded above"):
        run_of(tmp_path, Items(), input_quality=NoReference(contrast, name="c", higher_is_better=True))


def test_rewards_see_what_they_name(tmp_path):
    """A function gets the columns among its parameters, one row per rollout."""
    seen = []

    def watching(images, references, inputs, prompts, ids, tasks):
        seen.append((images.shape, references.shape, inputs.shape, prompts, ids, tasks))
        return contrast(images)

    run = run_of(tmp_path, Items(((8, 8),), scale=4), x4_policy(), watching)
    experience_of(run)
    rows = [each for each in run.order.ids(0) for _ in range(2)]
    images, references, inputs, prompts, ids, tasks = seen[0]
    assert (images, references, inputs) == ((8, 3, 32, 32), (8, 3, 32, 32), (8, 3, 8, 8))
    assert (ids, prompts, tasks) == (rows, [f"photo {row}" for row in rows], ["ab"[row % 2] for row in rows])


@pytest.mark.parametrize("overlap", [False, True])
def test_rollouts_are_ranked_within_their_input(tmp_path, overlap):
    """The advantages are those of the win rates of each input, and validation measures the reward itself."""
    rollouts, validation = RolloutConfig(group_size=4, num_steps=2, inputs_at_once=2), Validation(Items(), {})
    options = {"rollout_config": rollouts, "overlap": overlap, "validation": validation}
    run = run_of(tmp_path, Items(), reward=RankInGroup(CONTRAST), **options)
    experience = experience_of(run)
    images = run.policy.decode(experience.trajectory.sample, {}).clamp(0, 1)
    ids = torch.arange(4).repeat_interleave(4)
    expected = win_rates(contrast(images), ids)
    torch.testing.assert_close(experience.rewards[0], expected, **EXACT)
    torch.testing.assert_close(experience.advantages[0], group_advantages(expected, ids).values, **FORMULA_FP32)
    found = validation(run.policy, run.rewards, run.reward_weights, seed=0)
    torch.testing.assert_close(found["scores"]["reward"], contrast(torch.stack(found["images"])), **FORMULA_FP32)


def test_ranks_are_refused_where_there_are_no_rollouts(tmp_path):
    """One rollout per input, degraded images, held-out images."""
    rank = RankInGroup(CONTRAST)
    single = {"rollout_config": RolloutConfig(group_size=1, num_steps=2), "memory": RewardMemory(8)}
    with pytest.raises(ValueError, match="group_size of at least 2"):
        run_of(tmp_path, Items(), reward=rank, **single)
    with pytest.raises(ValueError, match="input_quality expected a reward that scores each image on its own"):
        run_of(tmp_path, Items(), input_quality=rank)
    with pytest.raises(ValueError, match="Validation expected a reward that scores each image on its own"):
        Validation(Items(), {"rank": rank})


@pytest.mark.parametrize("overlap", [False, True])
def test_tasks_reach_rewards_through_wrappers(tmp_path, overlap):
    """Each rollout is scored by the reward of its input's task."""
    other = NoReference(partial(torch.mean, dim=(1, 2, 3)), name="mean", higher_is_better=True)
    reward = iqareward.Cached(iqareward.ByTask({"a": CONTRAST, "b": other}))
    run = run_of(tmp_path, Items(), reward=reward, overlap=overlap)
    experience = experience_of(run)
    images = run.policy.decode(experience.trajectory.sample, {}).clamp(0, 1)
    is_a = torch.tensor([task == "a" for task in experience.batch.tasks]).repeat_interleave(2)
    expected = torch.where(is_a, contrast(images), images.mean((1, 2, 3)))
    torch.testing.assert_close(experience.rewards[0], expected, **FORMULA_FP32)


def test_prompts_and_inputs_reach_rewards_of_the_library(tmp_path):
    """`QualityGain` compares with the degraded images, whatever their size, and needs no ground truth."""
    reward = iqareward.QualityGain(CONTRAST, iqareward.load("ssim[0, 1]"))
    run = run_of(tmp_path, Items(((16, 16),), truth=False), None, reward, input_quality=CONTRAST)
    assert experience_of(run).rewards.isfinite().all()


def test_reachable_compares_with_the_encoded_and_decoded_truth(tmp_path):
    """A latent policy that restores as well as its decoder can has no difficulty left; SFT keeps the truth."""
    policy = policy_of("controlnet")
    run = run_of(tmp_path, Items(texts=False), policy, reachable=True, rollout_config=RolloutConfig(2, 3))
    plain = run_of(tmp_path, Items(texts=False), policy)
    reachable, raw = experience_of(run), experience_of(plain)
    torch.testing.assert_close(reachable.trajectory.sample, raw.trajectory.sample, **EXACT)
    torch.testing.assert_close(reachable.batch.references, raw.batch.references, **EXACT)
    images = policy.decode(raw.trajectory.sample, {}).clamp(0, 1)
    target = policy.reconstruct(raw.batch.references, {"latents": None}).clamp(0, 1).repeat_interleave(2, 0)
    expected = (images - target).square().flatten(1).mean(1).sqrt()
    torch.testing.assert_close(reachable.distances, expected, **FORMULA_FP32)
    assert not torch.allclose(reachable.distances, raw.distances)


def test_the_ceiling_of_the_decoder_is_told_at_the_start(tmp_path, capfd):
    """In the first line of the history and on the error stream."""
    reward = FullReference(lambda a, b: -(a - b).square().flatten(1).mean(1), name="mse", higher_is_better=True)
    run = run_of(tmp_path, Items(texts=False), policy_of("controlnet"), reward, show_progress=True)
    first = run.train(1)[0]
    assert first["truth/reward"] == 0
    assert first["ceiling/reward"] < -1e-3
    assert "encoded and decoded" in capfd.readouterr().err


def test_several_steps_per_rollout_move_the_ratio(tmp_path):
    """Two epochs of two minibatches: the first step has ratio 1, later ones have not; the clip holds them."""
    config = TrainConfig(learning_rate=1e-3, inputs_per_update=4, minibatches=2, epochs=2)
    run = run_of(tmp_path, Items(), train_config=config, objective=ClippedPolicyGradient(clip=1e-4))
    assert all(line["ratio"] > 1e-6 for line in run.train(2)[1:])
    with pytest.raises(ValueError, match="divisible by 1 processes times 3 minibatches"):
        run_of(tmp_path, Items(), train_config=TrainConfig(inputs_per_update=4, minibatches=3))


def test_an_objective_without_terms_is_an_error(tmp_path):
    """No stochastic step, nothing to learn from: said at the first update, not trained past."""
    run = run_of(tmp_path, Items(), rollout_config=RolloutConfig(group_size=2, num_steps=3, eta=0.0))
    with pytest.raises(TrainingError, match=r"nothing to learn from.*Raise `eta`"):
        run.train(1)


class DropPath(nn.Module):
    """A network whose answer is random in train mode."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop = nn.Conv2d(3, 3, 3, padding=1), nn.Dropout(0.5)

    def forward(self, images):
        return images + self.drop(self.layer(images))


def test_dropout_is_off_in_rollouts_and_on_in_sft(tmp_path):
    """The ratio of the first epoch is 1, a resumed run is equal, and one validation twice is equal."""
    runs = []
    for name in ("a", "b"):
        torch.manual_seed(0)
        policy = FeedForwardPolicy(DropPath().train())
        validation = Validation(Items(), {"contrast": CONTRAST})
        runs.append(run_of(tmp_path / name, Items(), policy, validation=validation))
    history = trains(runs[0])
    runs[1].train(1, save_every=1, validate_every=1)
    torch.manual_seed(0)
    again = run_of(
        tmp_path / "b",
        Items(),
        FeedForwardPolicy(DropPath().train()),
        validation=Validation(Items(), {"contrast": CONTRAST}),
    )
    assert again.train(2, save_every=1, validate_every=1, resume=True) == history
    images = [again.validation.restore(again.policy, again.validation.batches[0], seed=0) for _ in range(2)]
    torch.testing.assert_close(*images, **EXACT)


def test_data_in_worker_processes_is_the_same_data(tmp_path):
    """Two workers read ahead; the history does not change."""
    alone, ahead = (run_of(tmp_path / str(count), Items(), num_workers=count) for count in (0, 2))
    assert alone.train(3) == ahead.train(3)


class Module(nn.Module):
    """A reward as users have them: a module that takes no more than it names."""

    def forward(self, images, references):
        """Minus the mean difference."""
        return -(images - references).abs().mean((1, 2, 3))


def test_a_module_is_a_reward(tmp_path):
    """It gets the columns that its `forward` names, though calling a module takes anything."""
    run = run_of(tmp_path, Items(), reward=Module())
    experience = experience_of(run)
    images = run.policy.decode(experience.trajectory.sample, {}).clamp(0, 1)
    expected = Module()(images, experience.batch.references.repeat_interleave(2, 0))
    torch.testing.assert_close(experience.rewards[0], expected, **FORMULA_FP32)


def test_reward_gradients_see_the_reachable_references_too(tmp_path):
    """With `reachable` the reward is followed towards the references that it was given when rollouts were scored."""
    seen = []

    def mse(images, references):
        seen.append(references.clone())
        return -(images - references).square().flatten(1).mean(1)

    reward = FullReference(mse, name="mse", higher_is_better=True, differentiable=True)
    options = {"objective": DirectRewardGradient(reward), "rollout_config": RolloutConfig(1, 2, eta=0.0)}
    config = TrainConfig(inputs_per_update=4, rows_at_once=None)
    run = run_of(tmp_path, Items(), policy_of("controlnet"), reward, reachable=True, train_config=config, **options)
    run.calibrate()
    seen.clear()
    run.update()
    torch.testing.assert_close(seen[1], seen[0], **EXACT)


def test_one_rollout_per_input_has_nothing_to_be_compared_with(tmp_path):
    """Refused, instead of a run that is SFT alone; a memory of the input's own rewards is enough."""
    one = RolloutConfig(group_size=1, num_steps=3)
    with pytest.raises(ValueError, match=r"ClippedPolicyGradient, a group_size of at least 2"):
        run_of(tmp_path, Items(), rollout_config=one)
    run_of(tmp_path, Items(), rollout_config=one, memory=RewardMemory(8))


def test_means_are_over_inputs_and_not_over_minibatches(tmp_path):
    """If no input of a minibatch takes part, the figures are those of the other one."""
    found = []
    for count in (1, 2):
        config = TrainConfig(learning_rate=1e-9, inputs_per_update=4, minibatches=count)
        data = [Items()[index] for index in range(8)]
        run = run_of(tmp_path / str(count), data, train_config=config)
        run.calibrate()
        for index in run.order.ids(0)[:2]:
            data[index]["lq"].fill_(torch.nan)
        with pytest.warns(RuntimeWarning, match="left out 2 inputs"):
            found.append(run.update())
    # the noise of the two differs, that of a step is its own
    assert found[1]["sft_loss"] == pytest.approx(found[0]["sft_loss"], rel=0.2)
    assert found[0]["ratio"] == found[1]["ratio"] == pytest.approx(0, abs=1e-6)


def test_an_update_of_the_caller_reads_for_itself(tmp_path):
    """Also after `train`, whose workers have ended then."""
    run = run_of(tmp_path / "a", Items(), num_workers=1)
    run.train(1)
    assert not multiprocessing.active_children()
    expected = run_of(tmp_path / "b", Items()).train(2)[-1]
    assert run.update()["reward"] == expected["reward"]
