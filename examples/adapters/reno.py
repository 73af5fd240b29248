"""A loss for ReNO (read at bd6f6ac), which optimises the noise of one image. Copy this file, and set

    trainer.reward_losses = [ReNOLoss(reward, weighting=1.0)]
    trainer.preprocess_fn = torch.nn.Identity()

ReNO crops every image to 224 pixels and normalises it for CLIP before its losses see it; the second line removes that.
ReNO's own losses in the same list must then crop by themselves.
"""

from typing import Any

from torch import Tensor

import iqareward

_CLIP_SIDE = 224  # the side of the crop; none of ReNO's generators draws an image of that size


class ReNOLoss:
    """The negative reward, for any differentiable reward that needs no references."""

    def __init__(self, reward: str | dict[str, Any] | iqareward.Reward, weighting: float = 1.0) -> None:
        self.reward = reward if callable(reward) else iqareward.load(reward, differentiable=True)
        if self.reward.needs_references or not self.reward.differentiable:
            raise ValueError(f"ReNOLoss expected a differentiable no-reference reward, got {self.reward.name!r}.")
        self.name, self.weighting = self.reward.name, weighting

    def __call__(self, image: Tensor, prompt: str) -> Tensor:
        """A scalar loss of `image` `[B, 3, H, W]` in [0, 1]; lower is better."""
        if tuple(image.shape[-2:]) == (_CLIP_SIDE, _CLIP_SIDE):
            raise ValueError(
                f"ReNOLoss expected the image at native resolution, got ReNO's CLIP crop {list(image.shape)}. "
                "Set trainer.preprocess_fn = torch.nn.Identity() before trainer.train(...)."
            )
        scores = self.reward(image.float(), prompts=[prompt] * image.shape[0])
        if not scores.isfinite().all():
            raise ValueError(f"{self.name} could not score the image: {scores.tolist()}.")
        return -scores.mean()
