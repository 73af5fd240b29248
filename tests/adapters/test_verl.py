"""verl-omni (one image per call, async) and verl's batch manager: what ours passes and the naive form fails."""

import asyncio
import functools
import inspect
import threading
import types

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import iqareward
from iqareward import NoReference
from iqareward.adapters import verl
from iqareward.adapters.verl import batch_score_function, compute_score
from iqareward.weighting import LossWeights
from tests.adapters.doubles import verl as double
from tests.adapters.doubles.pages import blocks
from tests.tolerances import EXACT, NETWORK_BATCH


@pytest.fixture(autouse=True)
def no_workers_left():
    """Every test ends the workers that it started."""
    yield
    verl._batched.cache_clear()


def pixels(count: int, side: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def score_all(manager, images, **columns) -> list[dict]:
    return asyncio.run(double.reward_worker(manager, images, **columns))


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def test_one_image_per_call_becomes_batches() -> None:
    """Sixteen concurrent calls get their own scores as Python floats, and the reward sees batches."""
    sizes = []

    def counted(images: Tensor) -> Tensor:
        sizes.append(len(images))
        threading.Event().wait(0.01)
        return brightness(images)

    reward = NoReference(counted, higher_is_better=True)
    manager = double.VisualRewardManager(compute_score, reward=reward, max_batch=8, max_wait_ms=50.0)
    assert manager.is_async
    images = pixels(16)
    results = score_all(manager, images)
    assert all(type(result["reward_score"]) is float and result["reward_extra_info"] == {} for result in results)
    torch.testing.assert_close(double.rm_scores(results)[:, 0], brightness(images / 255), **NETWORK_BATCH)
    assert sum(sizes) == 16
    assert len(sizes) < 16
    assert max(sizes) <= 8


def test_async_objects_are_never_awaited() -> None:
    """An object with an async `__call__` runs as if it were plain, and its score is a coroutine; ours is a function."""

    class Naive:
        async def __call__(self, **call):
            return {"score": 1.0}

    result = asyncio.run(double.VisualRewardManager(Naive()).run_single(pixels(1)[0]))
    assert inspect.iscoroutine(result["reward_score"])
    result["reward_score"].close()
    partial = functools.partial(compute_score, reward="piqe")
    assert double.VisualRewardManager(partial).is_async


def test_sizes_and_other_keywords() -> None:
    """Images of different sizes share a queue, and what the router adds is ignored."""
    images = [*pixels(2), *pixels(2, side=48)]
    manager = double.VisualRewardManager(compute_score, reward="piqe", reward_router_address="host:1", model_name="x")
    scores = double.rm_scores(score_all(manager, images))[:, 0]
    expected = torch.stack([iqareward.load("piqe")(image[None] / 255)[0] for image in images])
    torch.testing.assert_close(scores, expected, **NETWORK_BATCH)


def test_references_from_paths(tmp_path) -> None:
    """The ground truth is a path in `ground_truth` or in `extra_info`."""
    images, clean = pixels(3), pixels(3, seed=1)
    paths = []
    for row, image in enumerate(clean):
        paths.append(str(tmp_path / f"{row}.png"))
        Image.fromarray(image.movedim(0, -1).numpy()).save(paths[-1])
    expected = iqareward.load("ssim")(images / 255, references=clean / 255)
    manager = double.VisualRewardManager(compute_score, reward="ssim", references="ground_truth")
    scores = double.rm_scores(score_all(manager, images, ground_truth=paths))[:, 0]
    torch.testing.assert_close(scores, expected, **NETWORK_BATCH)
    manager = double.VisualRewardManager(compute_score, reward="ssim", references="gt_path")
    scores = double.rm_scores(score_all(manager, images, extra_info=[{"gt_path": path} for path in paths]))[:, 0]
    torch.testing.assert_close(scores, expected, **NETWORK_BATCH)
    with pytest.raises(ValueError, match=r"expected 'gt_path' in the metadata of every sample, got keys \['num_turns'"):
        score_all(manager, images)
    with pytest.raises(ValueError, match="needs `references`, and has none"):
        asyncio.run(compute_score(solution_image=images[0], reward="ssim"))


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_unscored_images() -> None:
    """The managers pass NaN on; ours stops, which the sum of rewards turns into 0 unless the reward is required."""
    small = pixels(1, side=8)[0]

    async def naive(**call):
        return {"score": iqareward.load("piqe")(call["solution_image"][None] / 255).item()}

    assert double.rm_scores(score_all(double.VisualRewardManager(naive), [small])).isnan().all()
    manager = double.VisualRewardManager(compute_score, reward="piqe")
    with pytest.raises(ValueError, match=r"piqe could not score images \[0\] of 1"):
        score_all(manager, [small])
    entry = {"path": "pkg://iqareward.adapters.verl", "name": "compute_score", "reward": "piqe"}
    plain = double.MultiVisualRewardManager({"quality": entry})
    assert score_all(plain, [small])[0]["reward_score"] == 0.0  # the best piqe there is
    required = double.MultiVisualRewardManager({"quality": entry | {"required": True}})
    with pytest.raises(RuntimeError, match="'quality' failed: piqe could not score"):
        score_all(required, [small])
    chosen = double.MultiVisualRewardManager({"quality": entry | {"required": True, "on_nan": -100.0}})
    assert score_all(chosen, [small])[0]["reward_score"] == -100.0
    with pytest.raises(ValueError, match="expected on_nan 'raise' or a finite number, got 'mean'"):
        asyncio.run(compute_score(solution_image=small, reward="piqe", on_nan="mean"))


def test_what_is_no_image() -> None:
    """Latents and videos are refused with what to set."""
    with pytest.raises(ValueError, match=r"one uint8 image \[3, H, W\], got torch.float32 \[16, 8, 8\]"):
        score_all(double.VisualRewardManager(compute_score, "latent", reward="piqe"), [torch.zeros(16, 8, 8)])
    with pytest.raises(ValueError, match=r"got torch.uint8 \[5, 3, 32, 32\]"):
        score_all(double.VisualRewardManager(compute_score, reward="piqe"), [pixels(5)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process without a GPU")
def test_hidden_gpu() -> None:
    """A reward that was promised a GPU does not end on the CPU; the error names the variable to export."""
    with pytest.raises(RuntimeError, match="RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0"):
        asyncio.run(compute_score(solution_image=pixels(1)[0], reward="piqe", device="cuda"))
    with pytest.raises(RuntimeError, match="sees no GPU"):
        batch_score_function(lambda texts, infos: [], "piqe", device="cuda")
    assert asyncio.run(compute_score(solution_image=pixels(1)[0], reward="piqe", device="cpu"))["score"] < 0


def decode(solution_strs, extra_infos):
    return [info["image"] if text == "keep" else None for text, info in zip(solution_strs, extra_infos)]


def test_batch_manager() -> None:
    """A batch of completions, decoded by a function of the user; one that leads to no image earns what is said."""
    images = pixels(3)
    infos = [{"image": Image.fromarray(image.movedim(0, -1).numpy()), "gt": 255 - image} for image in images]
    texts = ["keep", "nonsense", "keep"]
    fn = batch_score_function(decode, "ssim", references="gt", no_image=-2.0)
    assert inspect.isfunction(fn)
    assert not inspect.iscoroutinefunction(fn)
    module = types.SimpleNamespace(compute_score=fn)
    results = double.batch_reward_manager(double.load_extern_object(module, "compute_score"), texts, infos)
    expected = iqareward.load("ssim")(images / 255, references=1 - images / 255)
    torch.testing.assert_close(torch.tensor(results)[[0, 2]], expected[[0, 2]], **NETWORK_BATCH)
    assert results[1] == -2.0
    strict = batch_score_function(decode, "piqe")
    with pytest.raises(ValueError, match=r"piqe could not score images \[1\] of 3"):
        double.batch_reward_manager(strict, texts, infos)
    assert double.batch_reward_manager(batch_score_function(decode, "piqe", no_image=-9.0), ["no"], infos[:1]) == [-9.0]


def test_weights() -> None:
    """The engine takes one column of `rollout_is_weights` per step, and multiplies each sample's loss with it."""
    weights = LossWeights(rl=torch.tensor([1.0, 0.0, 0.5]), sft=torch.zeros(3))
    losses = double.policy_losses(torch.tensor([3.0, 5.0, 6.0]), weights.rl[:, None].expand(-1, 4), num_timesteps=4)
    torch.testing.assert_close(losses, torch.full((4,), 2.0), **EXACT)
    with pytest.raises(IndexError):
        double.policy_losses(torch.tensor([3.0, 5.0, 6.0]), weights.rl, num_timesteps=4)


def test_page() -> None:
    """The page's configuration scores."""
    (text,) = blocks("how-to/verl-omni.md", "yaml")
    manager = double.MultiVisualRewardManager(yaml.safe_load(text)["reward"]["reward_functions"])
    image = pixels(1, side=96)[0]
    (result,) = score_all(manager, [image], extra_info=[{"gt_path": image}])
    assert result["reward_extra_info"]["reward/quality"] == result["reward_score"]
