"""Flow-Factory: real subclasses by dotted path, settings from YAML, and its dispatch by class and signature."""

import pickle

import pytest
import torch
import yaml
from torch import Tensor

import iqareward
from iqareward.adapters import flow_factory
from iqareward.adapters.flow_factory import adaptive_aggregation
from iqareward.types import Reward
from iqareward.weighting import AdaptiveWeighter
from tests.adapters.doubles import flow_factory as double
from tests.adapters.doubles.pages import blocks, execute, package
from tests.tolerances import EXACT, NETWORK_BATCH

POINTWISE, GROUPWISE = (f"iqareward.adapters.flow_factory.{name}" for name in ("IQARewardModel", "IQARankRewardModel"))


@pytest.fixture(autouse=True)
def trainer(monkeypatch: pytest.MonkeyPatch):
    """Flow-Factory is importable, and our classes are made for it."""
    package(monkeypatch, flow_factory__rewards=double.rewards_module())


def photos(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def model(path: str = POINTWISE, **settings):
    return double.build(
        double.RewardArguments.from_dict({"name": "q", "reward_model": path, "device": "cpu", **settings})
    )


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
            torch.testing.assert_close(rewards, torch.sign(expected - expected.view(2, 2).mean(1).repeat_interleave(2)))
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
    """The groupwise model ranks the rollouts of an input, and calls a spread within the floor a draw."""
    images = torch.cat([photos(3) * torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1, 1), photos(1).expand(3, -1, -1, -1)])
    images = images[[0, 3, 1, 4, 2, 5]]
    scores = iqareward.load("piqe")(images)
    rows = double.samples(images, [7, 9] * 3)
    rewards = double.RewardProcessor({"q": model(GROUPWISE, reward="piqe")}).compute_rewards(rows)["q"]
    order = scores[0::2].argsort().argsort()
    torch.testing.assert_close(rewards[0::2], order.float() - 1, **EXACT)
    torch.testing.assert_close(rewards[1::2], torch.zeros(3), **EXACT)
    floored = model(GROUPWISE, reward="piqe", std_floor=1000.0)
    assert not double.RewardProcessor({"q": floored}).compute_rewards(rows)["q"].any()


def test_unscored_images() -> None:
    """The framework passes NaN on; ours stops by default and counts it as it is told to."""
    images = photos(3)
    images[1] = torch.nan
    rows = double.samples(images, range(3))
    with pytest.raises(ValueError, match=r"piqe could not score images \[1\] of 3"):
        double.RewardProcessor({"q": model(reward="piqe")}).compute_rewards(rows)
    rewards = double.RewardProcessor({"q": model(reward="piqe", on_nan=-50.0)}).compute_rewards(rows)
    assert rewards["q"][1] == -50


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
        double.RewardProcessor({"q": model(reward="piqe")}).compute_rewards([double.Sample("", None, 0)])


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


def test_page(qalign: Reward) -> None:
    """The page's YAML builds a model, and its Python weights the advantages."""
    (text,) = blocks("how-to/flow-factory.md", "yaml")
    (entry,) = yaml.safe_load(text)["rewards"]
    built = double.build(double.RewardArguments.from_dict({**entry, "device": "cpu"}))
    assert built.config.batch_size == 16
    (code,) = blocks("how-to/flow-factory.md")
    rows = double.samples(photos(4), [0, 0, 1, 1], photos(2, seed=1).repeat_interleave(2, 0))
    scope = {
        "advantage_processor": double.AdvantageProcessor(),
        "samples": rows,
        "rewards": {"q": torch.tensor([1.0, 2.0, 1.0, 3.0])},
    }
    execute(code, scope)
    assert all(0 < row.extra_kwargs["sft_weight"] < 1 for row in rows)
