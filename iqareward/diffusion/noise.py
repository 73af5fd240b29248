"""Random numbers from a seed and an input's id alone: the same in any batch, on any process, after a resume."""

from collections.abc import Sequence

import numpy
import torch
from torch import Tensor


def generator(seed: int, *path: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator of its own for every `path` of integers under a seed.

    Args:
        seed: non-negative.
        path: non-negative integers, e.g. the id of an input and the number of a step.
        device: where its numbers are drawn; CPU and GPU draw different ones.

    Example:
        >>> a, b = (torch.randn(1, generator=generator(0, 7, step)) for step in (1, 2))
        >>> bool(a == b)
        False
    """
    state = numpy.random.SeedSequence([seed, *path]).generate_state(1, numpy.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) & (2**63 - 1))


def noise_per_input(
    ids: Sequence[int], group_size: int, shape: Sequence[int], *, seed: int, step: int, device: torch.device | str
) -> Tensor:
    """Standard normal numbers for each rollout of each input at one step.

    Args:
        ids: `[B]` ids of the inputs.
        group_size: rollouts per input, K.
        shape: of one row.
        seed: of the rollouts.
        step: number of the step; 0 for the first latents.
        device: where they are drawn.

    Returns:
        `[B * K, *shape]` fp32, the rollouts of an input side by side.
    """
    rows = [
        torch.randn(group_size, *shape, generator=generator(seed, row, step, device=device), device=device)
        for row in ids
    ]
    return torch.cat(rows)


def sub_seed(seed: int, *path: int) -> int:
    """A seed for one purpose under another seed, so that no two purposes share random numbers.

    Example:
        >>> sub_seed(0, 1, 5) == sub_seed(0, 2, 5)
        False
    """
    return int(numpy.random.SeedSequence([seed, *path]).generate_state(1, numpy.uint32)[0])
