"""A reward for VideoX-Fun (read at 2352d63): GRPO of Z-Image, and reward LoRA of Wan, Wan-Fun and CogVideoX-Fun.

Copy this file to `videox_fun/reward/iqa_reward.py`, append

    from .iqa_reward import IQAReward

to `videox_fun/reward/reward_fn.py`, and start `scripts/z_image/train_grpo_lora.py` with

    --reward_fn IQAReward --reward_fn_kwargs '{"reward": "qalign"}'

`train_reward_lora.py` follows the gradient of the reward: `'{"reward": "qalign", "differentiable": true}'`. VideoX-Fun
keeps the scores of one reward per class name, so combine several in one sum. `train_grpo_lora.py` wraps the prompts in
the chat template of its text encoder before it passes them; for a reward that reads prompts, write
`encode_prompt(list(text), ...)` there.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

import iqareward


class IQAReward:
    """Any no-reference reward by name, as a class of `videox_fun.reward.reward_fn`."""

    def __init__(
        self, reward: str, device: torch.device | str, dtype: torch.dtype | None = None, differentiable: bool = False
    ) -> None:
        self.reward = iqareward.load(reward, device=device, differentiable=differentiable)
        if self.reward.needs_references:
            raise ValueError(f"{reward} needs references, and VideoX-Fun passes none.")

    def get_reward(self, batch_frames: Tensor, batch_prompt: Sequence[str] | None = None) -> Tensor:
        """`[B]` scores of `batch_frames` `[B, 3, T, H, W]` in [0, 1], each the mean over the frames."""
        frames = batch_frames.movedim(2, 1)
        prompts = batch_prompt and [prompt for prompt in batch_prompt for _ in range(frames.shape[1])]
        scores = self.reward(frames.flatten(0, 1).float(), prompts=prompts).view(frames.shape[:2])
        if not scores.isfinite().all():
            raise ValueError(f"{self.reward.name} could not score every frame: {scores.tolist()}.")
        return scores.mean(1)

    def __call__(self, batch_frames: Tensor, batch_prompt: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        """The loss and the reward, both scalar."""
        rewards = self.get_reward(batch_frames, batch_prompt)
        return -rewards.mean(), rewards.mean()
