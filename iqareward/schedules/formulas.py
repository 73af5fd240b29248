"""Published weightings, and the constant they must beat, as functions of one row per sample."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from iqareward.groups import check_rows
from iqareward.weighting import LossWeights, mix

# HPT's: (RL, SFT) for 0 to 8 solved of 8 rollouts.
HPT_TABLE = ((0.0, 1.0), (0.0, 1.0), (0.125, 0.5), (0.25, 0.25), (0.5, 0.125), *[(1.0, 0.0)] * 4)
Direction = Literal["hard_to_rl", "hard_to_sft"]
ROUNDING = 1e-3  # of a mean in float16


def constant(
    difficulty: Tensor, *, share: float, active: Tensor | None = None, valid: Tensor | None = None, step: int = 0
) -> LossWeights:
    """The same RL share for every row: `rl = share`, `sft = 1 - share`; 0 is SFT, 1 is pure RL.

    Args:
        difficulty: `[B]`, only for its shape.
        share: of RL, in [0, 1].
        active: as in `AdaptiveWeighter`.
        valid: as in `AdaptiveWeighter`.
        step: not used.

    Returns:
        `LossWeights` of `[B]`.

    Example:
        >>> constant(torch.tensor([0.1, 9.0]), share=0.75).rl
        tensor([0.7500, 0.7500])
    """
    return mix(torch.full_like(check_rows("constant", difficulty), share), active=active, valid=valid)


def cosine(
    difficulty: Tensor,
    *,
    step: int,
    peak: float,
    valley: float,
    warmup_steps: int,
    decay_steps: int,
    active: Tensor | None = None,
    valid: Tensor | None = None,
) -> LossWeights:
    """An SFT share mu over time (CHORD-mu): up to `peak`, then down to `valley` along a half cosine.

    mu = peak * t / warmup_steps for t < warmup_steps, then
    valley + (peak - valley) * (1 + cos(pi * (t - warmup_steps) / decay_steps)) / 2 for decay_steps, then valley.

    Args:
        difficulty: `[B]`, only for its shape.
        step: t, optimiser steps so far.
        peak: largest SFT share.
        valley: last SFT share.
        warmup_steps: steps up to the peak.
        decay_steps: steps from there to the valley.
        active: as in `AdaptiveWeighter`.
        valid: as in `AdaptiveWeighter`.

    Returns:
        `LossWeights` of `[B]`.

    Example:
        >>> options = dict(peak=0.8, valley=0.2, warmup_steps=10, decay_steps=10)
        >>> tuple(round(cosine(torch.zeros(1), step=t, **options).sft.item(), 2) for t in (0, 5, 10, 15, 99))
        (0.0, 0.4, 0.8, 0.5, 0.2)

    References:
        Zhang et al., On-Policy RL Meets Off-Policy Experts: Harmonizing Supervised Fine-Tuning and Reinforcement
        Learning via Dynamic Weighting, 2025, https://arxiv.org/abs/2508.11408
    """
    if step < warmup_steps:
        sft = peak * step / warmup_steps
    else:
        progress = min(1.0, (step - warmup_steps) / max(1, decay_steps))
        sft = valley + (peak - valley) * (1 + math.cos(math.pi * progress)) / 2
    return constant(difficulty, share=1 - sft, active=active, valid=valid)


def gate(
    pass_rate: Tensor,
    *,
    threshold: float = 0.0,
    direction: Direction = "hard_to_sft",
    active: Tensor | None = None,
    valid: Tensor | None = None,
    step: int = 0,
) -> LossWeights:
    """Either RL or SFT (HPT, SuperRL): `rl = 1[P > threshold]`, or `1[P <= threshold]` with "hard_to_rl".

    Args:
        pass_rate: `[B]` share P of an input's rollouts that pass, see `iqareward.difficulty.pass_rate`; NaN gets SFT.
        threshold: 0 for "any passes"; HPT also uses 2/8.
        direction: "hard_to_sft" is HPT's: inputs that never pass get SFT only. "hard_to_rl" is the reverse, which is
            the direction of `AdaptiveWeighter`.
        active: as in `AdaptiveWeighter`.
        valid: as in `AdaptiveWeighter`.
        step: not used.

    Returns:
        `LossWeights` of `[B]`.

    Raises:
        ValueError: a pass rate on the CPU lies outside [0, 1]; on other devices that is not looked at.

    Example:
        >>> gate(torch.tensor([0.0, 0.5])).rl
        tensor([0., 1.])

    References:
        Lv et al., Towards a Unified View of Large Language Model Post-Training, 2025, https://arxiv.org/abs/2509.04419;
        SuperRL, 2025, https://arxiv.org/abs/2506.01096
    """
    rows = _pass_rates("gate", pass_rate)
    passed = rows > threshold if direction == "hard_to_sft" else rows <= threshold
    passed = passed & rows.isfinite()
    return mix(passed.to(rows.dtype), active=active, valid=valid)


def soft_gate(
    pass_rate: Tensor,
    *,
    table: Sequence[tuple[float, float]] = HPT_TABLE,
    direction: Direction = "hard_to_sft",
    active: Tensor | None = None,
    valid: Tensor | None = None,
    step: int = 0,
) -> LossWeights:
    """Weights from a table over the pass rate (HPT's soft form); a row of the table need not sum to 1.

    Args:
        pass_rate: `[B]` in [0, 1]; the nearest entry of the table counts, NaN gets SFT.
        table: (rl, sft) for pass rates from 0 to 1 in equal steps.
        direction: "hard_to_sft" is HPT's: inputs that never pass get SFT only. "hard_to_rl" reads the table from its
            end, which is the direction of `AdaptiveWeighter`.
        active: as in `AdaptiveWeighter`.
        valid: as in `AdaptiveWeighter`.
        step: not used.

    Returns:
        `LossWeights` of `[B]`.

    Raises:
        ValueError: a pass rate on the CPU lies outside [0, 1]; on other devices that is not looked at.

    Example:
        >>> soft_gate(torch.tensor([0.0, 0.375, 1.0])).rl
        tensor([0.0000, 0.2500, 1.0000])

    References:
        Lv et al., Towards a Unified View of Large Language Model Post-Training, 2025, https://arxiv.org/abs/2509.04419
    """
    rows = _pass_rates("soft_gate", pass_rate)
    place = ((rows if direction == "hard_to_sft" else 1 - rows) * (len(table) - 1)).round()
    place = place.nan_to_num(nan=0.0).clamp(0, len(table) - 1)
    rl, sft = torch.zeros_like(rows), torch.zeros_like(rows)
    for entry, (rl_weight, sft_weight) in enumerate(table):  # a tensor of the table would make the host wait
        rl, sft = torch.where(place == entry, rl_weight, rl), torch.where(place == entry, sft_weight, sft)
    trainable = rows.isfinite() if active is None else rows.isfinite() & active
    rl, sft = torch.where(trainable, rl, 0.0), torch.where(trainable, sft, 1.0)
    return LossWeights(rl, sft) if valid is None else LossWeights(rl * valid, sft * valid)


def logistic_success(
    pass_rate: Tensor,
    *,
    advantages: Tensor | None = None,
    low: float = 0.4,
    high: float = 1.5,
    centre: float = 0.75,
    slope: float = 10.0,
    sft: float = 0.0,
    active: Tensor | None = None,
    valid: Tensor | None = None,
    step: int = 0,
) -> LossWeights:
    """A factor on advantages that is larger where less succeeds (GRPO-LEAD), beside a constant SFT weight.

    rl = low + (high - low) / (1 + exp(slope * (P - centre))), with 1 - P for rows whose advantage is negative.

    Args:
        pass_rate: `[B]` in [0, 1]; NaN gets rl = 0.
        advantages: `[B]`, only for their sign; without them every row counts as positive, as in
            `DifficultyAdaptiveTrainer`, which weighs inputs and not rollouts.
        low: factor of inputs that always succeed.
        high: factor of inputs that never do.
        centre: pass rate of the middle.
        slope: steepness.
        sft: weight of SFT in every row; 0 as published.
        active: as in `AdaptiveWeighter`.
        valid: as in `AdaptiveWeighter`.
        step: not used.

    Returns:
        `LossWeights` of `[B]`.

    Raises:
        ValueError: a pass rate on the CPU lies outside [0, 1]; on other devices that is not looked at.

    Example:
        >>> logistic_success(torch.tensor([0.0, 0.75, 1.0])).rl
        tensor([1.4994, 0.9500, 0.4834])

    References:
        Zhang and Zuo, GRPO-LEAD: A Difficulty-Aware Reinforcement Learning Approach for Concise Mathematical Reasoning
        in Language Models, 2025, https://arxiv.org/abs/2504.09696
    """
    rows = _pass_rates("logistic_success", pass_rate)
    position = rows if advantages is None else torch.where(advantages < 0, 1 - rows, rows)
    factor = low + (high - low) * torch.sigmoid(-slope * (position - centre))
    return _beside_sft(torch.where(rows.isfinite(), factor, 0.0), sft, active, valid)


def softmax_batch(
    difficulty: Tensor,
    *,
    temperature: float = 2.0,
    sft: float = 0.0,
    active: Tensor | None = None,
    valid: Tensor | None = None,
    step: int = 0,
) -> LossWeights:
    """A factor of mean 1 that is larger for rows harder than the rest of their batch (as DGPO), beside constant SFT.

    rl = N * softmax(log d / temperature) over the N rows that are active, valid and usable; 0 in the others. DGPO takes
    the softmax of the negative mean reward instead of log d.

    Args:
        difficulty: `[B]` >= 0.
        temperature: the larger, the more alike.
        sft: weight of SFT in every row; 0 as published.
        active: as in `AdaptiveWeighter`; hopeless rows are not weighted up.
        valid: as in `AdaptiveWeighter`.
        step: not used.

    Returns:
        `LossWeights` of `[B]`.

    Example:
        >>> softmax_batch(torch.tensor([0.1, 0.9]), temperature=1.0).rl
        tensor([0.2000, 1.8000])

    References:
        Dai et al., Harder Is Better: Boosting Mathematical Reasoning via Difficulty-Aware GRPO and Multi-Aspect
        Question Reformulation, 2026, https://arxiv.org/abs/2601.20614
    """
    rows = check_rows("softmax_batch", difficulty)
    logits = rows.log() / temperature
    counted = logits.isfinite()
    for mask in (active, valid):
        counted = counted if mask is None else counted & mask
    share = torch.softmax(torch.where(counted, logits, -torch.inf), dim=0).nan_to_num(nan=0.0)
    return _beside_sft(share * counted.sum(), sft, active, valid)


def _pass_rates(caller: str, pass_rate: Tensor) -> Tensor:
    """`check_rows`, and no distances; on other devices a check of values would wait."""
    rows = check_rows(caller, pass_rate)
    outside = (rows - 0.5).abs() > 0.5 + ROUNDING
    if rows.device.type == "cpu" and outside.any():
        raise ValueError(
            f"{caller} expected `pass_rate` in [0, 1], small = hard, got {rows[outside][:5].tolist()}. Make pass rates "
            "of distances with iqareward.difficulty.pass_rate(-distances, groups, threshold=-pass_distance)."
        )
    return rows


def _beside_sft(rl: Tensor, sft: float, active: Tensor | None, valid: Tensor | None) -> LossWeights:
    rl = rl if active is None else rl * active
    weights = LossWeights(rl, torch.full_like(rl, sft))
    return weights if valid is None else LossWeights(rl * valid, weights.sft * valid)
