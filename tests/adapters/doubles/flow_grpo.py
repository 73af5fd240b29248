"""flow_grpo and ddpo-pytorch as their training scripts behave, as far as a reward can notice."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


def rewards_module(*, takes_ref_images: bool = False) -> ModuleType:
    """A module like `flow_grpo.rewards`: factories, and a `multi_score` whose table nobody can reach."""
    module = ModuleType("flow_grpo.rewards")

    def jpeg_compressibility():
        return lambda images, prompts, metadata: ([float(len(prompt)) for prompt in prompts], {})

    def pickscore_score(device):
        return lambda images, prompts, metadata: (images.mean(dim=(1, 2, 3)), {})

    def multi_score(device, score_dict):
        table = {"jpeg_compressibility": module.jpeg_compressibility, "pickscore": module.pickscore_score}
        fns = {}
        for name in score_dict:
            factory = table[name]
            wants_device = "device" in factory.__code__.co_varnames
            fns[name] = factory(device) if wants_device else factory()

        def run(images, prompts, metadata):
            details, total = {}, [0.0] * len(prompts)
            for name, weight in score_dict.items():
                scores, _ = fns[name](images, prompts, metadata)
                details[name] = scores
                total = [old + weight * new for old, new in zip(total, scores, strict=True)]
            return {**details, "avg": total}, {}

        def old(images, prompts, metadata, only_strict=True):
            assert isinstance(only_strict, bool)
            return run(images, prompts, metadata)

        def new(images, prompts, metadata, ref_images=None, only_strict=True):
            return run(images, prompts, metadata)

        return new if takes_ref_images else old

    for function in (jpeg_compressibility, pickscore_score, multi_score):
        setattr(module, function.__name__, function)
    return module


def sampling_phase(reward_fn: Callable[..., Any], batches: Sequence[tuple]) -> dict[str, np.ndarray]:
    """Score all batches as the script does, in eight threads beside sampling, and gather every component.

    A batch is (images, prompts, metadata) or, in the edit scripts, (images, prompts, metadata, ref_images).
    """
    with ThreadPoolExecutor(max_workers=8) as pool, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        futures = [pool.submit(reward_fn, *batch, only_strict=True) for batch in batches]
        results = [future.result()[0] for future in futures]
    columns = {
        key: torch.cat([torch.as_tensor(result[key], device="cpu").float() for result in results]) for key in results[0]
    }
    rows = sum(len(batch[1]) for batch in batches)
    assert all(column.shape == (rows,) for column in columns.values())
    return {key: column.numpy() for key, column in columns.items()}


class PerPromptStatTracker:
    """Advantages against the rewards of the same key, which the scripts take from the prompt's text."""

    def __init__(self, global_std: bool = False) -> None:
        self.global_std = global_std

    def update(self, prompts: Sequence[Any], rewards: Any) -> np.ndarray:
        prompts, rewards = np.array(prompts), np.array(rewards, dtype=np.float64)
        advantages = np.empty_like(rewards)
        for prompt in np.unique(prompts):
            own = prompts == prompt
            spread = rewards.std() if self.global_std else rewards[own].std()
            advantages[own] = (rewards[own] - rewards[own].mean()) / (spread + 1e-4)
        return advantages


class DDPOStatTracker:
    """ddpo-pytorch's tracker: its buffer has the dtype of the rewards."""

    def update(self, prompts: Sequence[str], rewards: np.ndarray) -> np.ndarray:
        prompts, advantages = np.array(prompts), np.empty_like(rewards)
        for prompt in np.unique(prompts):
            own = prompts == prompt
            advantages[own] = (rewards[own] - rewards.mean()) / (rewards.std() + 1e-6)
        return advantages


def ddpo_sampling(rewards: ModuleType, reward_fn: str, batches: Sequence[tuple]) -> np.ndarray:
    """ddpo-pytorch: the reward by its name in the module, two threads, `torch.as_tensor` of the first result."""
    fn = getattr(rewards, reward_fn)()
    with ThreadPoolExecutor(max_workers=2) as pool:
        futures = [pool.submit(fn, *batch) for batch in batches]
        results = [future.result() for future in futures]
    return torch.cat([torch.as_tensor(scores, device="cpu") for scores, _ in results]).numpy()


def samples_for_training(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """The filter before the inner loop: rows whose advantages are all 0 leave every tensor of `samples`."""
    kept = samples["advantages"].abs().sum(dim=1) != 0
    return {name: rows[kept] for name, rows in samples.items()}


def bfr_batch(images: Tensor, prompts: Sequence[str], truth: Tensor) -> tuple:
    """A batch as BFR_RL hands it over: [-1, 1], and one mapping of batches as metadata."""
    return images * 2 - 1, prompts, {"gt_images": truth * 2 - 1}


def trl_ddpo_scores(reward_function: Callable[..., Any], images: Tensor, prompts: tuple[str, ...]) -> Tensor:
    """TRL's DDPOTrainer up to 0.23, the synchronous path."""
    rewards, _ = reward_function(images, prompts, tuple({} for _ in prompts))
    return torch.as_tensor(rewards, device="cpu")


def trl_alignprop_step(reward_function: Callable[..., Any], images: Tensor, prompts: tuple[str, ...]) -> None:
    """TRL's AlignPropTrainer up to 0.23: the loss is hard-coded."""
    rewards, _ = reward_function(images, prompts, tuple({} for _ in prompts))
    (10.0 - rewards.mean()).backward()
