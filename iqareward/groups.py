"""Statistics per input id: rows with one id are rollouts of one input, whatever their order and number.

Ids identify inputs, never prompts: in restoration every input often has the same prompt, and grouping by it would merge
them all. Nothing here waits for a device, except the functions that talk to other processes.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from iqareward.types import Groups

# Integers that gloo or NCCL cannot send.
_NOT_SENT = (torch.int16, torch.uint16, torch.uint32, torch.uint64)


def finite_or_nan(scores: Tensor) -> Tensor:
    """`scores` with NaN, "not scored", in the place of infinity.

    Example:
        >>> finite_or_nan(torch.tensor([0.5, torch.inf]))
        tensor([0.5000,    nan])
    """
    return torch.where(scores.isfinite(), scores, torch.nan)


class GroupStatistics(NamedTuple):
    """What each row's input looks like over all its rollouts; every field is `[B]`, one value per row.

    Attributes:
        num_scored: number of finite values of the input.
        mean: their mean; NaN where there is none.
        std: their Bessel-corrected standard deviation; NaN where there are fewer than two.
    """

    num_scored: Tensor
    mean: Tensor
    std: Tensor


def check_rows(caller: str, values: Tensor) -> Tensor:
    """Return `values` as detached fp32 (fp64 stays fp64), or say why they are not one value per row.

    Example:
        >>> check_rows("demo", torch.tensor([1, 2])).dtype
        torch.float32
    """
    if not isinstance(values, Tensor) or values.ndim != 1:
        got, advice = type(values).__name__, "Make a tensor of it with torch.as_tensor."
        if isinstance(values, Tensor):
            got, advice = list(values.shape), "Flatten it first."
        raise ValueError(f"{caller} expected one value per row, a tensor [B], got {got}. {advice}")
    values = values.detach()
    return values if values.dtype == torch.float64 else values.float()


def check_ids(caller: str, ids: Groups, rows: Tensor | None = None, *, size: int | None = None) -> Tensor:
    """Return ids as int64, or say why they are not integers, one per row, in their range.

    Args:
        caller: named in messages.
        ids: `[B]` integers of inputs or buckets: a tensor of any integer dtype, an array or a list.
        rows: `[B]` values that the ids belong to; the result is on their device.
        size: ids lie in [0, size). An id outside is an error on the CPU. On another device, where looking at the ids
            would wait for it, it becomes `size`, so that no other entry is touched.

    Returns:
        `[B]` int64.

    Raises:
        TypeError: `ids` is neither a tensor nor an array nor a list of numbers.
        ValueError: they are not integers, not of the shape of `rows`, or out of range.

    Example:
        >>> check_ids("demo", [7, 8], torch.tensor([0.1, 0.2]), size=9)
        tensor([7, 8])
    """
    found = _tensor(caller, ids, None if rows is None else rows.device)
    shape = found.shape if rows is None else rows.shape
    other = found.is_floating_point() or found.is_complex() or found.dtype == torch.bool
    if found.ndim != 1 or found.shape != shape or (other and found.numel() > 0):
        wanted = "[B]" if rows is None else list(shape)
        raise ValueError(
            f"{caller} expected ids (`groups` or `bucket`) as integers of shape {wanted}, got {found.dtype} "
            f"{list(found.shape)}. Give every row one integer: that of its input or of its bucket."
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


def _tensor(caller: str, rows: Any, device: torch.device | None) -> Tensor:
    if isinstance(rows, Tensor):
        return rows if device is None else rows.to(device)
    try:
        return torch.tensor(rows, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        got = f"{type(rows).__name__} ({error})"
        raise TypeError(f"{caller} expected a tensor, an array or a list of numbers [B], got {got}.") from error


def group_index(groups: Tensor) -> Tensor:
    """Each row's group as a number in [0, B), so that a buffer of length B holds every group without counting them.

    `torch.unique` would do the same and wait for the device to learn how many groups there are.

    Args:
        groups: `[B]` integer ids.

    Returns:
        `[B]` int64; equal where the ids are equal, numbered in the order of the ids.

    Example:
        >>> group_index(torch.tensor([70, 7, 70, 9])).tolist()
        [2, 0, 2, 1]
    """
    ordered, order = torch.sort(groups, stable=True)
    starts = torch.zeros_like(ordered, dtype=torch.int64)
    starts[1:] = ordered[1:] != ordered[:-1]
    return torch.empty_like(starts).scatter_(0, order, starts.cumsum(0))


def group_sum(values: Tensor, index: Tensor) -> Tensor:
    """The sum over each row's group, given to every row of it; `[B]`, with `index` from `group_index`."""
    return torch.zeros_like(values).scatter_add_(0, index, values).gather(0, index)


def group_min(values: Tensor, index: Tensor) -> Tensor:
    """The smallest value of each row's group, given to every row of it; `[B]`, with `index` from `group_index`."""
    high = torch.full_like(values, torch.inf)
    return high.scatter_reduce(0, index, values, "amin").gather(0, index)


def place_in_group(index: Tensor, order: Tensor | None = None) -> Tensor:
    """Each row's place among the rows of its group, counted along `order`; `[B]` int64, 0 for the first.

    Args:
        index: `[B]` from `group_index`.
        order: `[B]` permutation that lists the rows; in their own order if not given.

    Example:
        >>> place_in_group(group_index(torch.tensor([70, 7, 70, 70]))).tolist()
        [0, 0, 1, 2]
    """
    counter = torch.arange(index.shape[0], dtype=torch.int64, device=index.device)
    order = counter if order is None else order
    order = order[torch.argsort(index[order], stable=True)]
    place = torch.empty_like(counter).scatter_(0, order, counter)
    first = torch.full_like(place, index.shape[0]).scatter_reduce(0, index, place, "amin")
    return place - first.gather(0, index)


def group_statistics(values: Tensor, groups: Groups) -> GroupStatistics:
    """Count, mean and standard deviation of each row's input over its rollouts; rows that are not finite do not count.

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
    low = group_min(torch.where(finite, values, torch.inf), index)
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
    """`group_statistics` with all rows in one group: scalars, and no sorting of ids.

    Args:
        values: `[B]` floating point; NaN = not scored.

    Example:
        >>> batch_statistics(torch.tensor([1.0, 3.0, float("nan")])).mean
        tensor(2.)
    """
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
    """Whether this process talks to others through `torch.distributed`."""
    return dist.is_available() and dist.is_initialized()


def gather_rows(*rows: Tensor | Groups) -> tuple[tuple[Tensor, ...], slice]:
    """The rows of all processes, in the order of their ranks, and the slice of them that is ours.

    Every process must call it, with the same number of tensors; the number of rows may differ between processes. It
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


def distributed_group_statistics(values: Tensor, groups: Groups) -> GroupStatistics:
    """`group_statistics` over the rows of all processes, for this process's rows; every process must call it.

    Args:
        values: `[B]` values of this process; NaN = not scored.
        groups: `[B]` integer ids that mean the same input on every process.

    Returns:
        `GroupStatistics` of `[B]` tensors for the rows given here, over the rollouts of all processes.

    Example:
        >>> distributed_group_statistics(torch.tensor([1.0, 3.0]), torch.tensor([0, 0])).mean.tolist()
        [2.0, 2.0]
    """
    values = check_rows("distributed_group_statistics", values)
    ids = check_ids("distributed_group_statistics", groups, values)
    (all_values, all_groups), mine = gather_rows(values, ids)
    return GroupStatistics(*(field[mine] for field in group_statistics(all_values, all_groups)))
