"""Rewards for verl-omni, which scores one image per call, and for verl, where text leads to images.

verl-omni's sum of `reward_functions` turns every exception into the reward 0, unless the YAML says `required: true`
beside the function. Reward workers are Ray actors, and each holds its own copy of the reward. In verl-omni
`reward.accelerator_workers.enabled=true` gives each a GPU; otherwise they see none or all, depending on Ray's version.
"""

import asyncio
import inspect
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from iqareward.adapters._core import OnNan, Scorer
from iqareward.rewards.batching import MicroBatched
from iqareward.rewards.catalog import text_of
from iqareward.rewards.specs import Spec
from iqareward.types import Images, Reward

__all__ = ["compute_score"]


async def compute_score(
    data_source: Any = None,
    solution_image: Any = None,
    ground_truth: Any = None,
    extra_info: Mapping[str, Any] | None = None,
    *,
    solution_str: str | None = None,
    reward: Spec | Reward,
    decode: Callable[[str, Mapping[str, Any]], Any] | None = None,
    references: str | None = None,
    inputs: str | None = None,
    on_nan: OnNan = "raise",
    no_image: float | None = None,
    device: str | None = None,
    max_batch: int = 32,
    max_wait_ms: float = 5.0,
    **ignored: Any,
) -> dict[str, float]:
    """Score one sample; calls that are under way in the same process are scored together.

    Args:
        data_source: Not used.
        solution_image: uint8 `[3, H, W]`, from verl-omni. Latents (`output_type: latent`) and videos are refused.
        ground_truth: The path of the reference, with `references="ground_truth"`; the prompt, for rewards that need it.
        extra_info: The metadata of the dataset's row.
        solution_str: The completion, from verl's reward managers `naive`, `dapo` and `gdpo`.
        reward: A name or sum of the catalogue.
        decode: `decode(solution_str, extra_info)` returns the image of a completion, or None if it led to none. A plain
            function runs in a thread; an `async` one is awaited.
        references: `"ground_truth"`, or the key of `extra_info` that holds the ground truth (path, PIL image, array or
            uint8 tensor).
        inputs: The key of `extra_info` that holds the degraded image, for rewards that need it.
        on_nan: What an image without a score becomes: "raise" or a number.
        no_image: The reward of a completion that led to no image, best below all scores; None treats it as not scored.
        device: Where images are scored, and where weights live.
        max_batch: Largest number of images that are scored together.
        max_wait_ms: How long a free worker waits for more calls, or a fifth of its last batch's time if longer.
        ignored: Whatever else verl passes.

    Returns:
        `{"score": float, NAME: float}`: the score twice, the second time under the name of the reward, which is logged.

    Raises:
        ValueError: The sample was not scored, is not a uint8 image, or is text and `decode` is missing.
        RuntimeError: `device` is CUDA and this worker sees none.

    Example:
        >>> image = torch.arange(3 * 16 * 16, dtype=torch.uint8).reshape(3, 16, 16)
        >>> call = {"solution_image": image, "ground_truth": "", "extra_info": {"clean": image}}
        >>> asyncio.run(compute_score(**call, reward="ssim", references="clean"))
        {'score': 1.0, 'ssim': 1.0}
    """
    spec = reward if callable(reward) else text_of(reward)  # a mapping cannot be a key
    scorer, batched = _batched(spec, references, inputs, on_nan, device, max_batch, max_wait_ms)
    row = extra_info or {}
    if solution_str is None:
        image = scorer.images(_pixels(solution_image))
    else:
        image = await _decoded(decode, solution_str, row, scorer)
    if image is None:
        scores = torch.tensor([torch.nan if no_image is None else no_image])
    else:
        columns = scorer.columns(row, ground_truth=ground_truth)
        for name, found in columns.items():
            if found is not None:  # read in a thread, because a file must not stop the event loop
                columns[name] = await asyncio.to_thread(scorer.images, found, image[0].device)
        prompts = [str(ground_truth)] if batched.needs_prompts else None
        scores = await batched.ascore(image, prompts=prompts, **columns)
    score = scorer.with_policy(scores).item()
    return {"score": score, batched.name: score}


async def _decoded(
    decode: Callable[[str, Mapping[str, Any]], Any] | None, text: str, row: Mapping[str, Any], scorer: Scorer
) -> Images | None:
    if decode is None:
        raise ValueError(
            "compute_score expected `decode`, because verl passes a completion (`solution_str`) and no image. Write a "
            "function in a file of yours that calls compute_score(**call, decode=..., reward=...), and name that file."
        )
    made = decode(text, row) if inspect.iscoroutinefunction(decode) else asyncio.to_thread(decode, text, row)
    if (found := await made) is None:
        return None
    image = await asyncio.to_thread(scorer.images, found)
    if len(image) != 1:
        raise ValueError(f"compute_score expected one image from `decode`, or None, got {len(image)}.")
    return image


@lru_cache(maxsize=64)
def _batched(
    reward: Spec | Reward,
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
            f"verl: the reward was told to use {device!r}, and this process sees no GPU. In verl-omni, "
            "reward.accelerator_workers.enabled=true gives each reward worker one. Elsewhere export "
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0 before Ray starts, because older versions hide the GPUs from actors "
            "with num_gpus=0, or score on the CPU with device: cpu."
        )
    return device


def _pixels(image: Any) -> Tensor:
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
        got = f"{image.dtype} {list(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(
            f"compute_score expected `solution_image` as one uint8 image [3, H, W], got {got}. "
            "Set output_type: image in the rollout's pipeline; latents and videos are not supported."
        )
    return image
