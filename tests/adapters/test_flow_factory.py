"""Flow-Factory: real subclasses by dotted path, settings from YAML, and its dispatch by class and signature."""

import importlib
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import iqareward
from iqareward import FullReference, NoReference
from iqareward.adapters import flow_factory
from iqareward.adapters.flow_factory import adaptive_aggregation
from iqareward.types import Reward
from iqareward.weighting import AdaptiveWeighter
from tests.adapters.doubles import flow_factory as double
from tests.adapters.doubles.pages import DOCS, blocks, execute, package
from tests.adapters.restoration_agent import as_pil
from tests.tolerances import EXACT, NETWORK_BATCH, OTHER_PACKAGE

pytestmark = pytest.mark.trainer("Flow-Factory", "5f6cda1", "caller", "reader")
POINTWISE, GROUPWISE = (f"iqareward.adapters.flow_factory.{name}" for name in ("IQARewardModel", "IQARankRewardModel"))


@pytest.fixture(autouse=True)
def trainer(monkeypatch: pytest.MonkeyPatch):
    """Flow-Factory is importable, and our classes are made for it."""
    package(monkeypatch, **double.modules())


def photos(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def rmse(images: Tensor, references: Tensor) -> Tensor:
    return (images - references).square().mean(dim=(1, 2, 3)).sqrt()


def model(path: str = POINTWISE, **settings):
    return double.build(
        double.RewardArguments.from_dict({"name": "q", "reward_model": path, "device": "cpu", **settings})
    )


@pytest.mark.trainer("Flow-Factory", "5f6cda1", "threads")
@pytest.mark.parametrize("workers", [0, 4])
def test_pointwise(workers: int) -> None:
    """Lists of tensors of different sizes become float32 scores on the CPU, from threads too."""
    images = [*photos(5), photos(1)[0, :, :20]]
    processor = double.RewardProcessor({"q": model(reward="0.5*piqe", batch_size=2)})
    rewards = processor.compute_rewards(double.samples(images, range(6)), workers=workers)
    expected = torch.cat([0.5 * iqareward.load("piqe")(image[None]) for image in images])
    torch.testing.assert_close(rewards["q"], expected, **NETWORK_BATCH)
    assert processor.fields_seen == {"prompt", "image"}  # the latents of the trajectory stay where they are


def test_what_is_no_subclass_disappears() -> None:
    """A reward that only has the right methods is dropped without a word; ours is found."""

    class LooksRight:
        required_fields, use_tensor_inputs = ("image",), True

        def __call__(self, image, **kwargs):
            return [0.0] * len(image)

    models = {"naive": LooksRight(), "object": iqareward.load("piqe"), "ours": model(reward="piqe")}
    rewards = double.RewardProcessor(models).compute_rewards(double.samples(photos(2), range(2)))
    assert set(rewards) == {"ours"}


def test_references_are_the_degraded_inputs(tmp_path) -> None:
    """`condition_images` reach a full-reference reward, and so do dataset columns where they are forwarded."""
    from PIL import Image

    images, degraded = photos(4), photos(4, seed=1)
    expected = iqareward.load("ssim")(images, references=degraded)
    for path in (POINTWISE, GROUPWISE):
        processor = double.RewardProcessor({"q": model(path, reward="ssim", references="condition_images")})
        rewards = processor.compute_rewards(double.samples(images, [0, 0, 1, 1], degraded))["q"]
        if path == POINTWISE:
            torch.testing.assert_close(rewards, expected, **NETWORK_BATCH)
        else:
            assert rewards.tolist() == (expected > expected.view(2, 2).mean(1).repeat_interleave(2)).float().tolist()
    paths = []
    for row, image in enumerate(degraded):
        paths.append(str(tmp_path / f"{row}.png"))
        Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy()).save(paths[-1])
    for path in (POINTWISE, GROUPWISE):
        processor = double.RewardProcessor({"q": model(path, reward="ssim", references="gt_path")})
        rewards = processor.compute_rewards(double.samples(images, [0, 0, 1, 1], gt_path=paths))["q"]
        if path == POINTWISE:
            rounded = iqareward.load("ssim")(images, references=iqareward.to_images(paths))
            torch.testing.assert_close(rewards, rounded, **NETWORK_BATCH)
    with pytest.raises(ValueError, match="expected 'gt_path' in the metadata of every sample, got none"):
        double.RewardProcessor({"q": model(reward="ssim", references="gt_path")}).compute_rewards(
            double.samples(images, range(4))
        )
    with pytest.raises(ValueError, match="expected `condition_images` for every sample"):
        double.RewardProcessor({"q": model(reward="ssim", references="condition_images")}).compute_rewards(
            double.samples(images, range(4))
        )


def test_ranks_within_the_group() -> None:
    """The groupwise model ranks the rollouts of an input, and calls differences within the margin ties."""
    images = torch.cat([photos(3) * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1, 1), photos(1).expand(3, -1, -1, -1)])
    images = images[[0, 3, 1, 4, 2, 5]]
    scores = iqareward.load("piqe")(images)
    rows = double.samples(images, [7, 9] * 3)
    rewards = double.RewardProcessor({"q": model(GROUPWISE, reward="piqe")}).compute_rewards(rows)["q"]
    order = scores[0::2].argsort().argsort()
    torch.testing.assert_close(rewards[0::2], order.float() / 2, **EXACT)
    torch.testing.assert_close(rewards[1::2], torch.full((3,), 0.5), **EXACT)
    tied = model(GROUPWISE, reward="piqe", margin=1000.0)
    assert (double.RewardProcessor({"q": tied}).compute_rewards(rows)["q"] == 0.5).all()


@pytest.mark.trainer("Flow-Factory", "5f6cda1", "processes")
@pytest.mark.parametrize("references", [None, "condition_images", "gt_path"])
@pytest.mark.parametrize("planned", [True, False], ids=["5f6cda1", "a0b2bc5"])
def test_ranks_where_groups_are_spread_over_processes(
    planned: bool, references: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every sampler each input's rollouts are ranked among themselves, although all prompts are alike."""
    package(monkeypatch, **double.modules(planned=planned))
    degraded = photos(2).repeat_interleave(4, 0)
    images = degraded * torch.tensor([1.0, 0.9, 0.8, 0.7, 0.4, 0.3, 0.2, 0.1]).view(8, 1, 1, 1)
    columns, reward = {}, NoReference(brightness, higher_is_better=True)
    if references:
        reward = FullReference(rmse, higher_is_better=False)
    if references == "gt_path":
        columns = {"gt_path": [str(tmp_path / f"{row // 4}.png") for row in range(8)]}
        for path, image in zip(columns["gt_path"], degraded):
            as_pil(image).save(path)
    rows = double.samples(images, [7] * 4 + [9] * 4, degraded, planned=planned, **columns)
    ranked = double.RewardProcessor({"q": model(GROUPWISE, reward=reward, references=references)})
    first, second = ranked.compute_gathered([rows[0::2], rows[1::2]])["q"]
    torch.testing.assert_close(first, torch.tensor([1.0, 1 / 3] * 2), **OTHER_PACKAGE)
    torch.testing.assert_close(second, torch.tensor([2 / 3, 0.0] * 2), **OTHER_PACKAGE)


def test_unscored_images() -> None:
    """The framework passes NaN on; ours stops by default and counts it as it is told to."""
    images = photos(3)
    images[1] = torch.nan
    rows = double.samples(images, range(3))
    with pytest.raises(ValueError, match=r"piqe could not score images \[1\] of 3"):
        double.RewardProcessor({"q": model(reward="piqe")}).compute_rewards(rows)
    rewards = double.RewardProcessor({"q": model(reward="piqe", on_nan=-50.0)}).compute_rewards(rows)
    assert rewards["q"][1] == -50
    rows = double.samples(images, [7] * 3)
    with pytest.raises(ValueError, match=r"rank\(piqe\) could not score images \[1\] of 3"):
        double.RewardProcessor({"q": model(GROUPWISE, reward="piqe")}).compute_rewards(rows)
    ranked = double.RewardProcessor({"q": model(GROUPWISE, reward="piqe", on_nan="mean")})
    assert sorted(ranked.compute_rewards(rows)["q"].tolist()) == [0, 0.5, 1]


def test_settings() -> None:
    """A wrong key, a missing reward, a video and a policy that would let NaN through are errors that say so."""
    with pytest.raises(ValueError, match="expected the keys reward, references, inputs, on_nan in its YAML entry"):
        model(reward="piqe", on_nam="mean")
    with pytest.raises(ValueError, match="`reward` at least"):
        model()
    with pytest.raises(ValueError, match="expected on_nan 'raise', 'mean', 'worst' or a finite number, got 'nan'"):
        model(reward="piqe", on_nan="nan")
    with pytest.raises(ValueError, match="needs `references`, and has none"):
        model(reward="ssim")
    with pytest.raises(ValueError, match="these samples have none"):
        double.RewardProcessor({"q": model(reward="piqe")}).compute_rewards([double.PlannedSample()])


def test_options_in_the_entry() -> None:
    """Options of a reward stand in its text, because the trainer hashes entries; one it cannot have is named."""
    assert model(reward="ssim(color=y)", references="clean").settings.scorer.reward.name == "ssim(color=y)"
    with pytest.raises(ValueError, match="does not have: colour"):
        model(reward="ssim(colour=y)", references="clean")


def test_class_is_one_and_can_be_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The dotted path always gives one class, pickled by name; without Flow-Factory it says what is missing."""
    assert flow_factory.IQARewardModel is flow_factory.IQARewardModel
    assert pickle.loads(pickle.dumps(flow_factory.IQARankRewardModel)) is flow_factory.IQARankRewardModel
    with pytest.raises(AttributeError, match="no attribute 'IQAReward'"):
        flow_factory.IQAReward  # noqa: B018
    monkeypatch.delitem(__import__("sys").modules, "flow_factory.rewards")
    with pytest.raises(ImportError, match=r"IQARewardModel builds on `flow_factory.rewards`.*X-GenGroup"):
        flow_factory.IQARewardModel  # noqa: B018


def test_weights() -> None:
    """Its advantages are multiplied with the RL weights, and stored where its trainers read them, with the others."""
    rows = double.samples(photos(4), [0, 0, 1, 1])
    rewards = {"q": torch.tensor([1.0, 2.0, 1.0, 3.0])}
    plain = double.AdvantageProcessor().compute_advantages(rows, rewards)
    weighter = AdaptiveWeighter(mode="convex")
    weighter.calibrate(torch.tensor([0.1, 0.2, 0.4]))
    hard = torch.tensor([0.05, 0.05, 0.8, 0.8])
    aggregate = adaptive_aggregation(weighter, lambda samples: hard)
    weighed = double.AdvantageProcessor().compute_advantages(rows, rewards, aggregation_func=aggregate)
    share = weighter(hard).rl
    torch.testing.assert_close(weighed, plain * share, **EXACT)
    torch.testing.assert_close(torch.stack([row.extra_kwargs["advantage"] for row in rows]), weighed, **EXACT)
    torch.testing.assert_close(torch.stack([row.extra_kwargs["sft_weight"] for row in rows]), 1 - share, **EXACT)
    before = [row.extra_kwargs["advantage"].clone() for row in rows]
    aggregate(double.AdvantageProcessor(), rows, {"q": rewards["q"] * 2}, False)
    assert all(row.extra_kwargs["advantage"] == old for row, old in zip(rows, before))


def test_weights_go_where_the_advantages_are() -> None:
    """Samples may be offloaded to the CPU; the weights are stacked into batches that are not."""
    rows = double.samples(photos(2), [0, 0])
    weighter = AdaptiveWeighter(mode="convex")
    weighter.calibrate(torch.tensor([0.1, 0.4]))
    elsewhere = SimpleNamespace(compute_advantages=lambda *arguments: torch.ones(2, device="meta"))
    adaptive_aggregation(weighter, lambda samples: torch.tensor([0.1, 0.4]))(elsewhere, rows, {}, True)
    assert {row.extra_kwargs["sft_weight"].device.type for row in rows} == {"meta"}


@pytest.mark.trainer("Flow-Factory", "5f6cda1", "configuration")
def test_page(qalign: Reward) -> None:
    """The page's YAML builds a model whose scores are logged and become advantages."""
    text, _ = blocks("how-to/flow-factory.md", "yaml")
    (entry,) = yaml.safe_load(text)["rewards"]
    built = double.build(double.RewardArguments.from_dict({**entry, "device": "cpu"}))
    assert built.config.batch_size == 16
    images, degraded = photos(4), photos(2, seed=1).repeat_interleave(2, 0)
    trainer = double.DiffusionNFTTrainer(adapter=double.Adapter(2), reward_models={entry["name"]: built})
    rows = double.samples(images, [0, 0, 1, 1], degraded)
    trainer.run_cycle(rows)
    expected = 0.7 * qalign(images) + 0.3 * iqareward.load("ssim")(images, references=degraded)
    assert trainer.logged["train/reward_quality_mean"] == pytest.approx(expected.mean().item(), rel=1e-4)
    signs = torch.stack([row.extra_kwargs["advantage"] for row in rows]).sign()
    assert torch.equal(signs, (expected - expected.view(2, 2).mean(1).repeat_interleave(2)).sign())


@pytest.mark.trainer("Flow-Factory", "5f6cda1", "configuration")
def test_evaluation_of_ranks(qalign: Reward) -> None:
    """Evaluation leaves ranks out, or stops at asynchronous ones; the page's `eval_rewards` logs the score itself."""
    images = photos(2)
    for asynchronous in (False, True):
        ranks = model(GROUPWISE, reward="qalign", async_reward=asynchronous)
        trainer = double.DiffusionNFTTrainer(adapter=double.Adapter(2), reward_models={"ranks": ranks})
        rows = double.samples(images, [0, 1])
        if asynchronous:
            with pytest.raises(RuntimeError, match="incomplete async reward groups"):
                trainer.evaluate(rows)
        else:
            trainer.evaluate(rows)
        assert not trainer.logged
        (entry,) = yaml.safe_load(blocks("how-to/flow-factory.md", "yaml")[1])["eval_rewards"]
        built = double.build(double.RewardArguments.from_dict({**entry, "device": "cpu"}))
        trainer.evaluate(rows, {entry["name"]: built})
        expected = qalign(images).mean().item()
        assert trainer.logged["eval/test/reward_quality_mean"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.trainer("Flow-Factory", "5f6cda1", "configuration", "gradients", "weights")
def test_recipe(qalign: Reward, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's trainer gives each row's policy loss its RL weight, and each row's supervised loss its SFT weight."""
    text = (DOCS / "how-to/adaptive-in-your-trainer.md").read_text().partition("## Flow-Factory")[2]
    scope = {"ground_truth": lambda adapter, batch: double.LatentState({"latent": batch["truth"]})}
    (code,) = re.findall(r"^```python\n(.*?)^```$", text.partition("\n## ")[0], re.M | re.S)
    execute(code, scope)
    (trainer_class,) = importlib.import_module("flow_factory.trainers.registry").trainers.values()

    def trained(cls: type, **arguments) -> tuple[list, Any]:
        levels = torch.tensor([0.2, 0.2, 0.9, 0.9]).view(4, 1, 1, 1)  # the second input is nearly solved
        rows = double.samples(photos(4), [0, 0, 1, 1], levels * torch.ones(4, 3, 32, 32))
        for row, latent in zip(rows, torch.eye(4)):
            row.all_latents, row.extra_kwargs["truth"] = latent, 2 * latent
        reward = NoReference(brightness, higher_is_better=True)
        trainer = cls(adapter=double.Adapter(4), reward_models={"quality": model(reward=reward)}, **arguments)
        trainer.run_cycle(rows)
        return rows, trainer

    rows, adaptive = trained(trainer_class)
    plain_rows, plain = trained(double.DiffusionNFTTrainer)
    sft = torch.stack([row.extra_kwargs["sft_weight"] for row in rows])
    assert sft[0] == sft[1] < 0.5 < sft[2] == sft[3]
    weighted, unweighted = (torch.stack([row.extra_kwargs["advantage"] for row in one]) for one in (rows, plain_rows))
    torch.testing.assert_close(weighted, (1 - sft) * unweighted, **OTHER_PACKAGE)
    policy, supervised = adaptive.gradients
    # row i is the only one with a latent in component i, so component i holds the gradient of its loss
    torch.testing.assert_close(policy["policy_loss"], (1 - sft) * plain.gradients[0]["policy_loss"], **OTHER_PACKAGE)
    torch.testing.assert_close(supervised["sft_loss"], sft * 2 * 2 / 4 / 4, **OTHER_PACKAGE)
    assert "train/sft_loss" in adaptive.logged
    with pytest.raises(ValueError, match="custom advantage aggregation cannot"):  # not trained without the weights
        trained(trainer_class, reward_optimization_overlap=True)
