"""Rewards by task: each image gets the score of its own reward, whatever the order, and nothing is guessed."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

import iqareward
from iqareward import ByTask, Cached, ImageReward, MicroBatched, Overlapped, WeightedSum

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
    with pytest.raises(ValueError, match="expected `tasks`, one per image, got None"):
        reward(IMAGES, references=CLEAN)
    with pytest.raises(ValueError, match="got 2"):
        reward(IMAGES, references=CLEAN, tasks=["blur", "blur"])
    with pytest.raises(ValueError, match=r"among \['blur', 'noise', 'jpeg'\], got \['rain'\]"):
        reward(IMAGES, references=CLEAN, tasks=["rain"] * 6)
    with pytest.raises(ValueError, match="at least one reward"):
        ByTask({})
    with pytest.raises(TypeError, match="load"):
        ByTask({"blur": "ssim"})


@pytest.mark.parametrize(
    "wrapper", [Cached, MicroBatched, Overlapped, partial(MicroBatched, max_batch=2), lambda r: WeightedSum([(1.0, r)])]
)
@pytest.mark.parametrize("as_list", [False, True])
def test_wrappers_pass_the_tasks_on(wrapper, as_list):
    """Whole, cut into pieces, or from the memory, where the same pixels under another task have another score."""
    images, clean = (list(batch) if as_list else batch for batch in (IMAGES, CLEAN))
    reward = wrapper(by_task())
    for tasks in (TASKS, TASKS[::-1]):
        expected = by_task()(images, references=clean, tasks=tasks)
        torch.testing.assert_close(reward(images, references=clean, tasks=tasks), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="expected `tasks`"):
        reward(images, references=clean)


def test_merged_calls_keep_their_tasks():
    """Eight threads with one image each."""
    with MicroBatched(by_task(), max_wait_ms=50) as reward, ThreadPoolExecutor(6) as pool:
        found = pool.map(
            lambda row: reward(IMAGES[row : row + 1], CLEAN[row : row + 1], tasks=TASKS[row : row + 1]), range(6)
        )
        expected = by_task()(IMAGES, references=CLEAN, tasks=TASKS)
        torch.testing.assert_close(torch.cat(list(found)), expected, rtol=1e-5, atol=1e-6)


def test_it_moves_its_rewards():
    """Offloading reaches each of them, and a call says so."""
    reward = by_task()
    reward.offload()
    with pytest.raises(RuntimeError, match="onload"):
        reward(IMAGES, references=CLEAN, tasks=TASKS)
    reward.onload()
    assert reward(IMAGES, references=CLEAN, tasks=TASKS).isfinite().all()


@pytest.mark.parametrize("task", ["blur", "noise"])
def test_the_contract_is_kept_for_each_task(task, photographs, degraded_photographs):
    """`check_reward` gives every image the task that it is told."""
    with pytest.raises(ValueError, match="expected `task`"):
        iqareward.check_reward(by_task(), degraded_photographs, photographs)
    report = iqareward.check_reward(by_task(), degraded_photographs, photographs, task=task)
    assert not report.failed


class Offset(ImageReward):
    """The mean of each image, and a whole number for its task and its id."""

    name, needs_tasks, needs_ids, batch_size = "offset", True, True, 2

    def score_batch(self, images, tasks, ids):
        return images.mean((1, 2, 3)) + torch.tensor(
            [10.0 * (task == "noise") + 100 * one for task, one in zip(tasks, ids)]
        )


def test_tasks_and_ids_follow_their_image_into_batches():
    """Through groups of one size, and pieces of at most two."""
    images = [image[:, : 8 + 4 * (row % 2)] for row, image in enumerate(IMAGES)]
    found = Offset()(images, tasks=TASKS, ids=range(6))
    expected = [
        image.mean() + 10 * (task == "noise") + 100 * row for row, (image, task) in enumerate(zip(images, TASKS))
    ]
    torch.testing.assert_close(found, torch.stack(expected))
