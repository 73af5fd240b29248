"""A reward for MixGRPO (read at e5cdd6a). Copy this file, and append the model to its `reward_models`.

    reward_models.append(PickScoreRewardModel("qalign"))

MixGRPO decides by the name of a model's class how to call it. It gives a model of any other name reward 0 for every
image, prints the error and goes on; it does the same with every exception. This class therefore has the name of a model
that it knows, whose weight (`--pick_score_weight`) is then that of the reward, and ends the process where it must stop.
Only one model can have that name: combine several rewards in one sum, `"0.7*qalign + 0.3*niqe"`.
"""

from collections.abc import Sequence

from PIL import Image

import iqareward


class PickScoreRewardModel:
    """A reward in the place of PickScore: `model(images, prompts) -> list of float`."""

    def __init__(self, reward: str | iqareward.Reward) -> None:
        self.reward = iqareward.load(reward) if isinstance(reward, str) else reward
        if self.reward.needs_references:
            raise ValueError(f"{self.reward.name} needs references, and MixGRPO passes none.")

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        try:
            scores = self.reward(iqareward.to_images(list(images)), prompts=list(prompts))
            if not scores.isfinite().all():
                raise ValueError(f"could not score every image: {scores.tolist()}")
            return scores.tolist()
        except Exception as error:  # MixGRPO swallows every Exception around a reward, and would train on without it
            raise SystemExit(f"{self.reward.name}: {error}") from error
