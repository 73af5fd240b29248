"""Scores from the logits of a set of tokens, for rewards whose answer is a word or a digit."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iqareward._gradients import root

# scores of excellent, good, fair, poor, bad
SCALES: dict[str, tuple[float, ...]] = {
    "unit": (1.0, 0.75, 0.5, 0.25, 0.0),
    "mos": (5.0, 4.0, 3.0, 2.0, 1.0),
    "flow_grpo": (1.0, 0.8, 0.6, 0.4, 0.2),  # Flow-GRPO's reward server divides [1, 5] by 5
}


class LevelDistribution(NamedTuple):
    """The probability of each level for each image, with its mean and standard deviation.

    Attributes:
        probabilities: `[B, levels]`, best level first; for Q-Align and DeQA excellent, good, fair, poor, bad.
        mean: `[B]` expected level in [1, 5].
        std: `[B]` standard deviation of the level in [0, 2]; large where the model is unsure.
    """

    probabilities: Tensor
    mean: Tensor
    std: Tensor


def token_logits(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits `[..., K]` of tokens `ids` among `[..., vocabulary]`, and the probability `[...]` that they hold."""
    logits = logits.float()
    chosen = logits.index_select(-1, ids)
    return chosen, (chosen.logsumexp(-1) - logits.logsumexp(-1)).exp()


def expected_value(logits: Tensor, worth: Sequence[float | Tensor]) -> Tensor:
    """Mean worth under the softmax of logits, in float32: half precision would tie close scores.

    Args:
        logits: `[..., K]` float32.
        worth: The value of each of the K tokens: a number, or a tensor `[...]` where it differs from row to row.

    Returns:
        `[...]` float32.
    """
    return _mean(logits.softmax(dim=-1), worth)


def level_distribution(logits: Tensor, worth: Sequence[float] = SCALES["mos"]) -> LevelDistribution:
    """Probabilities, mean and standard deviation of level logits `[B, K]`."""
    probabilities = logits.softmax(dim=-1)
    mean = _mean(probabilities, worth)
    spread = [p * (level - mean).square() for p, level in zip(probabilities.unbind(-1), worth, strict=True)]
    return LevelDistribution(probabilities, mean, root(torch.stack(spread).sum(0)))


def _mean(probabilities: Tensor, worth: Sequence[float | Tensor]) -> Tensor:
    # Numbers stay on the host: a tensor of weights would be copied to the device at every call.
    return torch.stack([p * w for p, w in zip(probabilities.unbind(-1), worth, strict=True)]).sum(0)
