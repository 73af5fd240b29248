"""Real runs of TRL's trainers: an agent that names operations, which are applied to images and scored."""

import statistics

import pytest
import torch

from iqareward.adapters.trl import AsyncTRLReward, TRLReward, tool_images
from iqareward.advantages import combine_advantages
from iqareward.rewards.metric import NoReference
from tests.adapters import restoration_run
from tests.adapters.restoration_agent import SEEN, apply_operations, build
from tests.tolerances import EXACT

trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.trainer("TRL", "1.16.0", "run", "reader"),
    # TRL 1.16 uses names that transformers 5.23 has renamed
    pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning"),
    pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning"),
]


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


@pytest.mark.parametrize(
    ("trainer", "options"),
    [
        (trl.GRPOTrainer, {"scale_rewards": "group"}),
        (trl.GRPOTrainer, {"scale_rewards": "batch"}),
        (trl.GRPOTrainer, {"scale_rewards": "none"}),
        (trl.GRPOTrainer, {"scale_rewards": "group", "steps_per_generation": 2, "gradient_accumulation_steps": 2}),
        (trl.RLOOTrainer, {}),
    ],
)
def test_logs_and_advantages_are_those_of_direct_calls(trainer, options, tmp_path) -> None:
    """In every step the logged scores, shares and weights and the advantages in the loss are the library's own."""
    records, advantages, _ = restoration_run.run(trainer, tmp_path, steps=3, **options)
    assert len(records) == 3
    missing, broken = 0.0, 0.0
    for record, batch, (whole, losses) in zip(records, restoration_run.seen(), advantages, strict=True):
        log, wanted = restoration_run.expected(*batch, options.get("scale_rewards", "none"))
        assert {name: record[name] for name in log} == pytest.approx(log, rel=1e-5)
        if trainer is trl.RLOOTrainer:  # the mean of the others is subtracted, not that of all
            scored = torch.tensor([image is not None and bool(image.isfinite().all()) for image in batch[0]])
            count = scored.view(-1, 4).sum(1).repeat_interleave(4)
            wanted = wanted * torch.where(count > 1, count / (count - 1), 0)
        torch.testing.assert_close(whole, wanted, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.cat(losses).sort().values, whole.sort().values, **EXACT)
        missing, broken = missing + log["restored/no_image"], broken + log["restored/unscored"]
    assert missing > 0 < broken
    assert max(record["grad_norm"] for record in records) > 0


@pytest.mark.parametrize("kind", [TRLReward, lambda *call, **more: AsyncTRLReward(TRLReward(*call, **more))])
def test_several_functions_with_adaptive_weights(kind, tmp_path) -> None:
    """Normalised apart and then added, two functions give GDPO's advantages times the weight of each prompt."""
    names, weights = ("ssim", "haarpsi"), [1.0, 0.5]
    rewards = [kind(name, restoration_run.some_broken, references="clean") for name in names]
    options = {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": weights}
    records, advantages, _ = restoration_run.run(trl.GRPOTrainer, tmp_path, rewards=rewards, **options)
    for record, batch, (whole, _) in zip(records, restoration_run.seen(len(names)), advantages, strict=True):
        columns = torch.stack([restoration_run.scores(name, *batch) for name in names], 1)
        for name, column in zip(names, columns.unbind(1), strict=True):
            assert record[f"rewards/{name}/mean"] == pytest.approx(column.nanmean().item(), rel=1e-5)
        _, share = restoration_run.shares(*batch, columns[:, 0])
        groups = torch.arange(len(columns)) // restoration_run.GENERATIONS
        wanted = combine_advantages(columns, groups, weights=weights, scale="group").values * share
        torch.testing.assert_close(whole, wanted, rtol=1e-3, atol=1e-3)


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
    """`tool_images` finds the images that a vision-language model's tools return, in TRL's own tool loop."""
    from tests.adapters import tool_agent

    reward, tools = TRLReward(BRIGHTNESS, tool_images), [tool_agent.brightened]
    trainer = tool_agent.build(trl.GRPOTrainer, tmp_path, reward, agent=tool_agent.viewer, tools=tools)
    trainer.train()
    (record,) = [record for record in trainer.state.log_history if "reward" in record]
    assert record["rewards/brightness/mean"] == pytest.approx(120 / 255)
    assert record["brightness/no_image"] == 0


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
