"""Loops that build their own reward models, as far as such a model can notice: DanceGRPO, MixGRPO, imscore, SRPO."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor


def dancegrpo_advantages(
    model: Any, images: Sequence[Image.Image], captions: Sequence[str], folder: Path, *, generations: int, device: str
) -> Tensor:
    """One image at a time, by the path of its PNG, then z-scores within consecutive groups."""
    rewards = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
            path = str(folder / f"flux_0_{index}.png")
            image.save(path)
            score = model.reward([path], [caption])
            if score.ndim == 2:
                score = score[:, 0]
            rewards.append(score)
    joined = torch.cat(rewards).to(torch.float32)
    assert joined.shape == (len(images),)
    assert joined.device == torch.device(device)
    groups = joined.view(-1, generations)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-8)).flatten()


def mixgrpo_rewards(
    images: Sequence[Image.Image], prompts: Sequence[str], models: Sequence[Any], weights: dict[str, float]
) -> tuple[list[float], list[int], dict[str, list[float]]]:
    """`compute_reward`: a thread per model, calls by class name, and reward 0 for whoever fails."""

    def one(model: Any) -> tuple[list[float], list[int]]:
        name = type(model).__name__
        try:
            if name in ("HPSClipRewardModel", "ImageRewardModel", "PickScoreRewardModel"):
                rewards, good = model(images, prompts), [1] * len(prompts)
            elif name == "CLIPScoreRewardModel":
                rewards, good = model(prompts, images), [1] * len(prompts)
            else:
                raise ValueError(f"unknown model {name}")
            assert len(rewards) == len(prompts)
            return rewards, good
        except Exception as error:
            raise ValueError(f"{name}: {error}") from error

    rewards: dict[str, list[float]] = {}
    good: dict[str, list[int]] = {}
    with ThreadPoolExecutor(max_workers=len(models)) as pool:
        futures = {pool.submit(one, model): type(model).__name__ for model in models}
        for future in as_completed(futures):
            name = futures[future]
            try:
                rewards[name], good[name] = future.result()
            except Exception:
                rewards[name], good[name] = [0.0] * len(prompts), [0] * len(prompts)
    merged, successes = [0.0] * len(prompts), [0] * len(prompts)
    for index in range(len(prompts)):
        if all(good[name][index] for name in weights):
            merged[index] = sum(weight * rewards[name][index] for name, weight in weights.items())
            successes[index] = 1
    return merged, successes, rewards


def imscore_step(model: Any, generated: Tensor, prompts: Sequence[str]) -> Tensor:
    """The post-training step of its README: the gradient that reaches the generator's pixels."""
    model.to("cpu").eval().requires_grad_(False)
    scores = model.score(generated, list(prompts))
    assert scores.shape == (len(prompts),)
    (-scores.mean()).backward()
    return scores.detach()


def srpo_losses(model: Any, image: Tensor, positive: str, caption: str, *, k: float) -> tuple[Tensor, Tensor]:
    """The loss of the denoising and of the inversion branch, from one decoded image `[1, 3, H, W]` in [0, 1]."""
    trained = [*model.eval().parameters()]
    assert all(not weight.requires_grad for weight in trained)
    forward = model.SRP_cfg([positive], [caption], image, k)
    inverse = model.SRP_cfg([caption], [positive], image, k)
    return tuple(torch.relu(-outputs + 0.7).mean() for outputs in (forward, inverse))
