"""Rewards for verl-omni, which scores one image per call, and for verl's batch reward manager.

verl-omni turns every exception into the reward 0 unless its YAML says `required: true` beside the function. Its reward
workers are Ray actors without a GPU, from which Ray hides CUDA: pass `device: cuda` for rewards with weights, and
export `RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0` before Ray starts.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from iqareward.adapters._core import OnNan, Scorer
from iqareward.images import ImageLike
from iqareward.rewards.batching import MicroBatched
from iqareward.types import Reward

__all__ = ["batch_score_function", "compute_score"]


async def compute_score(
    data_source: Any = None,
    solution_image: Any = None,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    reward: str | Reward,
    references: str | None = None,
    inputs: str | None = None,
    on_nan: OnNan = "raise",
    device: str | None = None,
    max_batch: int = 32,
    max_wait_ms: float = 5.0,
    **ignored: Any,
) -> dict[str, float]:
    """Score one image; calls that are under way in the same process are scored together.

    Args:
        data_source: Not used.
        solution_image: uint8 `[3, H, W]`. Latents (`output_type: latent`) and videos are refused.
        ground_truth: The path of the reference, with `references="ground_truth"`; the prompt, for rewards that need it.
        extra_info: The metadata of the dataset's row.
        reward: A name or sum of the catalogue.
        references: `"ground_truth"`, or the key of `extra_info` that holds the ground truth (path, PIL image, array or
            uint8 tensor).
        inputs: The key of `extra_info` that holds the degraded image, for rewards that need it.
        on_nan: What an image without a score becomes: "raise" or a number.
        device: Where images are scored, and where weights live.
        max_batch: Largest number of images that are scored together.
        max_wait_ms: How long a free worker waits for more calls, or a fifth of its last batch's time if longer.
        ignored: Whatever else verl passes.

    Returns:
        `{"score": float}`.

    Raises:
        ValueError: The image was not scored, or is not a uint8 image.
        RuntimeError: `device` is CUDA and this worker sees none.

    Example:
        >>> image = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)
        >>> call = {"solution_image": image, "ground_truth": "", "extra_info": {"clean": image}}
        >>> asyncio.run(compute_score(**call, reward="ssim", references="clean"))
        {'score': 1.0}
    """
    scorer, batched = _batched(reward, references, inputs, on_nan, device, max_batch, max_wait_ms)
    image = scorer.images(_one_image(solution_image))
    columns = scorer.columns(extra_info or {}, ground_truth=ground_truth)
    for name, found in columns.items():
        if found is not None:  # read in a thread, because a file must not stop the event loop
            columns[name] = await asyncio.to_thread(scorer.images, found, image[0].device)
    prompts = [str(ground_truth)] if batched.needs_prompts else None
    return {"score": scorer.with_policy(await batched.ascore(image, prompts=prompts, **columns)).item()}


def batch_score_function(
    decode: Callable[..., Sequence[ImageLike | None]],
    reward: str | Reward,
    *,
    references: str | None = None,
    inputs: str | None = None,
    on_nan: OnNan = "raise",
    no_image: float | None = None,
    device: str | None = None,
) -> Callable[..., list[float]]:
    """A plain `compute_score` for verl's batch reward manager, whose completions are text that leads to images.

    Args:
        decode: `decode(solution_strs, extra_infos)` returns the image of each completion, None where it led to none.
        reward: A name or sum of the catalogue, or any reward.
        references: `"ground_truth"`, or the key of `extra_info` that holds the ground truth.
        inputs: The key of `extra_info` that holds the degraded image, for rewards that need it.
        on_nan: What an image without a score becomes: "raise" (training stops), "mean" or "worst" of the batch, or a
            number.
        no_image: The reward of a completion that led to no image, best below all scores; None treats it as not scored.
        device: Where images are scored, and where weights live.

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
    scorer = Scorer(
        reward,
        who="batch_score_function",
        sources={"references": references, "inputs": inputs},
        on_nan=on_nan,
        device=_visible(device),
        moves_images=True,
    )

    def compute_score(
        data_sources: Any, solution_strs: Any, ground_truths: Any, extra_infos: Any, **ignored: Any
    ) -> list[float]:
        columns = scorer.columns(extra_infos, ground_truth=ground_truths)
        columns["prompts"] = [str(text) for text in ground_truths]
        images = list(decode(solution_strs, extra_infos))
        return scorer(images, no_image=torch.nan if no_image is None else no_image, **columns).tolist()

    return compute_score


@lru_cache(maxsize=64)
def _batched(
    reward: str | Reward,
    references: str | None,
    inputs: str | None,
    on_nan: OnNan,
    device: str | None,
    max_batch: int,
    max_wait_ms: float,
) -> tuple[Scorer, MicroBatched]:
    """One reward and one queue for each set of settings, for all coroutines and threads of a process."""
    scorer = Scorer(
        reward,
        who="compute_score",
        sources={"references": references, "inputs": inputs},
        on_nan=on_nan,
        policies=("raise",),
        device=_visible(device),
        moves_images=True,
    )
    return scorer, MicroBatched(scorer.reward, max_batch=max_batch, max_wait_ms=max_wait_ms)


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
