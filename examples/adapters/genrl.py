"""Image-quality rewards for GenRL (ModelTC/GenRL, read at 0956cd0). Copy this file and edit the settings.

If it is `my_rewards.py`, its YAML needs

    reward_module: my_rewards
    reward_fn:
      iqa: 1.0

Without `reward_module` GenRL knows no `iqa`, and trains on a reward of 0 without an error: look at the curve
`reward_iqa_raw`. With it, all rewards of `reward_fn` come from this file.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from iqareward.adapters.flow_grpo import reward_function

REWARD = "qalign"
EVERY = 4  # frames of which one is scored


def iqa_score(device: Any) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """The mean score of a video's frames, `[N]`; GenRL adds `_score` to the name of the reward.

    `device` is always the CPU, between whose use and the GPU GenRL moves its own models; this one stays on the GPU.
    """
    score = reward_function(REWARD)

    def fn(videos: Tensor, prompts: Sequence[str], metadata: Any) -> tuple[Tensor, dict[str, Any]]:
        frames = videos[:, ::EVERY]  # of [N, F, 3, H, W] in [0, 1]
        texts = [prompt for prompt in prompts for _ in range(frames.shape[1])]
        scores, info = score(frames.flatten(0, 1), texts, None)
        return torch.as_tensor(scores).view(frames.shape[:2]).mean(1), info

    return fn
