"""What the weights do: two losses into one, and the forms in which other people's trainers take a weight per sample."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from iqareward.types import Groups


class LossWeights(NamedTuple):
    """What each row's two losses are multiplied with: `rl` and `sft`, both `[B]`, detached, never NaN."""

    rl: Tensor
    sft: Tensor


class Weighter(Protocol):
    """What a training loop needs of a weighting; `AdaptiveWeighter` and all of `iqareward.schedules` provide it."""

    def __call__(
        self,
        difficulty: Tensor,
        *,
        bucket: Groups | None = None,
        active: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> LossWeights:
        """Weights of the rows of one step."""
        ...

    def update(self, difficulty: Tensor, bucket: Groups | None = None) -> None:
        """Learn from one optimiser step, after its weights were used."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to continue exactly."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`."""
        ...


def mix(
    share: Tensor, *, active: Tensor | None = None, valid: Tensor | None = None, additive: bool = False
) -> LossWeights:
    """Turn an RL share w into two weights, `rl = w` and `sft = 1 - w`, with SFT only where RL has no signal.

    Args:
        share: `[B]` in [0, 1].
        active: `[B]` bool; False where the input's rewards have no spread.
        valid: `[B]` bool; False where a row takes no part in the loss at all, e.g. padding.
        additive: `rl = 1` and `sft = 1 - w` instead.

    Returns:
        `LossWeights`; rows that are not valid have both weights 0.

    Example:
        >>> mix(torch.tensor([0.75, 0.75]), active=torch.tensor([True, False])).sft
        tensor([0.2500, 1.0000])
    """
    share = share if active is None else share * active
    rl, sft = share, 1 - share
    if additive:
        rl = torch.ones_like(share) if active is None else active.to(share.dtype)
    return LossWeights(rl, sft) if valid is None else LossWeights(rl * valid, sft * valid)
