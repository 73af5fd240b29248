"""Batches of inputs that have the same size, and a loader that reads them from a data set in advance."""

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iqareward.diffusion.finite import finite_inputs
from iqareward.diffusion.pairs import InputOrder, Pairs, checked_item, read_items


@dataclass(frozen=True)
class Batch:
    """Inputs that share their sizes.

    Args:
        ids: Id of each input, B integers >= 0.
        degraded: `[B, 3, h, w]` fp32 in [0, 1].
        references: `[B, 3, H, W]` fp32 in [0, 1], the ground truth, whose size may be another; None without one.
        prompts: A prompt for each input.
        tasks: The name of each input's task.
        usable: `[B]` bool, whether every pixel of an input was finite; all are if not given.
    """

    ids: tuple[int, ...]
    degraded: Tensor
    references: Tensor | None = None
    prompts: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    usable: Tensor = None  # pyright: ignore[reportAssignmentType]  # filled below

    def __post_init__(self) -> None:
        if self.usable is None:  # pyright: ignore[reportUnnecessaryComparison]
            usable = torch.ones(len(self.ids), dtype=torch.bool, device=self.degraded.device)
            object.__setattr__(self, "usable", usable)

    def __len__(self) -> int:
        return len(self.ids)

    def select(self, rows: slice) -> "Batch":
        """These inputs."""
        return self._mapped(lambda value: value[rows])

    def repeat(self, times: int) -> "Batch":
        """Each input `times` times, side by side."""
        rows = [row for row in range(len(self)) for _ in range(times)]
        return self._mapped(
            lambda value: (
                value.repeat_interleave(times, 0) if isinstance(value, Tensor) else tuple(value[row] for row in rows)
            )
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same inputs on another device."""
        return self._mapped(lambda value: value.to(device) if isinstance(value, Tensor) else value)

    def _mapped(self, function: Callable[[Any], Any]) -> "Batch":
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: value if value is None else function(value) for name, value in values.items()})


def batches(data: Pairs, ids: Sequence[int], device: torch.device | str = "cpu") -> list[Batch]:
    """Read inputs, and put those of one size together.

    An input with a pixel that is not finite becomes grey, so that it cannot spoil the others of its batch, and is not
    `usable`: it gets no weight in a loss.

    Args:
        data: The data set.
        ids: Which of its inputs, integers >= 0.
        device: Where the batches are put.

    Returns:
        Batches in the order in which their sizes first appear among `ids`. Within one, the inputs keep the order of
        `ids`, and all or none have a ground truth, a prompt and a task.

    Raises:
        ValueError: An item is not as `Pairs` says; its id is named.

    Example:
        >>> small, large = ({"lq": torch.rand(3, side, side), "task": "denoise"} for side in (16, 24))
        >>> [batch.ids for batch in batches([small, large, small], [0, 1, 2])]
        [(0, 2), (1,)]
    """
    items = [checked_item(*item) for item in zip(read_items(data, ids), ids, strict=True)]
    groups: dict[Any, list[int]] = {}
    for place, item in enumerate(items):
        kind = [value.shape if isinstance(value, Tensor) else name for name, value in item.items()]
        groups.setdefault(tuple(kind), []).append(place)
    return [_batch([ids[row] for row in rows], [items[row] for row in rows]).to(device) for rows in groups.values()]


def _batch(ids: list[int], items: list[dict[str, Any]]) -> Batch:
    columns = {name: [item[name] for item in items] for name in items[0]}
    images = [torch.stack(columns[name]) for name in ("lq", "gt") if name in columns]
    usable = finite_inputs(*images)
    degraded, *references = (torch.where(usable.view(-1, 1, 1, 1), each, 0.5) for each in images)
    prompts, tasks = (tuple(columns[name]) if name in columns else None for name in ("prompt", "task"))
    return Batch(tuple(ids), degraded, references[0] if references else None, prompts, tasks, usable)


def read_ahead(
    data: Pairs,
    order: InputOrder,
    updates: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[list[Batch]]:
    """The batches of one update after the other, read by worker processes while the trainer is busy.

    What is read does not depend on the number of workers, nor on the update with which the reading begins.

    Args:
        data: The data set.
        order: Which inputs belong to an update.
        updates: Numbers of the updates, such as `range(resumed, total)`.
        device: Where the batches are put.
        num_workers: Processes that read; each prepares two updates ahead. 0 reads in this process, when asked.
        rank: Number of this process among those that train.
        world: Number of processes that train.

    Raises:
        Exception: What the data set raised, with its message, also where that was in a worker.

    Example:
        >>> from iqareward.diffusion import SyntheticPairs
        >>> order = InputOrder(8, batch_size=4, seed=0)
        >>> [[len(batch) for batch in read] for read in read_ahead(SyntheticPairs(8, size=16), order, range(3))]
        [[4], [4], [4]]
    """
    loader = DataLoader(
        _Updates(data, order, rank, world),
        batch_size=None,
        sampler=updates,
        num_workers=num_workers,
        collate_fn=_unchanged,
        generator=torch.Generator(),  # the loader would draw a seed from the global one, which is the caller's
    )
    for read in loader:
        if isinstance(read, Exception):
            raise read
        yield [batch.to(device) for batch in read]


@dataclass(frozen=True)
class _Updates(Dataset[Any]):
    """What a worker reads: the batches of an update, or the error that it met.

    An error is a value here, because the loader would raise another one, whose message is a traceback.
    """

    data: Pairs
    order: InputOrder
    rank: int
    world: int

    def __getitem__(self, update: int) -> list[Batch] | Exception:
        try:
            return batches(self.data, self.order.ids(update, rank=self.rank, world=self.world))
        except Exception as error:  # a user's data set raises anything
            text = traceback.format_exc()
            try:
                error = pickle.loads(pickle.dumps(error))  # a queue would hang on one that cannot be pickled
            except Exception:
                error = RuntimeError(f"{type(error).__name__}: {error}")
            error.add_note(text)
            return error


def _unchanged(value: Any) -> Any:
    return value
