"""miles_diffusion: an async reward that leaves the loop alone, and advantages weighted per sample in its hook."""

import asyncio
import inspect
import math
import sys
import time
from types import ModuleType

import pytest
import torch
from torch import Tensor

import iqareward
from iqareward import NoReference
from iqareward.adapters import miles
from iqareward.adapters.miles import adaptive_post_process, reference_difficulty, reward_function
from iqareward.difficulty import reference_distance
from iqareward.weighting import AdaptiveWeighter
from tests.adapters.doubles import miles as double
from tests.adapters.doubles.pages import blocks, execute
from tests.tolerances import NETWORK_BATCH, OTHER_PACKAGE


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The user's module, by whose dotted name miles finds functions."""
    made = ModuleType("my_rewards")
    monkeypatch.setitem(sys.modules, made.__name__, made)
    return made


def samples(count: int = 4, side: int = 32, rollouts: int = 2) -> list[double.Sample]:
    images = torch.rand(count, 3, 1, side, side, generator=torch.Generator().manual_seed(0))
    clean = torch.rand(count // rollouts, 3, side, side, generator=torch.Generator().manual_seed(1))
    return [
        double.Sample(row // rollouts, "restore", image, metadata={"gt_path": clean[row // rollouts]})
        for row, image in enumerate(images)
    ]


def stacked(rows: list[double.Sample]) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.stack([row.generated_output[:, 0] for row in rows])
    return images, torch.stack([row.metadata["gt_path"] for row in rows]), torch.tensor([r.group_index for r in rows])


def test_rewards_of_micro_groups(module: ModuleType) -> None:
    """Images of one frame are scored against the metadata, as floats in the order of the samples."""
    module.custom_rm = reward_function("ssim", references="gt_path")
    assert inspect.iscoroutinefunction(module.custom_rm)
    rows = samples()
    rows[3].generated_output = rows[3].generated_output[:, 0]  # [C, H, W] occurs too
    asyncio.run(double.rollout("my_rewards.custom_rm", rows))
    rows[3].generated_output = rows[3].generated_output[:, None]
    images, clean, _ = stacked(rows)
    expected = iqareward.load("ssim")(images, references=clean)
    torch.testing.assert_close(torch.tensor([row.reward for row in rows]), expected, **NETWORK_BATCH)
    assert all(type(row.reward) is float for row in rows)


def test_the_loop_stays_alive(module: ModuleType) -> None:
    """A plain function cannot be awaited, one that scores on the loop stops it; ours does neither."""

    def slow(images: Tensor) -> Tensor:
        time.sleep(0.5)  # for eleven turns of the loop, on a busy machine too
        return images.mean(dim=(1, 2, 3))

    reward = NoReference(slow, higher_is_better=True)
    module.plain = lambda args, samples, **kwargs: [0.0] * len(samples)
    with pytest.raises(AssertionError, match="can't be used in 'await' expression"):
        asyncio.run(double.rollout("my_rewards.plain", samples()))

    async def blocking(args, samples, **kwargs):
        return reward(stacked(samples)[0]).tolist()

    module.blocking, module.custom_rm = blocking, reward_function(reward)
    assert asyncio.run(double.rollout("my_rewards.blocking", samples())) <= 3
    assert asyncio.run(double.rollout("my_rewards.custom_rm", samples())) > 10


def test_unscored_samples(module: ModuleType) -> None:
    """A broken image and a sample without one stop the rollout, or count as they are told to."""
    rows = samples()
    rows[1].generated_output = None
    rows[2].generated_output = torch.full_like(rows[2].generated_output, torch.nan)
    module.custom_rm = reward_function("piqe")
    with pytest.raises(ValueError, match=r"piqe could not score images \[1, 2\] of 4"):
        asyncio.run(double.rollout("my_rewards.custom_rm", rows, micro_group=4))
    module.custom_rm = reward_function("piqe", on_nan=-100.0)
    asyncio.run(double.rollout("my_rewards.custom_rm", rows))
    assert [rows[1].reward, rows[2].reward] == [-100.0, -100.0]
    module.custom_rm = reward_function("piqe", on_nan="nan")
    asyncio.run(double.rollout("my_rewards.custom_rm", rows))
    assert math.isnan(rows[2].reward)
    with pytest.raises(ValueError, match="expected `generated_output` as one image"):
        asyncio.run(module.custom_rm(None, [double.Sample(0, "", torch.zeros(3, 5, 32, 32))]))
    with pytest.raises(ValueError, match="'gt' in the metadata of every sample, got keys"):
        asyncio.run(reward_function("ssim", references="gt")(None, samples()))
    with pytest.raises(ValueError, match="compares with references"):
        reward_function("ssim")


def test_post_process(module: ModuleType) -> None:
    """Advantages are weighted by how far each input is from its ground truth, and the other half is left for a loss."""
    rows = samples(8)
    for index, row in enumerate(rows):
        row.reward = float(index % 3)
        if index < 4:  # two inputs that are nearly solved
            row.generated_output = row.metadata["gt_path"][:, None] + 0.01
    images, clean, groups = stacked(rows)
    difficulty = reference_distance(images, clean, groups=groups)
    torch.testing.assert_close(reference_difficulty("gt_path")(rows), difficulty, **OTHER_PACKAGE)
    weighter = AdaptiveWeighter(mode="convex")
    weighter.calibrate(torch.tensor([0.02, 0.1, 0.5]))
    module.post_process = adaptive_post_process(weighter, reference_difficulty("gt_path"), scale="group")
    raw, rewards = double.post_process("my_rewards.post_process", rows, 2)
    assert raw == [row.reward for row in rows]
    _, plain = double.post_process(None, rows, 2)
    share = weighter(difficulty).rl
    assert share[:4].max() < share[4:].min()
    torch.testing.assert_close(torch.tensor(rewards), share * torch.tensor(plain), rtol=1e-3, atol=1e-5)
    sft = torch.tensor([row.train_metadata["sft_weight"] for row in rows])
    torch.testing.assert_close(sft, 1 - share, **OTHER_PACKAGE)
    assert len(weighter.history["rl_share"]) == 1


def test_post_process_leaves_unscored_samples_out(module: ModuleType) -> None:
    """One NaN costs a whole group in the trainer's own normalisation; in ours it costs its own row."""
    rows = samples(4)
    for row, reward in zip(rows, (1.0, math.nan, 1.0, 3.0)):
        row.reward = reward
    _, plain = double.post_process(None, rows, 2)
    assert [math.isnan(value) for value in plain] == [True, True, False, False]
    weighter = AdaptiveWeighter(calibrate_on_first=True)
    module.post_process = adaptive_post_process(weighter, lambda rows: torch.tensor([0.1, 0.1, 0.2, 0.2]))
    _, rewards = double.post_process("my_rewards.post_process", rows, 2)
    assert rewards[:2] == [0.0, 0.0]
    assert rewards[2] < 0 < rewards[3]
    assert rows[0].train_metadata["sft_weight"] == 1.0  # nothing to compare with: SFT only
    rows[0].group_index = None
    with pytest.raises(ValueError, match="expected a `group_index` in every sample"):
        double.post_process("my_rewards.post_process", rows, 2)


def test_what_the_docstring_says_to_write(module: ModuleType) -> None:
    """The module of the docstring scores and post-processes a rollout."""
    (code,) = blocks(miles)
    execute(code, vars(module))
    rows = samples(4, side=96)
    asyncio.run(double.rollout("my_rewards.custom_rm", rows))
    images, clean, _ = stacked(rows)
    expected = iqareward.load("0.7*haarpsi + 0.3*ssim")(images, references=clean)
    torch.testing.assert_close(torch.tensor([row.reward for row in rows]), expected, **NETWORK_BATCH)
    _, rewards = double.post_process("my_rewards.post_process", rows, 2)
    assert all(math.isfinite(value) for value in rewards)
