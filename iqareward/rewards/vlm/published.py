"""Published vision-language scorers by name: which weights, which prompt, which read-out."""

import torch

from iqareward.rewards.vlm.level import LevelReward, Scale
from iqareward.rewards.vlm.presets import (
    Q_INSIGHT,
    Q_INSIGHT_MODEL,
    Q_INSIGHT_SUBFOLDER,
    Q_REALIGN,
    Q_REALIGN_MODELS,
    VISUALQUALITY_R1,
    VISUALQUALITY_R1_MODEL,
    ZERO_SHOT_LEVELS,
    Size,
    Task,
)
from iqareward.rewards.vlm.rating import RatingReward
from iqareward.rewards.vlm.scorer import Source


def QReAlignReward(
    size: Size = "mini",
    task: Task = "quality",
    scale: Scale = "unit",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
    batch_size: int = 8,
    *,
    model: Source | None = None,
) -> LevelReward:
    """Q-ReAlign: Qwen3.5 trained to rate quality or aesthetics with Q-Align's level words.

    Args:
        size: `"mini"` (0.8B parameters), `"lite"` (4B) or `"pro"` (9B).
        task: what is rated.
        scale: as in `LevelReward`, like all that follows.
        device: where the model runs.
        dtype: of the weights.
        differentiable: keep the graph to the pixels.
        batch_size: images per run of the network.
        model: None = the published weights of that size; a folder, or a pair (model, processor).

    Returns:
        A `LevelReward`: `[B]` float32, higher is better, NaN = not scored. Nothing is loaded before the first call.

    Example:
        >>> QReAlignReward(size="lite", task="aesthetics").name
        'qrealign_lite_aesthetics'
    """
    if size not in Q_REALIGN_MODELS or task not in Q_REALIGN:
        raise ValueError(
            f"QReAlignReward expected size {sorted(Q_REALIGN_MODELS)} and task {sorted(Q_REALIGN)}, "
            f"got {size!r} and {task!r}."
        )
    source = Q_REALIGN_MODELS[size] if model is None else model
    name = f"qrealign_{size}_{task}"
    return LevelReward(source, Q_REALIGN[task], scale, device, dtype, differentiable, batch_size, name=name)


def VisualQualityR1Reward(
    scale: Scale = "unit",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
    batch_size: int = 8,
    *,
    model: Source = VISUALQUALITY_R1_MODEL,
) -> RatingReward:
    """VisualQuality-R1: Qwen2.5-VL-7B trained by ranking to rate quality from 1 to 5, as an expectation over digits.

    Its published protocol is `RatingReward(model, VISUALQUALITY_R1, mode="generate")`.

    Args:
        scale: as in `RatingReward`, like all that follows.
        device: where the model runs.
        dtype: of the weights.
        differentiable: keep the graph to the pixels.
        batch_size: images per run of the network.
        model: the published weights; a folder, or a pair (model, processor).

    Returns:
        A `RatingReward`: `[B]` float32, higher is better, NaN = not scored. Nothing is loaded before the first call.

    Example:
        >>> VisualQualityR1Reward(scale="mos").bounds
        (1.0, 5.0)

    References:
        Wu et al., "VisualQuality-R1: Reasoning-Induced Image Quality Assessment via Reinforcement Learning to Rank",
        2025, https://arxiv.org/abs/2505.14460
    """
    name = "visualquality_r1"
    return RatingReward(model, VISUALQUALITY_R1, scale, device, dtype, differentiable, batch_size, name=name)


def QInsightReward(
    scale: Scale = "unit",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
    batch_size: int = 8,
    *,
    model: Source = f"{Q_INSIGHT_MODEL}/{Q_INSIGHT_SUBFOLDER}",
) -> RatingReward:
    """Q-Insight: Qwen2.5-VL-7B trained to reason about quality and rate it from 1 to 5, as an expectation over digits.

    It was trained to think first, which this does not wait for: look at `reading(images).digit_mass` before you trust
    it. Its published protocol is `RatingReward(model, Q_INSIGHT, mode="generate", thinking=True)`.

    Args:
        scale: as in `RatingReward`, like all that follows.
        device: where the model runs.
        dtype: of the weights.
        differentiable: keep the graph to the pixels.
        batch_size: images per run of the network.
        model: the published weights; a folder, or a pair (model, processor).

    Returns:
        A `RatingReward`: `[B]` float32, higher is better, NaN = not scored. Nothing is loaded before the first call.

    Example:
        >>> QInsightReward().name
        'qinsight'

    References:
        Li et al., "Q-Insight: Understanding Image Quality via Visual Reinforcement Learning", 2025,
        https://arxiv.org/abs/2503.22679
    """
    return RatingReward(model, Q_INSIGHT, scale, device, dtype, differentiable, batch_size, name="qinsight")


def zero_shot_level_reward(
    model: Source,
    scale: Scale = "unit",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    differentiable: bool = False,
    batch_size: int = 8,
) -> LevelReward:
    """Q-Align's question to a general model that was never trained on it.

    Args:
        model: hub id, folder, or pair (model, processor), as in `LevelReward`, like all that follows.
        scale: of the score.
        device: where the model runs.
        dtype: of the weights.
        differentiable: keep the graph to the pixels.
        batch_size: images per run of the network.

    Returns:
        A `LevelReward`: `[B]` float32, higher is better, NaN = not scored. Nothing is loaded before the first call.

    Example:
        >>> zero_shot_level_reward("Qwen/Qwen3-VL-2B-Instruct").name
        'zero_shot_level'
    """
    return LevelReward(
        model, ZERO_SHOT_LEVELS, scale, device, dtype, differentiable, batch_size, name="zero_shot_level"
    )
