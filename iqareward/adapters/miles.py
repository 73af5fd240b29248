"""Rewards, and weights per sample, for miles_diffusion.

- Read: radixark/miles_diffusion 2929e49 (2026-05). It awaits `custom_rm(args, samples)` on the loop that also serves
  rollouts, and `post_process(args, samples)` replaces its normalisation of advantages.
- Range: `sample.generated_output`, float `[C, T, H, W]` on the CPU in [0, 1], with T = 1.
- References: a key of `sample.metadata`.
- Failure: `on_nan="raise"`; "mean", "worst" or a number on request; "nan" only together with our `post_process`, which
  leaves such rows out: in the trainer's own normalisation one NaN costs the whole group.

Its options name a function, and settings have no place there, so write a module, and start with
`--custom-rm-path my_rewards.custom_rm --custom-reward-post-process-path my_rewards.post_process`:

```python
from iqareward.adapters.miles import adaptive_post_process, reference_difficulty, reward_function
from iqareward.weighting import AdaptiveWeighter

custom_rm = reward_function("0.7*haarpsi + 0.3*ssim", references="gt_path")
weighter = AdaptiveWeighter(calibrate_on_first=True, mode="convex")
post_process = adaptive_post_process(weighter, reference_difficulty("gt_path"))
```
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from iqareward.adapters._values import OnNan, check_on_nan, column, find_reward, score, settle
from iqareward.advantages import group_advantages
from iqareward.difficulty import rmse
from iqareward.groups import group_statistics
from iqareward.images import to_images
from iqareward.rewards.loading import ImageDevice
from iqareward.rewards.threads import ProcessLock
from iqareward.schedules.schedule import check_signal
from iqareward.types import Reward, Scores
from iqareward.weighting import AdaptiveWeighter, weighted_advantages

UNIT = (0.0, 1.0)


def reward_function(
    reward: str | Reward,
    *,
    references: str | None = None,
    on_nan: OnNan = "raise",
    device: torch.device | str | None = None,
) -> Callable[..., Awaitable[list[float]]]:
    """A real `async def custom_rm(args, samples)` that scores in a thread, so that rollouts go on meanwhile.

    Args:
        reward: name or sum of the catalogue, or a reward.
        references: the key of `sample.metadata` that holds the reference: a path, PIL image, array or tensor.
        on_nan: what an image without a score becomes, and a sample without an image: "raise" (default: training stops),
            "mean" or "worst" of the call, "nan", a number.
        device: where images are scored, and where weights of rewards that are loaded by name live; None = the CPU.

    Returns:
        The function; it answers one float per sample.
    """
    check_on_nan(on_nan, allowed=("raise", "mean", "worst", "nan"), who="reward_function")
    judge = find_reward(reward, who="reward_function", references=references, device=device)
    turns, where = ProcessLock(), ImageDevice(device, name="reward_function")

    def score_samples(samples: Sequence[Any]) -> list[float]:
        scores = torch.full((len(samples),), torch.nan)
        rows = [row for row, sample in enumerate(samples) if sample.generated_output is not None]
        if rows:
            found = [samples[row] for row in rows]
            with turns:
                scores[rows] = _score(judge, found, references, where.get()).cpu()
        return settle(scores, on_nan, name=judge.name).tolist()

    async def custom_rm(args: Any, samples: Sequence[Any], **ignored: Any) -> list[float]:
        return await asyncio.to_thread(score_samples, samples)

    return custom_rm


def adaptive_post_process(
    weighter: AdaptiveWeighter,
    difficulty: Callable[[Sequence[Any]], Tensor],
    *,
    scale: Literal["group", "batch", "none"] = "batch",
) -> Callable[[Any, Sequence[Any]], tuple[list[float], list[float]]]:
    """What `--custom-reward-post-process-path` takes: advantages within `sample.group_index`, weighted per sample.

    Samples without a score (NaN) get the advantage 0 and touch no other. Each sample's supervised weight is left in
    `sample.train_metadata["sft_weight"]`, for a `--loss-type custom_loss`.

    Args:
        weighter: calibrated, or with `calibrate_on_first=True`.
        difficulty: `difficulty(samples) -> [B]`, larger = harder, e.g. `reference_difficulty(...)`.
        scale: as in `iqareward.group_advantages`.

    Returns:
        `post_process(args, samples) -> (raw rewards, advantages)`, lists of floats.

    Raises:
        ValueError: the weighter does not go by difficulty.
    """
    check_signal("adaptive_post_process", weighter)

    def post_process(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
        raw = [sample.get_reward_value(args) for sample in samples]
        advantages = group_advantages(torch.tensor(raw), _groups(samples), scale=scale)
        difficulties = difficulty(samples).to(advantages.values.device)
        weights = weighter(difficulties, active=advantages.active)
        weighter.update(difficulties)
        for sample, sft in zip(samples, weights.sft.tolist(), strict=True):
            sample.train_metadata = {**(sample.train_metadata or {}), "sft_weight": sft}
        return raw, weighted_advantages(advantages.values, weights).tolist()

    return post_process


def reference_difficulty(references: str) -> Callable[[Sequence[Any]], Tensor]:
    """How far each input's images are from their ground truth (as `iqareward.reference_distance`).

    Args:
        references: the key of `sample.metadata` that holds the ground truth.

    Returns:
        `difficulty(samples) -> [B]`.
    """

    def difficulty(samples: Sequence[Any]) -> Tensor:
        truth = to_images(_references(samples, references), value_range=UNIT)
        distances = [rmse(_image(sample)[None], clean[None]) for sample, clean in zip(samples, truth, strict=True)]
        return group_statistics(torch.cat(distances), _groups(samples)).mean

    return difficulty


def _score(judge: Reward, samples: Sequence[Any], references: str | None, device: Any) -> Scores:
    images = to_images([_image(sample) for sample in samples], value_range=UNIT, device=device)
    found = None if references is None else _references(samples, references)
    prompts = [sample.prompt for sample in samples]
    return score(judge, images, value_range=UNIT, references=found, prompts=prompts, on_nan="nan")


def _image(sample: Any) -> Tensor:
    """The one frame `[C, H, W]` of a sample."""
    output = sample.generated_output
    if output.ndim == 4 and output.shape[1] == 1:
        return output[:, 0].float()
    if output.ndim == 3:
        return output.float()
    raise ValueError(
        f"miles: expected `generated_output` as one image [C, 1, H, W], got {list(output.shape)}. "
        "Videos are not supported: score frames of your choice in a function of your own."
    )


def _references(samples: Sequence[Any], key: str) -> list[Any]:
    return column(key, [sample.metadata for sample in samples], who="miles")


def _groups(samples: Sequence[Any]) -> Tensor:
    if any(sample.group_index is None for sample in samples):
        raise ValueError("miles: expected a `group_index` in every sample, got None. It tells the inputs apart.")
    return torch.tensor([sample.group_index for sample in samples], dtype=torch.int64)
