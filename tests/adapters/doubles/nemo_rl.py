"""NeMo RL's research/flow_grpo at 30bd89f: plugins in worker processes, shards, advantages and the policy gradient."""

import functools
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class Project:
    """The plugin registry of `flow_grpo.environments.image_reward_environment`."""

    def __init__(self) -> None:
        self.plugins: dict[str, Callable[..., Any]] = {}

    def modules(self) -> dict[str, ModuleType]:
        module = ModuleType("image_reward_environment")

        def register_image_reward(name: str, factory: Callable[..., Any]) -> None:
            if name in self.plugins:
                raise ValueError(f"Image reward plugin {name!r} is already registered")
            self.plugins[name] = factory

        module.register_image_reward = register_image_reward
        return {"flow_grpo__environments__image_reward_environment": module}

    def environment(self, plugins: list[dict[str, Any]], replicas: int = 1) -> "ImageRewardEnvironment":
        """Keys beyond name and weight are options of the plugin, whose factory is sent to its workers."""
        built = {}
        for entry in plugins:
            options = {key: value for key, value in entry.items() if key not in ("name", "weight")}
            if entry["name"] in built:
                raise ValueError(f"Duplicate image reward plugin {entry['name']!r}")
            factory = functools.partial(self.plugins[entry["name"]], **options)
            workers = [pickle.loads(pickle.dumps(factory))() for _ in range(replicas)]
            built[entry["name"]] = entry.get("weight", 1.0), workers
        return ImageRewardEnvironment(built)


class ImageRewardEnvironment:
    def __init__(self, plugins: dict[str, tuple[float, list[Any]]]) -> None:
        self.plugins = plugins

    def score_images(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> tuple[Tensor, dict[str, float]]:
        """The weighted sum of all components, and the mean of each for the log."""
        count, total, metrics = len(images), torch.zeros(len(images)), {}
        for name, (weight, workers) in self.plugins.items():
            components: dict[str, Tensor] = {}
            for index, worker in enumerate(workers):
                rows = slice(index * count // len(workers), (index + 1) * count // len(workers))
                if rows.start < rows.stop:
                    scored = worker.score(images[rows], prompts[rows], metadata[rows])
                    for key, values in scored.items():
                        components.setdefault(key, torch.zeros(count))[rows] = values
            for key, values in components.items():
                total += weight * values
                metrics[f"reward/{name}/{key}_mean"] = float(values.mean())
        return total, metrics


def policy_gradient(rewards: Tensor, prompts: list[str], *, use_global_std: bool = True, steps: int = 2) -> Tensor:
    """The gradient of the loss by each image's log-probability; samples with one prompt are a group."""
    ids = torch.tensor([prompts.index(prompt) for prompt in prompts])
    baseline, std = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for one in ids.unique():
        baseline[ids == one], std[ids == one] = rewards[ids == one].mean(), rewards[ids == one].std()
    advantages = (rewards - baseline) / (rewards.std() + 1e-4 if use_global_std else std.clamp_min(1e-6))
    log_probs = torch.zeros(len(rewards), requires_grad=True)
    (-advantages[:, None].expand(-1, steps) * log_probs.exp()[:, None]).sum().backward()
    return log_probs.grad
