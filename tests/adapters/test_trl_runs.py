"""Real runs of TRL's trainers: an agent that names operations, which are applied to images and scored."""

import statistics

import pytest
import torch

import iqareward
from iqareward.adapters.trl import AsyncTRLReward, TRLReward
from iqareward.adapters.trl_adaptive import adaptive_trainer
from iqareward.weighting import AdaptiveWeighter
from tests.adapters.restoration_agent import SEEN, apply_operations, build, data_set

trl = pytest.importorskip("trl")
# TRL 1.16 uses names that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
TRAINERS = {"GRPO": trl.GRPOTrainer, "RLOO": trl.RLOOTrainer}


@pytest.fixture(autouse=True)
def _forget():
    SEEN.clear()


def fidelity(**options) -> TRLReward:
    """Two distances to the ground truth in one reward."""
    return TRLReward("0.1*psnr + 1*gmsd", apply_operations, references="clean", name="restored", **options)


def run(trainer: type, folder, rewards, **options):
    """The trainer after its run, and one record per step."""
    built = build(trainer, folder, rewards, **options)
    built.train()
    return built, [record for record in built.state.log_history if "reward" in record]


def expected_scores(name: str) -> list[float]:
    """Mean score of the images of each batch, by the library alone."""
    judge, means = iqareward.load(name), []
    for restored, clean in SEEN:
        pairs = [(image, iqareward.to_images(truth)[0]) for image, truth in zip(restored, clean, strict=True)]
        images, truths = (
            torch.stack(row) for row in zip(*[pair for pair in pairs if pair[0] is not None], strict=True)
        )
        means.append(judge(images, references=truths).mean().item())
    return means


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
def test_two_steps_of_the_real_trainer(trainer, tmp_path) -> None:
    """Both trainers run, log the library's own scores and components, and change the model."""
    _, records = run(trainer, tmp_path, [fidelity()])
    assert len(records) == 2
    for name, key in (
        ("0.1*psnr + 1*gmsd", "rewards/restored/mean"),
        ("psnr", "restored/psnr"),
        ("gmsd", "restored/gmsd"),
    ):
        assert [record[key] for record in records] == pytest.approx(expected_scores(name), rel=1e-5)
    missing = [statistics.mean(image is None for image in restored) for restored, _ in SEEN]
    assert [record["restored/no_image"] for record in records] == pytest.approx(missing)
    assert sum(missing) > 0  # some completions named no operation and were left out, without harm
    assert all(record["grad_norm"] > 0 and record["restored/unscored"] == 0 for record in records)


def test_async_form_gives_the_same_run(tmp_path) -> None:
    """Beside another asynchronous reward, on TRL's event loop, nothing but the time changes."""
    _, plain = run(trl.GRPOTrainer, tmp_path, [fidelity(), TRLReward("psnr", apply_operations, references="clean")])
    other = AsyncTRLReward(TRLReward("psnr", apply_operations, references="clean"))
    _, beside = run(trl.GRPOTrainer, tmp_path, [AsyncTRLReward(fidelity()), other])
    times = ("step_time", "profiling/")
    for old, new in zip(plain, beside, strict=True):
        assert old == new | {key: old[key] for key in old if key.startswith(times)}


def test_agent_learns_to_restore(tmp_path) -> None:
    """Within forty steps the tiny agent brightens what was darkened: the reward's direction and scale are right."""
    options = {"learning_rate": 0.1, "lr_scheduler_type": "constant"}
    _, records = run(trl.GRPOTrainer, tmp_path, [fidelity(no_image=0.0)], steps=40, **options)
    rewards = [record["reward"] for record in records]
    assert statistics.mean(rewards[-5:]) > statistics.mean(rewards[:5]) + 0.5


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
def test_adaptive_trainer_scales_advantages(trainer, tmp_path) -> None:
    """Advantages are multiplied with the RL share of their prompt's mean distance, and only in training."""
    before, after = [], []

    class Plain(trainer):
        def _generate_and_score_completions(self, inputs):
            before.append(super()._generate_and_score_completions(inputs))
            return dict(before[-1])

    weighter = AdaptiveWeighter(mode="convex")
    weighter.calibrate(torch.tensor([0.1, 0.2, 0.3]))
    distance = TRLReward("gmsd", apply_operations, references="clean")

    class Watched(adaptive_trainer(Plain, weighter, distance)):
        def _generate_and_score_completions(self, inputs):
            after.append(super()._generate_and_score_completions(inputs))
            return after[-1]

    built, records = run(Watched, tmp_path, [fidelity()], steps=1)
    judge = iqareward.load("gmsd")
    restored, clean = SEEN[-1]
    truths = [iqareward.to_images(truth)[0] for truth in clean]
    images = [truth * torch.nan if image is None else image for image, truth in zip(restored, truths, strict=True)]
    per_prompt = (-judge(images, references=truths)).view(-1, 4).nanmean(1).repeat_interleave(4)
    share = weighter(per_prompt).rl
    assert share.unique().numel() == 2
    torch.testing.assert_close(after[0]["advantages"], before[0]["advantages"] * share)
    assert records[0]["adaptive/rl_share"] == pytest.approx(share.mean().item())
    assert records[0]["adaptive/difficulty"] == pytest.approx(per_prompt.mean().item())
    built.evaluate(data_set())
    assert torch.equal(after[-1]["advantages"], before[-1]["advantages"])


def test_naive_module_is_refused_by_the_trainer(tmp_path) -> None:
    """Why rewards are plain objects: the trainer takes every module for a text reward model and asks for its config."""
    with pytest.raises(AttributeError, match="config"):
        build(trl.GRPOTrainer, tmp_path, [torch.nn.Identity()])


def _advantages(folder, rewards, **options) -> tuple[list[bool], list[float]]:
    built, _ = run(trl.GRPOTrainer, folder, rewards, steps=1, **options)
    return [image is None for image in SEEN[-1][0]], list(built._logs["advantages"])


def test_missing_images_have_no_advantage(tmp_path) -> None:
    """With one reward function `None` means no advantage; several are added up as if it were 0, unless normalised."""

    def constant(completions, **columns):
        return [1.0] * len(completions)

    missing, alone = _advantages(tmp_path, [fidelity()])
    _, added = _advantages(tmp_path, [fidelity(), constant])
    _, apart = _advantages(tmp_path, [fidelity(), constant], multi_objective_aggregation="normalize_then_sum")
    assert 0 < sum(missing) < len(missing)
    assert all(value == 0 for value, gone in zip(alone, missing, strict=True) if gone)
    assert all(value < -0.4 for value, gone in zip(added, missing, strict=True) if gone)
    assert all(abs(value) < 0.3 for value, gone in zip(apart, missing, strict=True) if gone)
