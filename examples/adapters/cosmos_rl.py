"""A reward for cosmos-rl (read at 4903300; in maintenance mode). Copy this file and edit the settings.

Pass `reward_fns=[(quality, 1.0)]` to the launcher, with `use_remote_reward = false` in `[train.train_policy]`; if that
is true, it is never called. Your data set must define `get_reference_answer(index)`: the ground truth, or "".

cosmos-rl's own diffusion trainer takes remote rewards only (`examples/dialect_server.py`): between a local reward and
the trainer the latents are lost, unless the rollout marks its completions as trainable, as `keep_latents` does in
versions that know `completion_trainable`.
"""

import threading
from typing import Any

import iqareward

REWARD = iqareward.load("qalign")
VALUE_RANGE = (0, 1)  # of floating-point images; diffusion rollouts have [0, 1]
USE_REFERENCE = False  # True: the reference answer is the ground truth, a path, PIL image, array or tensor
_LOCK = threading.Lock()  # rewards of images are called from two threads


def quality(to_be_evaluated: Any, reference: Any, prompt: Any = "", *, config: Any, **ignored: Any) -> Any:
    """(score, metrics) of one image, lists of both for a group; an image that cannot be scored stops the training."""
    group = config.train.train_policy.group_reward_calculation
    images = iqareward.to_images(to_be_evaluated if group else [to_be_evaluated], value_range=VALUE_RANGE)
    references = None
    if USE_REFERENCE:
        one = iqareward.to_images(reference, value_range=VALUE_RANGE)[0].to(images[0].device)
        references = [one] * len(images)
    text = prompt["prompt"] if isinstance(prompt, dict) else prompt
    with _LOCK:
        # one id, so that rewards which compare rollouts work with `group_reward_calculation = true`
        scores = REWARD(images, references=references, prompts=[text] * len(images), ids=[0] * len(images))
    if not scores.isfinite().all():
        raise ValueError(f"{REWARD.name} could not score every image: {scores.tolist()}.")
    metrics = [{REWARD.name: score} for score in scores.tolist()]
    return (scores.tolist(), metrics) if group else (scores.item(), metrics[0])


def keep_latents(results: list[Any]) -> list[Any]:
    """What `rollout_generation` of a subclass of `NFTRollout` returns: the results with every completion trainable."""
    for result in results:
        result.completion_trainable = [True] * len(result.completions)
    return results
