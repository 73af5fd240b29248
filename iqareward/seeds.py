"""Random numbers that follow from a seed and an input's id: the same in any batch, on any process, after a resume."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def generator(seed: int, *path: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator of its own for every `path` of integers under a seed.

    Args:
        seed: Integer >= 0.
        path: Integers >= 0, for example the id of an input and the number of a step.
        device: Where its numbers are drawn; CPU and GPU draw different ones.

    Example:
        >>> a, b = (torch.randn(1, generator=generator(0, 7, step)) for step in (1, 2))
        >>> bool(a == b)
        False
    """
    state = np.random.SeedSequence([seed, *path]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(state) & (2**63 - 1))


def sub_seed(seed: int, *path: int) -> int:
    """A seed for one purpose under another seed, so that no two purposes share random numbers."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1, np.uint32)[0])


def noise_per_input(
    ids: Sequence[int], group_size: int, shape: Sequence[int], *, seed: int, step: int, device: torch.device | str
) -> Tensor:
    """Standard normal numbers for each rollout of each input at one sampling step.

    Args:
        ids: `[B]` ids of the inputs.
        group_size: Rollouts per input, K.
        shape: Shape of one rollout's latents.
        seed: Seed of the rollouts.
        step: Number of the step; 0 for the first latents.
        device: Where they are drawn.

    Returns:
        `[B * K, *shape]` fp32, the rollouts of an input side by side.
    """
    generators = (generator(seed, input_id, step, device=device) for input_id in ids)
    return torch.cat([torch.randn(group_size, *shape, generator=own, device=device) for own in generators])


def uniform(ids: Sequence[int], *shape: int, seed: int, purpose: str) -> Tensor:
    """Uniform numbers in [0, 1), `[B, *shape]` float32 on the CPU, each input from a generator for this purpose."""
    own = (_data_generator(seed, input_id, purpose) for input_id in ids)
    return torch.stack([torch.rand(shape, generator=each, dtype=torch.float32, device="cpu") for each in own])


def normal(ids: Sequence[int], *shape: int, seed: int, purpose: str) -> Tensor:
    """Standard normal numbers, `[B, *shape]` float32 on the CPU, each input from a generator for this purpose."""
    own = (_data_generator(seed, input_id, purpose) for input_id in ids)
    return torch.stack([torch.randn(shape, generator=each, dtype=torch.float32, device="cpu") for each in own])


def _data_generator(seed: int, input_id: int, purpose: str) -> torch.Generator:
    # The zeros make the path longer than any of the trainer, so that data and rollouts of one seed are unrelated.
    return generator(seed, 0, 0, 0, input_id, zlib.crc32(purpose.encode()))


def id_list(caller: str, ids: Sequence[int] | Tensor) -> list[int]:
    """The ids as Python integers; raises ValueError in the name of `caller` unless they are integers >= 0."""
    if isinstance(ids, Tensor) and (ids.ndim != 1 or ids.is_floating_point()):
        raise ValueError(f"{caller} expected integer `ids` of shape [B], got {ids.dtype} {list(ids.shape)}.")
    integers = [int(input_id) for input_id in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    if not integers or min(integers) < 0:
        raise ValueError(f"{caller} expected one or more `ids` >= 0, got {integers}. Number the inputs from 0.")
    return integers
