"""Rewards for diffusiongym. Copy this file; pass `IQAReward` to an environment of release 2.0 (read at 035ac5b), or
`IQAEvaluator` as `FlowEnvironment(reward=...)` of its successor (read at 85391c0).

Both mark an image without a score as not valid. Its reward is the mean of the others, because the trainers calculate
with rewards that are not valid before they leave them out, and DiffusionNFT and ORW-CFM do not leave them out.

The Stable Diffusion models of release 2.0 pass on no conditioning that they do not know, so a ground truth does not
reach a reward there. Take the successor, or a base model of your own.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

import iqareward


class IQAReward:
    """The score of each image and whether it has one.

    Args:
        reward: A name or sum of the catalogue, or any reward.
        references: Name of the conditioning with the ground truth of each sample, `[B, 3, H, W]` in [0, 1].
        prompts: Name of the conditioning with the text of each sample.
    """

    def __init__(self, reward: Any, references: str | None = None, prompts: str = "prompt") -> None:
        self.reward = reward if callable(reward) else iqareward.load(reward)
        self.references, self.prompts = references, prompts
        if self.reward.needs_references and references is None:
            raise ValueError(f"IQAReward expected `references`, a conditioning, for {self.reward.name!r}.")

    def __call__(self, sample: Any, latent: Any, **conditioning: Any) -> tuple[Tensor, Tensor]:
        images = iqareward.to_images(sample.data, value_range=(0, 1))
        references = None
        if self.references is not None:
            truth = conditioning.get(self.references)
            if truth is None:
                raise ValueError(f"IQAReward expected conditioning {self.references!r}, got {sorted(conditioning)}.")
            references = iqareward.to_images(truth, value_range=(0, 1), device=images[0].device)
        scores = self.reward(images, references=references, prompts=conditioning.get(self.prompts)).detach()
        valid = scores.isfinite()
        if not valid.any():
            raise ValueError(f"{self.reward.name} could not score any of {len(scores)} images.")
        return scores.where(valid, scores[valid].mean()), valid


class IQAEvaluator:
    """`IQAReward`, with its arguments, in the form of the successor."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.scored = IQAReward(*arguments, **named)

    def __call__(self, *, sample: Any, latent: Any, conditioning: Mapping[str, Any]) -> Any:
        from diffusiongym.core.reward import RewardBatch  # noqa: PLC0415, the release has no such class

        return RewardBatch(*self.scored(sample, latent, **conditioning))
