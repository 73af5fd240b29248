"""Random numbers that belong to an input: its id and a seed decide them, not the batch or the order it comes in."""

import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def id_list(caller: str, ids: Sequence[int] | Tensor) -> list[int]:
    """The ids as Python integers, or a ValueError in the name of `caller`.

    Args:
        caller: name for the error message.
        ids: `[B]` integers >= 0, B >= 1.

    Example:
        >>> id_list("demo", torch.tensor([3, 1]))
        [3, 1]
    """
    if isinstance(ids, Tensor) and (ids.ndim != 1 or ids.is_floating_point()):
        raise ValueError(f"{caller} expected integer `ids` of shape [B], got {ids.dtype} {list(ids.shape)}.")
    rows = [int(input_id) for input_id in (ids.tolist() if isinstance(ids, Tensor) else ids)]
    if not rows or min(rows) < 0:
        raise ValueError(f"{caller} expected one or more `ids` >= 0, got {rows}. Number the inputs from 0.")
    return rows


def generator_of(input_id: int, *, seed: int, purpose: str) -> torch.Generator:
    """A generator for one use of one input; other ids, seeds and purposes have unrelated ones.

    Args:
        input_id: integer >= 0.
        seed: integer >= 0.
        purpose: any word.

    Example:
        >>> twins = [generator_of(7, seed=0, purpose="noise") for _ in range(2)]
        >>> torch.rand(2, generator=twins[0]).equal(torch.rand(2, generator=twins[1]))
        True
    """
    key = (input_id, zlib.crc32(purpose.encode()))
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def uniform(ids: Sequence[int], *shape: int, seed: int, purpose: str) -> Tensor:
    """Uniform numbers in [0, 1), `[B, *shape]` float32 on the CPU, each row from its own generator."""
    rows = (generator_of(input_id, seed=seed, purpose=purpose) for input_id in ids)
    return torch.stack([torch.rand(shape, generator=row, dtype=torch.float32, device="cpu") for row in rows])


def normal(ids: Sequence[int], *shape: int, seed: int, purpose: str) -> Tensor:
    """Standard normal numbers, `[B, *shape]` float32 on the CPU, each row from its own generator."""
    rows = (generator_of(input_id, seed=seed, purpose=purpose) for input_id in ids)
    return torch.stack([torch.randn(shape, generator=row, dtype=torch.float32, device="cpu") for row in rows])
