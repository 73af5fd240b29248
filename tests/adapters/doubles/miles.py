"""miles_diffusion at 153b243: the rollout that awaits a reward, the normaliser, the train pairs and the policy loss."""

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

    def get_reward_value(self, args: Any) -> float:
        if self.reward is None:
            raise ValueError("sample.reward is None")
        return float(self.reward[args.reward_key] if args.reward_key else self.reward)


def load_function(path: str) -> Any:
    module, name = path.rsplit(".", 1)
    return getattr(importlib.import_module(module), name)


def arguments(**changed: Any) -> Any:
    """The command line, with the defaults of the trainer."""
    defaults: dict[str, Any] = {"reward_key": None, "custom_reward_post_process_path": None, "n_samples_per_prompt": 2}
    defaults |= {"group_rm": False}
    defaults |= {"globalize_reward_mean": False, "globalize_reward_std": False, "grpo_std_normalization": True}
    return SimpleNamespace(**{**defaults, "diffusion_adv_clip_max": 5.0, "diffusion_clip_range": 1e-4, **changed})


async def rollout(custom_rm_path: str, samples: list[Sample], micro_group: int = 2, **options: Any) -> int:
    """Await the function for every micro-group, or group, beside a loop that must stay alive; returns its turns."""
    args, turns, done = arguments(**options), 0, False
    micro_group = args.n_samples_per_prompt if args.group_rm else micro_group
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


def post_process(samples: list[Sample], path: str | None = None, **options: Any) -> tuple[list[float], list[float]]:
    """Raw rewards and advantages: by the hook, or normalised over consecutive samples."""
    args = arguments(custom_reward_post_process_path=path, **options)
    if path is not None:
        return load_function(path)(args, samples)
    raw = torch.tensor([sample.get_reward_value(args) for sample in samples])
    rewards = raw.view(-1, args.n_samples_per_prompt)
    rewards = rewards - (raw.mean() if args.globalize_reward_mean else rewards.mean(-1, keepdim=True))
    if args.grpo_std_normalization:
        std = raw.std() if args.globalize_reward_std else rewards.std(-1, keepdim=True)
        rewards = rewards / (std + 1e-4)
    return raw.tolist(), rewards.flatten().tolist()


def policy_gradients(samples: list[Sample], path: str | None = None, *, steps: int = 2, **options: Any) -> Tensor:
    """The gradient of the loss by each sample's log-probability, from one train pair per denoising step."""
    args = arguments(**options)
    raw, rewards = post_process(samples, path, **options)
    pairs = [
        {"advantage": float(reward), "raw_reward": float(score), "sample": index}
        for index, (reward, score) in enumerate(zip(rewards, raw, strict=True))
        for _ in range(steps)
    ]
    advantage = torch.tensor([pair["advantage"] for pair in pairs], dtype=torch.float32)
    advantage = advantage.clamp(-args.diffusion_adv_clip_max, args.diffusion_adv_clip_max)
    log_probs = torch.zeros(len(samples), requires_grad=True)
    ratio = log_probs[[pair["sample"] for pair in pairs]].exp()
    clipped = ratio.clamp(1 - args.diffusion_clip_range, 1 + args.diffusion_clip_range)
    torch.maximum(-advantage * ratio, -advantage * clipped).sum().backward()
    return log_probs.grad
