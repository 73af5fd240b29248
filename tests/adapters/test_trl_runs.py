"""Real runs of TRL's trainers: an agent that names operations, which are applied to images and scored."""

import statistics

import pytest
import torch

import iqareward
from iqareward.adapters.trl import AsyncTRLReward, TRLReward, adaptive_trainer, tool_images
from iqareward.rewards.metric import NoReference
from iqareward.weighting import AdaptiveWeighter
from tests.adapters.restoration_agent import SEEN, apply_operations, build, data_set

trl = pytest.importorskip("trl")
# TRL 1.16 uses names that transformers 5.23 has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
TRAINERS = {"GRPO": trl.GRPOTrainer, "RLOO": trl.RLOOTrainer}


def brightness(images: torch.Tensor) -> torch.Tensor:
    """A stand-in for a judge."""
    return images.mean((1, 2, 3))


BRIGHTNESS = NoReference(brightness, higher_is_better=True)


@pytest.fixture(autouse=True)
def _forget():
    SEEN.clear()


def fidelity(**options) -> TRLReward:
    """Two distances to the ground truth in one reward."""
    return TRLReward("0.7*ssim + 0.3*haarpsi", apply_operations, references="clean", name="restored", **options)


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
        ("0.7*ssim + 0.3*haarpsi", "rewards/restored/mean"),
        ("ssim", "restored/ssim"),
        ("haarpsi", "restored/haarpsi"),
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
    first, last = statistics.mean(rewards[:5]), statistics.mean(rewards[-5:])
    assert 1 - last < 0.2 * (1 - first)  # four fifths of what was missing to the best score, 1


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


def environment_images(completions, environments, **columns) -> list:
    """The image that each environment holds at the end."""
    return [environment.image for environment in environments]


def test_images_of_environments(tmp_path, monkeypatch) -> None:
    """TRL's own tool loop changes the image in the environment, and `decode` finds it there."""
    from tests.adapters import tool_agent

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    reward = TRLReward(BRIGHTNESS, environment_images)
    trainer = tool_agent.build(trl.GRPOTrainer, tmp_path, reward, environment_factory=tool_agent.Darkroom)
    trainer.train()
    (record,) = [record for record in trainer.state.log_history if "reward" in record]
    assert record["rewards/brightness/mean"] == pytest.approx(120 / 255)
    assert record["tools/call_frequency"] == 1


def test_images_of_tools(tmp_path) -> None:
    """`tool_images` finds the image in the messages as TRL's tool loop writes them."""
    from tests.adapters import tool_agent

    def brighten(factor: float) -> list:
        """Makes the image brighter.

        Args:
            factor: of the pixel values.
        """
        return [{"type": "image", "image": tool_agent.grey(int(80 * factor))}, {"type": "text", "text": "brighter"}]

    class Transcripts(Exception):
        pass

    class Stopped(trl.GRPOTrainer):
        def _generate(self, prompts):  # a text model cannot be trained on images; a vision model is too large for here
            raise Transcripts(super()._generate(prompts)[3])

    trainer = tool_agent.build(Stopped, tmp_path, TRLReward("piqe", tool_images), tools=[brighten])
    with pytest.raises(Transcripts) as stopped:
        trainer.train()
    (transcripts,) = stopped.value.args
    assert [message["role"] for message in transcripts[0]] == ["assistant", "tool", "assistant"]
    assert TRLReward(BRIGHTNESS, tool_images)(completions=transcripts) == pytest.approx([120 / 255] * 2)


def test_images_of_a_rollout_function(tmp_path, monkeypatch) -> None:
    """A field that a rollout function returns beside its tokens is a column."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")

    def rollout(prompts, trainer) -> dict:
        tokens = {"prompt_ids": [[2]] * len(prompts), "completion_ids": [[3, 1]] * len(prompts), "logprobs": None}
        return tokens | {"restored": [torch.full((3, 8, 8), row / 10) for row in range(len(prompts))]}

    parts = build(trl.GRPOTrainer, tmp_path, [TRLReward(BRIGHTNESS, "restored")])
    trainer = trl.GRPOTrainer(
        parts.model, parts.reward_funcs, parts.args, parts.train_dataset, processing_class=parts.processing_class,
        rollout_func=rollout,
    )  # fmt: skip
    trainer.train()
    records = [record for record in trainer.state.log_history if "reward" in record]
    assert [record["rewards/brightness/mean"] for record in records] == pytest.approx([0.35, 0.35])
