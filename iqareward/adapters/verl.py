"""Rewards for verl-omni, which scores one image at a time, and for verl's batch reward manager.

- Read: verl-project/verl-omni a1139ba (2026-08), volcengine/verl b178a3c (2026-01).
- Range: uint8 `[3, H, W]` on the CPU. Latents (`output_type: latent`) and videos are refused.
- References: a path in `ground_truth` (`references: ground_truth`) or under a key of `extra_info`; verl-omni does not
  forward condition images yet.
- Failure: `on_nan: raise`, and `required: true` beside it: without that verl-omni turns every exception into the reward
  0. A number on request; "mean" and "worst" only in `batch_score_function`. NaN would pass on to the advantages.

```yaml
reward:
  reward_functions:
    quality:
      path: pkg://iqareward.adapters.verl
      name: compute_score
      weight: 1.0
      required: true
      reward: "0.7*haarpsi + 0.3*ssim"   # ours from here on
      references: gt_path
      max_batch: 16
```

With a single function the same keys go under `reward.custom_reward_function.reward_kwargs`.

Reward workers are Ray actors without a GPU, in which CUDA is hidden. Pass `device: cuda` for rewards with weights, so
that they do not end on the CPU unnoticed, and export `RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0` before Ray starts.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from iqareward.adapters._values import OnNan, check_on_nan, find_reward, score, settle
from iqareward.images import ImageLike, to_images
from iqareward.rewards.batching import MicroBatched
from iqareward.rewards.loading import ImageDevice
from iqareward.types import Reward
from iqareward.weighting import LossWeights

GROUND_TRUTH = "ground_truth"


async def compute_score(
    data_source: Any = None,
    solution_image: Any = None,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    reward: str | Reward,
    references: str | None = None,
    on_nan: OnNan = "raise",
    device: str | None = None,
    max_batch: int = 32,
    max_wait_ms: float = 5.0,
    **ignored: Any,
) -> dict[str, float]:
    """The score of one image; calls that are under way in the same process are scored together.

    Args:
        data_source: not used.
        solution_image: uint8 `[3, H, W]`.
        ground_truth: the path of the reference, with `references="ground_truth"`; the prompt, for rewards with prompts.
        extra_info: of the dataset's row.
        reward: name or sum of the catalogue.
        references: `"ground_truth"`, or the key of `extra_info` that holds the reference (path, PIL image, array or
            uint8 tensor).
        on_nan: what an image without a score becomes: "raise" (default) or a number.
        device: where images are scored, and where weights live.
        max_batch: images that are scored together at most.
        max_wait_ms: how long a free worker waits for more calls, or a fifth of its last batch's time if longer.
        ignored: whatever else verl passes.

    Returns:
        `{"score": float}`.

    Raises:
        ValueError: the image was not scored, or is no uint8 image.
        RuntimeError: `device` is CUDA and this worker sees none.

    Example:
        >>> image = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)
        >>> call = {"solution_image": image, "ground_truth": "", "extra_info": {"clean": image}}
        >>> asyncio.run(compute_score(**call, reward="ssim", references="clean"))
        {'score': 1.0}
    """
    check_on_nan(on_nan, allowed=("raise",), who="compute_score")
    judge = _batched(reward, references, device, max_batch, max_wait_ms)
    image = to_images(_one_image(solution_image), device=device)
    found = None
    if references is not None:  # reading a file must not stop the loop
        truth = _reference(references, ground_truth, extra_info)
        found = await asyncio.to_thread(to_images, truth, device=image[0].device)  # another thread's "cuda" is GPU 0
    prompts = [str(ground_truth)] if judge.needs_prompts else None
    scores = await judge.ascore(image, references=found, prompts=prompts)
    return {"score": settle(scores, on_nan, name=judge.name).item()}


def batch_score_function(
    decode: Callable[..., Sequence[ImageLike | None]],
    reward: str | Reward,
    *,
    references: str | None = None,
    on_nan: OnNan = "raise",
    no_image: float | None = None,
    device: str | None = None,
) -> Callable[..., list[float]]:
    """A plain `compute_score` for verl's batch reward manager, whose completions are text that leads to images.

    Args:
        decode: `decode(solution_strs, extra_infos)`: the image of each completion, None where it led to none.
        reward: name or sum of the catalogue, or a reward.
        references: `"ground_truth"`, or the key of `extra_info` that holds the reference.
        on_nan: what an image without a score becomes: "raise" (default: training stops), "mean" or "worst" of the
            batch, a number.
        no_image: what a completion earns that led to no image, best below all scores; None treats it as not scored.
        device: where images are scored, and where weights live.

    Returns:
        `compute_score(data_sources, solution_strs, ground_truths, extra_infos)`, one float per completion.

    Example:
        >>> def decode(solution_strs, extra_infos):
        ...     return [info["clean"] if text == "keep" else None for text, info in zip(solution_strs, extra_infos)]
        >>> compute_score = batch_score_function(decode, "ssim", references="clean", no_image=-1.0)
        >>> info = {"clean": torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)}
        >>> compute_score(["", ""], ["keep", "nonsense"], ["", ""], [info, info])
        [1.0, -1.0]
    """
    check_on_nan(on_nan, allowed=("raise", "mean", "worst"), who="batch_score_function")
    judge = find_reward(reward, who="batch_score_function", references=references, device=_visible(device))
    where = ImageDevice(device, name="batch_score_function")

    def compute_score(
        data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any, **ignored: Any
    ) -> list[float]:
        images = decode(solution_strs, extra_infos)
        rows = [row for row, image in enumerate(images) if image is not None]
        scores = torch.full((len(images),), torch.nan if no_image is None else no_image)
        if rows:
            found = None
            if references is not None:
                found = [_reference(references, ground_truths[row], extra_infos[row]) for row in rows]
            some = to_images([images[row] for row in rows], value_range=(0.0, 1.0), device=where.get())
            prompts = [str(ground_truths[row]) for row in rows]
            scores[rows] = score(
                judge, some, value_range=(0.0, 1.0), references=found, prompts=prompts, on_nan="nan"
            ).cpu()
        return settle(scores, on_nan, name=judge.name).tolist()

    return compute_score


def rollout_is_weights(weights: LossWeights) -> Tensor:
    """What verl-omni takes as `data["rollout_is_weights"]`: `(B,)` float32, multiplies each sample's policy loss.

    It works in its flow_grpo, flow_dppo and grpo_guard losses. Its DiffusionNFT loss takes `reward_prob` instead, which
    is `iqareward.weighting.optimality_probability`. There is no place for the supervised half but a loss of your own
    (`@register_diffusion_loss`).

    Args:
        weights: from a weighter, for the B samples.

    Example:
        >>> rollout_is_weights(LossWeights(rl=torch.tensor([1.0, 0.5]), sft=torch.tensor([0.0, 0.5])))
        tensor([1.0000, 0.5000])
    """
    return weights.rl.float()


@lru_cache(maxsize=64)
def _batched(
    reward: str | Reward, references: str | None, device: str | None, max_batch: int, max_wait_ms: float
) -> MicroBatched:
    """One reward and one queue per set of settings, for all coroutines and threads of a process."""
    judge = find_reward(reward, who="compute_score", references=references, device=_visible(device))
    return MicroBatched(judge, max_batch=max_batch, max_wait_ms=max_wait_ms)


def _visible(device: str | None) -> str | None:
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            f"verl: the reward was told to use {device!r}, and this process sees no GPU. verl's reward workers are Ray "
            "actors with num_gpus=0, from which Ray hides CUDA: export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 before Ray "
            "starts, or score on the CPU with device: cpu."
        )
    return device


def _one_image(image: Any) -> Tensor:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"compute_score expected `solution_image` as one uint8 image [3, H, W], got {got}. "
            "Set output_type: image in the rollout's pipeline; latents and videos are not supported."
        )
    return image


def _reference(source: str, ground_truth: Any, extra_info: Mapping[str, Any] | None) -> Any:
    if source == GROUND_TRUTH:
        return ground_truth
    info = extra_info or {}
    if source not in info:
        raise ValueError(f"compute_score expected {source!r} in extra_info, got keys {sorted(info)}.")
    return info[source]
