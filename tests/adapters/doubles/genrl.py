"""GenRL: rewards by name from a user's module, tensors, and the two ways in which it makes advantages of them."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from tests.adapters.doubles.flow_grpo import STEPS, PerPromptStatTracker, collated


def load_reward_fn(name: str, device: torch.device, module_path: str | None) -> Callable[..., Any]:
    """`NAME_score(device)` of the user's module; without a module an unknown name is a reward of 0."""
    if module_path:
        factory = getattr(importlib.import_module(module_path), f"{name}_score", None)
        if factory is None:
            raise ValueError(f"no {name}_score in {module_path}")
        return factory(device)
    return lambda images, prompts, metadata, only_strict=False: ({"avg": torch.zeros(len(prompts))}, {})


def multi_score(device: torch.device, reward_cfg: Mapping[str, float], module_path: str | None) -> Callable[..., Any]:
    fns = {name: load_reward_fn(name, device, module_path) for name in reward_cfg}

    def fn(images, prompts, metadata, only_strict=True):
        scores = {}
        for name, score in fns.items():
            out, _ = score(images, prompts, metadata)
            value = out.get("avg", out.get("reward", out)) if isinstance(out, dict) else out
            scores |= {f"{name}_raw": value, name: value * reward_cfg[name]}
        scores["avg"] = torch.stack([scores[name] for name in reward_cfg], dim=0).mean(0)
        return scores, {}

    return fn


def epoch(config: Mapping[str, Any], batches: Sequence[tuple[Tensor, list[str]]]) -> tuple[Tensor, dict[str, float]]:
    """One epoch: `[N, F, 3, H, W]` videos scored in eight threads; the advantages, and what is logged of the rewards.

    `config` has the keys of its YAML: `reward_fn`, `reward_module`, and `weight_advantages` of its `train` section.
    """
    reward_fn = multi_score(torch.device("cpu"), config["reward_fn"], config["reward_module"])
    with ThreadPoolExecutor(max_workers=8) as executor:
        futures = [
            executor.submit(reward_fn, videos, prompts, [{}] * len(prompts), True) for videos, prompts in batches
        ]
        results = [future.result()[0] for future in futures]
    rewards = collated([{key: torch.as_tensor(value).float() for key, value in found.items()} for found in results])
    prompts = [prompt for _, of_batch in batches for prompt in of_batch]
    logged = {f"reward_{key}": value.mean().item() for key, value in rewards.items() if key.endswith("_raw")}
    steps = {key: value.unsqueeze(-1).expand(-1, STEPS).numpy() for key, value in rewards.items()}
    if config["weight_advantages"]:
        each = [
            weight * PerPromptStatTracker().update(prompts, steps[f"{name}_raw"])
            for name, weight in config["reward_fn"].items()
        ]
        return torch.as_tensor(sum(each)), logged
    return torch.as_tensor(PerPromptStatTracker().update(prompts, steps["avg"])), logged
