"""Rewards for NeMo RL's `research/flow_grpo` (read at 30bd89f, its reward environment at 9940b8c).

Copy this file to `flow_grpo/environments/iqa.py`, add `iqareward` to the project's dependencies, import the file in
`run_flow_grpo.py`, and name the reward in the YAML. Each name can be used once, so combine rewards in a sum:

    env:
      image_reward:
        plugins: [{name: iqareward, weight: 1.0, reward: 0.7*qalign + 0.3*ssim, references: gt_path, device: cuda}]
        num_gpus_per_worker: 1.0

Samples with one prompt are one group, so give each image to restore a prompt of its own. The log then has
`reward/iqareward/score_mean`. The settings besides `name` and `weight` are those of `IQAReward`.
"""

from collections.abc import Sequence
from typing import Any

from flow_grpo.environments.image_reward_environment import register_image_reward
from torch import Tensor

import iqareward


class IQAReward:
    """The score of each image; one that cannot be scored stops the training, because NaN would spoil all advantages.

    Args:
        reward: A name or sum of the catalogue.
        references: Key of each prompt's metadata with the path of the ground truth.
        device: Where to score. Images arrive on the CPU, as floats in [0, 1].
    """

    name, weight = "iqareward", 1.0  # the trainer takes the weight from the YAML

    def __init__(self, reward: str, references: str | None = None, device: str = "cpu") -> None:
        self.reward, self.references, self.device = iqareward.load(reward, device=device), references, device
        if self.reward.needs_references and references is None:
            raise ValueError(f"IQAReward expected `references`, a key of the metadata, for {self.reward.name!r}.")

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`[B, 3, H, W]` -> `[B]`, higher is better."""
        images = iqareward.to_images(images, value_range=(0, 1), device=self.device)
        references = None
        if self.references is not None:
            truth = [row[self.references] for row in metadata]
            references = iqareward.to_images(truth, value_range=(0, 1), device=self.device)
        scores = self.reward(images, references=references, prompts=prompts).detach().cpu()
        if not scores.isfinite().all():
            raise ValueError(f"{self.reward.name} could not score every image: {scores.tolist()}.")
        return {"score": scores}


register_image_reward("iqareward", IQAReward)
