"""miles_diffusion, as far as a reward function or a post-processing hook can notice."""

import asyncio
import importlib
import inspect
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Sample:
    """What the rollout fills in; `generated_output` is `[C, T, H, W]` on the CPU."""

    group_index: int | None = None
    prompt: str = ""
    generated_output: Tensor | None = None
    reward: Any = None
    metadata: dict = field(default_factory=dict)
    train_metadata: dict | None = None

    def get_reward_value(self, args: Any) -> float:
        if self.reward is None:
            raise ValueError("sample.reward is None")
        return float(self.reward)


def load_function(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


async def rollout(custom_rm_path: str, samples: list[Sample], micro_group: int = 2) -> int:
    """Await the function for every micro-group, beside a loop that must stay alive; returns that loop's turns."""
    args, turns, done = SimpleNamespace(reward_key=None), 0, False
    function = load_function(custom_rm_path)

    async def generate() -> None:
        nonlocal turns
        while not done:
            turns += 1
            await asyncio.sleep(0.001)

    async def score(group: list[Sample]) -> None:
        rewards = function(args, group)
        assert inspect.isawaitable(rewards), f"object {type(rewards).__name__} can't be used in 'await' expression"
        rewards = await rewards
        for sample, reward in zip(group, rewards, strict=True):
            sample.reward = reward

    other = asyncio.create_task(generate())
    try:
        await asyncio.gather(*(score(samples[i : i + micro_group]) for i in range(0, len(samples), micro_group)))
    finally:
        done = True
        await other
    return turns


def post_process(path: str | None, samples: list[Sample], n_samples_per_prompt: int) -> tuple[list[float], list[float]]:
    """Raw rewards and advantages: by the hook, or normalised over consecutive samples."""
    args = SimpleNamespace(reward_key=None)
    if path is not None:
        raw, rewards = load_function(path)(args, samples)
        assert len(raw) == len(rewards) == len(samples)
        return raw, rewards
    raw = [sample.get_reward_value(args) for sample in samples]
    rewards = torch.tensor(raw).reshape(-1, n_samples_per_prompt)
    rewards = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
    return raw, rewards.flatten().tolist()
