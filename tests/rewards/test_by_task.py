"""Rewards by task: each image gets the score of its own reward, whatever the order, and nothing is guessed."""

import pytest
import torch

import iqareward
from iqareward import ByTask

IMAGES, CLEAN = torch.rand(2, 6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TASKS = ["blur", "noise", "blur", "jpeg", "noise", "noise"]


def by_task() -> ByTask:
    """Two of three tasks share a reward."""
    ssim, psnr = iqareward.load("ssim"), iqareward.load("psnr")
    return ByTask({"blur": ssim, "noise": psnr, "jpeg": ssim})


@pytest.mark.parametrize("as_list", [False, True])
def test_each_image_is_scored_by_the_reward_of_its_task(as_list):
    """As that reward scores it alone, for batches and for lists of images."""
    reward = by_task()
    images, clean = (list(batch) if as_list else batch for batch in (IMAGES, CLEAN))
    found = reward(images, references=clean, tasks=TASKS, ids=range(6))
    for row, task in enumerate(TASKS):
        alone = reward.rewards[task](IMAGES[row : row + 1], references=CLEAN[row : row + 1])
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-6, atol=1e-6)


def test_it_is_a_reward_with_joint_facts():
    """Bounds hold all of them, and what one needs the whole needs."""
    reward = by_task()
    assert isinstance(reward, iqareward.Reward)
    assert reward.needs_references
    assert reward.bounds == (None, iqareward.load("psnr").bounds[1])
    assert not ByTask({"a": iqareward.load("piqe")}).needs_references


def test_gradients_reach_each_image():
    """Through its own reward."""
    reward = ByTask(dict.fromkeys(("blur", "noise", "jpeg"), iqareward.load("ssim", differentiable=True)))
    images = IMAGES.clone().requires_grad_()
    reward(images, references=CLEAN, tasks=TASKS).sum().backward()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()


def test_what_is_missing_or_unknown_is_named():
    """No tasks, too few, a task without a reward, no rewards."""
    reward = by_task()
    with pytest.raises(ValueError, match=r"one task per image \(6\), got none"):
        reward(IMAGES, references=CLEAN)
    with pytest.raises(ValueError, match="got 2"):
        reward(IMAGES, references=CLEAN, tasks=["blur", "blur"])
    with pytest.raises(ValueError, match=r"among \['blur', 'noise', 'jpeg'\], got \['rain'\]"):
        reward(IMAGES, references=CLEAN, tasks=["rain"] * 6)
    with pytest.raises(ValueError, match="at least one reward"):
        ByTask({})
    with pytest.raises(TypeError, match="load"):
        ByTask({"blur": "ssim"})
