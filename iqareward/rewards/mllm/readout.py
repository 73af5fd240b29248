"""From logits of level words to numbers."""

from typing import NamedTuple

import torch
from torch import Tensor

# worth of excellent, good, fair, poor, bad
SCALES: dict[str, tuple[float, ...]] = {
    "unit": (1.0, 0.75, 0.5, 0.25, 0.0),
    "mos": (5.0, 4.0, 3.0, 2.0, 1.0),
    "flow_grpo": (1.0, 0.8, 0.6, 0.4, 0.2),  # Flow-GRPO's reward server divides [1, 5] by 5
}


class LevelDistribution(NamedTuple):
    """How a model spreads its belief over the levels of each image.

    Attributes:
        probabilities: `[B, 5]` of excellent, good, fair, poor, bad.
        mean: `[B]` expected level in [1, 5].
        std: `[B]` standard deviation of the level: how unsure the model is, in [0, 2].
    """

    probabilities: Tensor
    mean: Tensor
    std: Tensor


def expected_level(logits: Tensor, worth: tuple[float, ...]) -> Tensor:
    """Mean worth under the softmax of level logits `[..., 5]`, in float32: half precision would tie close scores."""
    return _mean(logits.softmax(dim=-1), worth)


def level_distribution(logits: Tensor) -> LevelDistribution:
    """Probabilities, mean and standard deviation of level logits `[B, 5]`."""
    probabilities = logits.softmax(dim=-1)
    mean = _mean(probabilities, SCALES["mos"])
    spread = [p * (level - mean).square() for p, level in zip(probabilities.unbind(-1), SCALES["mos"], strict=True)]
    return LevelDistribution(probabilities, mean, torch.stack(spread).sum(0).sqrt())


def _mean(probabilities: Tensor, worth: tuple[float, ...]) -> Tensor:
    # Numbers stay on the host: a tensor of weights would be copied to the device at every call.
    return torch.stack([p * w for p, w in zip(probabilities.unbind(-1), worth, strict=True)]).sum(0)
