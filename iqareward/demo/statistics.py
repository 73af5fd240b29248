"""How well a score follows the damage."""

import torch
from torch import Tensor


def ranks(values: Tensor) -> Tensor:
    """Position of each value among those of the last axis, 1 = smallest; equal values share their mean position.

    Example:
        >>> ranks(torch.tensor([10.0, 30.0, 10.0]))
        tensor([1.5000, 3.0000, 1.5000], dtype=torch.float64)
    """
    smaller = (values[..., :, None] > values[..., None, :]).sum(-1)
    equal = (values[..., :, None] == values[..., None, :]).sum(-1)
    return smaller + (equal + 1) / torch.tensor(2.0, dtype=torch.float64)


def spearman(scores: Tensor, levels: Tensor) -> Tensor:
    """Spearman's rank correlation of each row of scores with the damage levels, in [-1, 1]; -1 = falls at every step.

    Args:
        scores: `[..., n]`, higher is better.
        levels: `[n]`, larger = more damage.

    Returns:
        `[...]` float64; NaN where a score is missing or all scores are equal, because there is no order to compare.

    Example:
        >>> spearman(torch.tensor([[9.0, 5.0, 1.0], [1.0, 2.0, 2.0]]), torch.arange(3))
        tensor([-1.0000,  0.8660], dtype=torch.float64)

    References:
        C. Spearman, "The proof and measurement of association between two things", 1904,
        https://doi.org/10.2307/1412159
    """
    first = ranks(scores) - (scores.shape[-1] + 1) / 2
    second = ranks(levels) - (levels.shape[-1] + 1) / 2
    correlation = (first * second).sum(-1) / (first.square().sum(-1) * second.square().sum(-1)).sqrt()
    return torch.where(scores.isnan().any(-1), torch.nan, correlation)


def above_original(scores: Tensor) -> Tensor:
    """Whether each damaged picture beats its own original; `[..., n]`, the original first -> `[..., n - 1]` bool."""
    return scores[..., 1:] > scores[..., :1]
