"""A text-conditioned reward for SRPO (read at 81e5898). Copy this file, and write

    reward_model = SRPOModel(reward)  # in place of the `if args.reward_model == ...` of SRPO.py or SRPO_Qwen.py

SRPO learns from the scores of one image for two texts, `(1 + k) r(image, positive) - r(image, negative)`, and swaps the
texts for its inversion branch. A reward that reads no text, such as every quality metric, gives both texts the same
score: the difference vanishes, `k r(image)` is left, and both branches pull the same way. Follow the gradient of such a
reward instead, with AlignProp's loss (`iqareward.adapters.reward_models`) or the loop of `iqareward.diffusion`.

SRPO.py learns nothing from an image whose relative score exceeds 0.7. Scale a reward that goes beyond.

SRPO_Qwen.py stretches every image to [0, 1] by its own minimum and maximum before the reward sees it, so that exposure
and contrast are not judged; SRPO.py clamps.

Shen et al., Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference, 2025,
https://arxiv.org/abs/2509.06942
"""

from collections.abc import Sequence

from torch import Tensor, nn

import iqareward


class SRPOModel(nn.Module):
    """A differentiable reward that reads prompts, with the method that SRPO calls."""

    def __init__(self, reward: iqareward.Reward) -> None:
        super().__init__()
        if reward.needs_references or not (reward.needs_prompts and reward.differentiable):
            raise ValueError(
                f"SRPOModel expected a differentiable reward that reads the prompt and needs no references, got "
                f"{reward.name!r}."
            )
        self.reward = reward

    def SRP_cfg(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], images: Tensor, k: float | Tensor
    ) -> Tensor:
        """`[B]` relative scores of `images` `[B, 3, H, W]` in [0, 1], with their graph."""
        wanted, unwanted = (self.reward(images, prompts=texts) for texts in (prompts, negative_prompts))
        scores = (1 + k) * wanted - unwanted
        if not scores.isfinite().all():
            raise ValueError(f"{self.reward.name} could not score every image: {scores.tolist()}.")
        return scores
