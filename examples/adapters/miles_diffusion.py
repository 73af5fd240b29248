"""Rewards, and advantages weighted per sample, for miles_diffusion. Copy this file and edit the settings.

Read at 153b243. Start with `--custom-rm-path my_rewards.custom_rm --custom-reward-post-process-path
my_rewards.post_process`, and without `--reward-key`. Rewards are logged as `rollout/reward/raw_mean`, weighted
advantages as `rollout/reward/norm_mean`. miles has no supervised loss beside its policy loss, so the SFT weight is not
used.
"""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import iqareward
from iqareward.weighting import weighted_advantages

REWARD = iqareward.load("0.7*haarpsi + 0.3*ssim")
GROUND_TRUTH = "gt_path"  # key of `sample.metadata`: a path, PIL image, array or tensor
weighter = iqareward.AdaptiveWeighter(mode="convex", calibrate_on_first=True)
_lock = threading.Lock()


async def custom_rm(args: Any, samples: Sequence[Any], **ignored: Any) -> list[float]:
    """One reward per sample, scored in a thread, because miles awaits it on the loop that also serves rollouts."""
    if args.reward_key:
        raise ValueError(
            f"custom_rm returns one number per sample: start without --reward-key, got {args.reward_key!r}."
        )
    if getattr(REWARD, "needs_ids", False) and not args.group_rm:
        raise ValueError(f"{REWARD.name} compares the rollouts of an input: start with --group-rm, without evaluation.")
    return await asyncio.to_thread(_score, samples)


def post_process(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """Raw rewards and advantages within `sample.group_index`, weighted by the distance to the ground truth.

    Without weights these are the advantages of `--globalize-reward-std`.
    """
    if any(sample.group_index is None for sample in samples):
        raise ValueError("post_process expected a `group_index` in every sample, which tells the inputs apart.")
    groups = torch.tensor([sample.group_index for sample in samples])
    raw = [sample.get_reward_value(args) for sample in samples]
    advantages = iqareward.group_advantages(torch.tensor(raw), groups, scale="batch")
    difficulty = iqareward.reference_distance(_images(samples), _ground_truth(samples), groups=groups)
    weights = weighter(difficulty, has_signal=advantages.has_signal)
    return raw, weighted_advantages(advantages.values, weights).tolist()


def _score(samples: Sequence[Any]) -> list[float]:
    with _lock:  # one micro-group at a time on the device
        prompts, ids = [sample.prompt for sample in samples], [sample.group_index for sample in samples]
        scores = REWARD(_images(samples), references=_ground_truth(samples), prompts=prompts, ids=ids)
    if not scores.isfinite().all():
        raise ValueError(f"{REWARD.name} could not score every image: {scores.tolist()}.")
    return scores.tolist()


def _images(samples: Sequence[Any]) -> Tensor | list[Tensor]:
    """The one frame of each `generated_output` `[C, 1, H, W]` or `[C, H, W]`, float on the CPU in [0, 1]."""
    outputs = [sample.generated_output for sample in samples]
    frames = [output[:, 0] if output.ndim == 4 and output.shape[1] == 1 else output for output in outputs]
    return iqareward.to_images(frames, value_range=(0, 1))


def _ground_truth(samples: Sequence[Any]) -> Tensor | list[Tensor]:
    return iqareward.to_images([sample.metadata[GROUND_TRUTH] for sample in samples], value_range=(0, 1))
