"""From logits of a set of tokens to numbers: the read-out of every reward whose answer is a word or a digit."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from iqareward._gradients import root

# worth of excellent, good, fair, poor, bad
SCALES: dict[str, tuple[float, ...]] = {
    "unit": (1.0, 0.75, 0.5, 0.25, 0.0),
    "mos": (5.0, 4.0, 3.0, 2.0, 1.0),
    "flow_grpo": (1.0, 0.8, 0.6, 0.4, 0.2),  # Flow-GRPO's reward server divides [1, 5] by 5
}


class LevelDistribution(NamedTuple):
    """How a model spreads its belief over the levels of each image.

    Attributes:
        probabilities: `[B, levels]`, best level first; for Q-Align and DeQA excellent, good, fair, poor, bad.
        mean: `[B]` expected level in [1, 5].
        std: `[B]` standard deviation of the level: how unsure the model is, in [0, 2].
    """

    probabilities: Tensor
    mean: Tensor
    std: Tensor


class TokenLogits(NamedTuple):
    """What a model says about a set of tokens as the next one.

    Attributes:
        logits: `[..., K]` float32 of the tokens of the set.
        mass: `[...]` float32 probability that the next token is one of them, of the whole vocabulary.
    """

    logits: Tensor
    mass: Tensor


def token_logits(logits: Tensor, ids: Tensor) -> TokenLogits:
    """Pick the columns of a set of tokens, and say how much of the next token's probability they hold.

    Args:
        logits: `[..., vocabulary]` of one position.
        ids: `[K]` token ids, on the device of `logits`.
    """
    logits = logits.float()
    chosen = logits.index_select(-1, ids)
    return TokenLogits(chosen, (chosen.logsumexp(-1) - logits.logsumexp(-1)).exp())


def expected_value(logits: Tensor, worth: Sequence[float | Tensor]) -> Tensor:
    """Mean worth under the softmax of logits, in float32: half precision would tie close scores.

    Args:
        logits: `[..., K]` float32.
        worth: of each of the K tokens: a number, or a tensor `[...]` where it differs from row to row.

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
