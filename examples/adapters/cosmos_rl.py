"""A reward for cosmos-rl (read at 89f2e5b, 2026-07, in maintenance mode). Copy this file and edit the settings.

Pass `reward_fns = [(quality, 1.0)]` to the launcher. cosmos-rl calls
`quality(to_be_evaluated, reference, prompt=, data_packer=, config=, tokenizer=)` and asserts a float for one image, and
a list for a group (`group_reward_calculation`). There is no hook for weights per sample.
"""

from typing import Any

import iqareward

REWARD = iqareward.load("qalign")
VALUE_RANGE = (0, 1)  # of floating-point images, which is up to your data packer
USE_REFERENCE = False  # True: `reference` is the ground truth, a path, PIL image, array or tensor


def quality(to_be_evaluated: Any, reference: Any = None, prompt: Any = "", **ignored: Any) -> float | list[float]:
    """A float for one image, a list for a list of images; an image that cannot be scored stops the training."""
    is_group = isinstance(to_be_evaluated, list | tuple)
    images = iqareward.to_images(to_be_evaluated, value_range=VALUE_RANGE)
    references = None
    if USE_REFERENCE:
        one = iqareward.to_images(reference, value_range=VALUE_RANGE)[0].to(images[0].device)
        references = [one] * len(images)
    scores = REWARD(images, references=references, prompts=[prompt] * len(images))
    if not scores.isfinite().all():
        raise ValueError(f"{REWARD.name} could not score every image: {scores.tolist()}.")
    return scores.tolist() if is_group else scores.item()
