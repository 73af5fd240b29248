"""A reward for MixGRPO (read at e5cdd6a). Copy this file, and change two lines of `fastvideo/train_grpo_flux.py`:

    from mixgrpo import PickScoreRewardModel  # in place of the import of its own class
    reward_models.append(PickScoreRewardModel("qalign", device=device))  # in place of its append

The append for the reward alone is the one under `--reward_model pick_score`. The one under `multi_reward` has HPSv2 and
ImageReward beside it; the share of the reward is then `--pick_score_weight` divided by the sum of all weights.

MixGRPO decides by the name of a model's class how to call it. It gives a model of any other name reward 0 for every
image, prints the error and goes on; it does the same with every exception. This class therefore has the name of a model
that it knows, and ends the process where it must stop. MixGRPO keeps the scores of one model per name, so a second one
is refused.
"""

import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

import iqareward


class PickScoreRewardModel:
    """A reward in the place of PickScore: `model(images, prompts) -> list of float`."""

    _alive: ClassVar["weakref.WeakSet[PickScoreRewardModel]"] = weakref.WeakSet()

    def __init__(self, reward: str | dict[str, Any] | iqareward.Reward, *, device: torch.device | str | int) -> None:
        self.device = torch.device(device)
        self.reward = reward if callable(reward) else iqareward.load(reward, device=self.device)
        if self.reward.needs_references:
            raise ValueError(f"{self.reward.name} needs references, and MixGRPO passes none.")
        if self._alive:
            raise ValueError(
                f"MixGRPO would keep the scores of one PickScoreRewardModel, and {self.reward.name!r} would be the "
                "second. Combine the rewards in one sum, such as '0.7*qalign + 0.3*niqe'."
            )
        self._alive.add(self)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        try:
            scores = self.reward(iqareward.to_images(list(images), device=self.device), prompts=list(prompts))
            if not scores.isfinite().all():
                raise ValueError(f"could not score every image: {scores.tolist()}")
            return scores.tolist()
        except Exception as error:  # MixGRPO swallows every Exception around a reward, and would train on without it
            raise SystemExit(f"{self.reward.name}: {error}") from error
