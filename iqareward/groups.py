"""Statistics per input: rows with the same id are rollouts of one input, in any order and number.

Ids identify inputs, never prompts: in restoration all inputs often share one prompt, and grouping by it would merge
them. Only the functions that communicate with other processes wait for the device.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from iqareward.types import Groups

# Integers that gloo or NCCL cannot send.
_NOT_SENT = (torch.int16, torch.uint16, torch.uint32, torch.uint64)


def finite_or_nan(scores: Tensor) -> Tensor:
    """Replace infinity by NaN, "not scored"."""
    return torch.where(scores.isfinite(), scores, torch.nan)


class GroupStatistics(NamedTuple):
    """Statistics of each row's input over all its rollouts; every field is `[B]`.

    Attributes:
        num_scored: number of finite values of the input.
        mean: their mean; NaN where there is none.
        std: their Bessel-corrected standard deviation; NaN where there are fewer than two.
    """

    num_scored: Tensor
    mean: Tensor
    std: Tensor


def check_rows(caller: str, values: Tensor) -> Tensor:
    """Return `values` `[B]` as detached fp32 (fp64 stays fp64), or raise a ValueError in the name of `caller`."""
    if not isinstance(values, Tensor) or values.ndim != 1:
        got, advice = type(values).__name__, "Make a tensor of it with torch.as_tensor."
        if isinstance(values, Tensor):
            got, advice = list(values.shape), "Flatten it first."
        raise ValueError(f"{caller} expected one value per row, a tensor [B], got {got}. {advice}")
    values = values.detach()
    return values if values.dtype == torch.float64 else values.float()


def check_ids(caller: str, ids: Groups, rows: Tensor | None = None, *, size: int | None = None) -> Tensor:
    """Return ids `[B]` as int64 on the device of `rows`, or raise a ValueError or TypeError in the name of `caller`.

    With `size` they must lie in [0, size). An id outside is an error on the CPU; on other devices, where checking would
    wait, it becomes `size`, so that no other entry is touched.
    """
    found = _tensor(caller, ids, None if rows is None else rows.device, what="integers [B] as ids (`groups` or `bins`)")
    shape = found.shape if rows is None else rows.shape
    other = found.is_floating_point() or found.is_complex() or found.dtype == torch.bool
    if found.ndim != 1 or found.shape != shape or (other and found.numel() > 0):
        wanted = "[B]" if rows is None else list(shape)
        raise ValueError(
            f"{caller} expected ids (`groups` or `bins`) as integers of shape {wanted}, got {found.dtype} "
            f"{list(found.shape)}. Give every row one integer: that of its input or of its bin."
        )
    found = found.long()
    if size is None:
        return found
    outside = (found < 0) | (found >= size)
    if found.device.type == "cpu" and outside.any():
        raise ValueError(
            f"{caller} expected ids in [0, {size}), got {sorted(set(found[outside].tolist()))[:5]}. "
            "Number them from 0, or build it for more of them."
        )
    return torch.where(outside, size, found)


def _tensor(
    caller: str, rows: Any, device: torch.device | None, *, what: str = "a tensor, an array or a list of numbers [B]"
) -> Tensor:
    if isinstance(rows, Tensor):
        return rows if device is None else rows.to(device)
    try:
        return torch.tensor(rows, device=device)
    except (TypeError, ValueError, RuntimeError, LookupError) as error:
        got = f"{type(rows).__name__} ({error})"
        raise TypeError(f"{caller} expected {what}, got {got}.") from error


def group_index(groups: Tensor) -> Tensor:
    """Number the groups from 0 in the order of their ids; `[B]` int64.

    `torch.unique` would wait for the device to learn how many groups there are; a buffer of length B holds any number.
    """
    ordered, order = torch.sort(groups, stable=True)
    starts = torch.zeros_like(ordered, dtype=torch.int64)
    starts[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(starts).scatter_(0, order, starts.cumsum(0))


def group_sum(values: Tensor, index: Tensor) -> Tensor:
    """Give every row the sum over its group, `[B]`; `index` is from `group_index`."""
    return torch.zeros_like(values).scatter_add_(0, index, values).gather(0, index)


def place_in_group(index: Tensor, order: Tensor | None = None) -> Tensor:
    """Count each row's place within its group, from 0, along the permutation `order` of the rows or their own order."""
    counter = torch.arange(index.shape[0], dtype=torch.int64, device=index.device)
    order = counter if order is None else order
    order = order[torch.argsort(index[order], stable=True)]
    place = torch.empty_like(counter).scatter_(0, order, counter)
    first = torch.full_like(place, index.shape[0]).scatter_reduce(0, index, place, "amin")
    return place - first.gather(0, index)


def group_statistics(values: Tensor, groups: Groups) -> GroupStatistics:
    """Compute count, mean and standard deviation of each row's input over its rollouts that are finite.

    Args:
        values: `[B]`, any real dtype; NaN = not scored.
        groups: `[B]` integer ids of the inputs; groups may differ in size and lie in any order.

    Returns:
        `GroupStatistics` of `[B]` tensors on the device of `values`, detached. Equal values have a std of exactly 0.

    Raises:
        ValueError: a shape or dtype does not fit.

    Example:
        >>> group_statistics(torch.tensor([1.0, 5.0, 3.0, float("nan")]), torch.tensor([4, 9, 4, 9])).mean.tolist()
        [2.0, 5.0, 2.0, 5.0]
    """
    values = check_rows("group_statistics", values)
    index = group_index(check_ids("group_statistics", groups, values))
    finite = values.isfinite()
    # Measured from the group's smallest value, equal values have a spread of exactly 0: a mean of three 0.1 is not 0.1.
    low = torch.full_like(values, torch.inf).scatter_reduce(0, index, torch.where(finite, values, torch.inf), "amin")
    low = low.gather(0, index)
    offset = torch.where(finite, values - low, 0.0)
    count = group_sum(finite.to(values.dtype), index)
    mean_offset = group_sum(offset, index) / count
    squares = group_sum(torch.where(finite, (offset - mean_offset).square(), 0.0), index)
    return GroupStatistics(
        num_scored=count.to(torch.int64),
        mean=torch.where(count > 0, low + mean_offset, torch.nan),
        std=torch.where(count > 1, (squares / (count - 1)).sqrt(), torch.nan),
    )


def batch_statistics(values: Tensor) -> GroupStatistics:
    """`group_statistics` with all rows in one group: scalars, without sorting ids."""
    if values.shape[0] == 0:
        nan = values.new_full((), torch.nan)
        return GroupStatistics(torch.zeros_like(nan, dtype=torch.int64), nan, nan)
    finite = values.isfinite()
    count = finite.sum()
    low = torch.where(finite, values, torch.inf).amin()
    offset = torch.where(finite, values - low, 0.0)
    mean = offset.sum() / count
    squares = torch.where(finite, (offset - mean).square(), 0.0).sum()
    return GroupStatistics(count, low + mean, torch.where(count > 1, (squares / (count - 1)).sqrt(), torch.nan))


def is_distributed() -> bool:
    """Whether `torch.distributed` is initialised."""
    return dist.is_available() and dist.is_initialized()


def gather_rows(*rows: Tensor | Groups) -> tuple[tuple[Tensor, ...], slice]:
    """Gather the rows of all processes in the order of their ranks, and the slice that holds this process's rows.

    Every process must call it with the same number of tensors; the number of rows may differ between processes. It
    waits for the device once, to learn that number. Without a process group it returns its input.

    Args:
        rows: tensors `[B, ...]` with one B, or lists or arrays of B numbers; `[b, ...]` may differ between processes in
            b only. Integers of dtypes that not every backend can send become int64.

    Returns:
        The gathered tensors `[sum of B, ...]`, detached, and the slice that holds this process's rows.

    Raises:
        ValueError: the tensors differ in their number of rows.

    Example:
        >>> (rewards, groups), mine = gather_rows(torch.tensor([0.1, 0.3]), torch.tensor([0, 0]))
        >>> group_statistics(rewards, groups).mean[mine]
        tensor([0.2000, 0.2000])
    """
    device = next((row.device for row in rows if isinstance(row, Tensor)), None)
    tensors = [_tensor("gather_rows", row, device).detach() for row in rows]
    tensors = [tensor.long() if tensor.dtype in _NOT_SENT else tensor for tensor in tensors]
    num_rows = tensors[0].shape[0]
    if any(tensor.shape[0] != num_rows for tensor in tensors):
        got = [list(tensor.shape) for tensor in tensors]
        raise ValueError(f"gather_rows expected tensors with one number of rows, got {got}.")
    if not is_distributed():
        return tuple(tensors), slice(0, num_rows)
    own = torch.tensor([num_rows], dtype=torch.int64, device=tensors[0].device)
    sizes = [torch.zeros_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, own)
    counts = torch.cat(sizes).tolist()
    start = sum(counts[: dist.get_rank()])
    return tuple(_gather_one(tensor, counts) for tensor in tensors), slice(start, start + num_rows)


def _gather_one(rows: Tensor, counts: list[int]) -> Tensor:
    # Collectives want one shape on every rank, so the short ones are padded and cut again.
    padded = rows.new_zeros((max(counts), *rows.shape[1:]))
    padded[: rows.shape[0]] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
