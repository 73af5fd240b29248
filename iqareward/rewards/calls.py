"""One call of a reward: check its columns, group them by size, split, merge and score them."""

import asyncio
import concurrent.futures
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from iqareward.types import Groups, Images, Reward, Scores, needs

# columns that hold no images but one label for each
_LABELS = {"prompts": "prompt", "ids": "id", "tasks": "task"}
# what a reward may need beside images, its attribute that says so, and the explanation in errors
_NEEDS = (
    ("references", "`references` (it is a full-reference reward)"),
    ("inputs", "`inputs`, the degraded images"),
    ("prompts", "`prompts`, one per image"),
    ("ids", "`ids`, one integer per image, the same for all rollouts of an input"),
    ("tasks", "`tasks`, one per image"),
)
COLUMNS = tuple(name for name, _ in _NEEDS)


class Bucket(NamedTuple):
    """Rows of a call whose images share one size, and whose inputs share one size; `[b, 3, H, W]` each.

    `labels` are the columns of the call that hold no images, by name.
    """

    images: Tensor
    references: Tensor | None
    inputs: Tensor | None
    labels: Mapping[str, Sequence[Any]]

    @property
    def num_rows(self) -> int:
        """The number of rows."""
        return self.images.shape[0]

    def split(self, size: int) -> Iterator["Bucket"]:
        """Buckets of at most `size` rows, in order."""
        if self.num_rows <= size:
            yield self
            return
        # The gradient of a slice is as large as the whole batch, so many slices would cost many batches.
        tensors = (repeat(None) if column is None else column.split(size) for column in self[:3])
        labels = (
            {name: column[row : row + size] for name, column in self.labels.items()}
            for row in range(0, self.num_rows, size)
        )
        yield from map(Bucket, *tensors, labels)  # pyright: ignore[reportArgumentType]


def shape_buckets(name: str, call: "Call") -> tuple[list[Bucket], list[int] | None]:
    """Group images of equal shape, with what belongs to them, into batches.

    Args:
        name: The reward's name, for error messages.
        call: Of columns that the reward needs.

    Returns:
        One bucket per shape, in order of first appearance; and for each image its row in the concatenation of the
        buckets, or None if that is the order already.
    """
    rows, given = _checked_columns(name, call)
    labels = call.labels
    if isinstance(rows, tuple) and (given is None or isinstance(given, Tensor)):
        whole = Bucket(rows[0], rows[1] if len(rows) > 1 else None, given, labels)
        return ([whole] if whole.num_rows else []), None
    columns = [*rows, *([] if given is None else [given])]
    members: dict[tuple[torch.Size, ...], list[int]] = {}
    for index in range(len(rows[0])):
        members.setdefault(tuple(column[index].shape for column in columns), []).append(index)

    def gathered(column: Images | None, indices: list[int]) -> Tensor | None:
        return None if column is None else torch.stack([column[i] for i in indices])

    buckets = [
        Bucket(
            torch.stack([rows[0][i] for i in indices]),
            gathered(rows[1] if len(rows) > 1 else None, indices),
            gathered(given, indices),
            {name: _rows(column, indices) for name, column in labels.items()},
        )
        for indices in members.values()
    ]
    position = {index: row for row, index in enumerate(i for indices in members.values() for i in indices)}
    order = [position[index] for index in range(len(rows[0]))]
    return buckets, None if order == list(range(len(order))) else order


Rows = tuple[Tensor, *tuple[Tensor, ...]] | list[Sequence[Tensor]]


def _checked_columns(name: str, call: "Call") -> tuple[Rows, Images | None]:
    """(images and references, inputs) after all checks of shape, dtype and device, as `Call.check` describes them.

    Batches stay as they are, unless images or references are rows, which makes rows of both.
    """
    rows = _checked_rows(name, call.images, call.references)
    for argument, column in call.labels.items():
        # a Series of pandas has rows by label, not by place
        is_list = isinstance(column, Sequence | Tensor | np.ndarray) and not isinstance(column, str | bytes)
        if not is_list or getattr(column, "ndim", 1) == 0:
            raise TypeError(
                f"{name} expected `{argument}` as a list with one {_LABELS[argument]} per image, got "
                f"{type(column).__name__}. Convert with list(...)."
            )
        if len(column) != len(rows[0]):
            raise ValueError(f"{name} expected one {_LABELS[argument]} per image ({len(rows[0])}), got {len(column)}.")
    return rows, None if call.inputs is None else _checked_inputs(name, call.inputs, rows[0])


def _checked_rows(name: str, images: Images, references: Images | None) -> Rows:
    if isinstance(images, Tensor) and (references is None or isinstance(references, Tensor)):
        batch = (images,) if references is None else (images, references)
        for argument, tensor in zip(("images", "references"), batch, strict=False):
            _check_tensor(name, argument, tensor, ndim=4)
        _check_match(name, *batch)
        return batch
    rows = [_as_rows(name, "images", images)]
    if references is not None:
        rows.append(_as_rows(name, "references", references))
        if len(rows[0]) != len(rows[1]):
            raise ValueError(f"{name} expected as many references as images ({len(rows[0])}), got {len(rows[1])}.")
    for index, row in enumerate(zip(*rows, strict=True)):
        _check_match(name, *row, index=index)
        if row[0].device != rows[0][0].device:
            raise ValueError(
                f"{name} expected all images on one device ({rows[0][0].device}), "
                f"got images[{index}] on {row[0].device}."
            )
    return rows


def _checked_inputs(name: str, inputs: Images, images: Sequence[Tensor] | Tensor) -> Images:
    """Inputs after the checks of shape, dtype, number and device."""
    if isinstance(inputs, Tensor):
        _check_tensor(name, "inputs", inputs, ndim=4)
    else:
        inputs = _as_rows(name, "inputs", inputs)
    if len(inputs) != len(images):
        raise ValueError(f"{name} expected as many inputs as images ({len(images)}), got {len(inputs)}.")
    for row in [inputs] if isinstance(inputs, Tensor) else inputs:
        if len(images) and row.device != images[0].device:
            raise ValueError(
                f"{name} expected `inputs` on the device of `images` ({images[0].device}), got {row.device}. "
                "Move them with inputs.to(images.device)."
            )
    return inputs


def _as_rows(name: str, argument: str, images: Images) -> Sequence[Tensor]:
    """A batch or a sequence as a list of checked `[3, H, W]` tensors."""
    if isinstance(images, Tensor):
        _check_tensor(name, argument, images, ndim=4)
        return images.unbind(0)
    if not isinstance(images, Sequence):
        raise TypeError(
            f"{name} expected `{argument}` as a tensor [B, 3, H, W] or a sequence of [3, H, W] tensors, "
            f"got {type(images).__name__}. Convert with iqareward.to_images(...)."
        )
    for index, image in enumerate(images):
        _check_tensor(name, f"{argument}[{index}]", image, ndim=3)
    return images


def _check_tensor(name: str, argument: str, image: Tensor, *, ndim: int) -> None:
    shape = "[B, 3, H, W]" if ndim == 4 else "[3, H, W]"
    if not isinstance(image, Tensor):
        raise TypeError(
            f"{name} expected `{argument}` as a torch.Tensor {shape}, got {type(image).__name__}. "
            "Convert with iqareward.to_images(...)."
        )
    if image.ndim != ndim or image.shape[-3] != 3 or 0 in image.shape[-2:]:
        raise ValueError(
            f"{name} expected `{argument}` of shape {shape} with H, W >= 1, got {list(image.shape)}. "
            "Convert with iqareward.to_images(...)."
        )
    if not image.is_floating_point():
        raise TypeError(
            f"{name} expected `{argument}` floating-point in [0, 1], got {image.dtype}. "
            "Convert with iqareward.to_images(...), which scales integers by their dtype."
        )


def _check_match(name: str, images: Tensor, references: Tensor | None = None, *, index: int | None = None) -> None:
    if references is None:
        return
    where = "" if index is None else f"[{index}]"
    if images.shape != references.shape:
        raise ValueError(
            f"{name} expected `references{where}` of the shape of `images{where}` {list(images.shape)}, "
            f"got {list(references.shape)}. Resize or repeat the references."
        )
    if images.device != references.device:
        raise ValueError(
            f"{name} expected `references{where}` on the device of `images{where}` ({images.device}), "
            f"got {references.device}. Move them with references.to(images.device)."
        )


# a future or a coroutine that ends with one of these ends silently, as if cancelled, or (Python 3.11) never
_SIGNALS = (
    StopIteration,
    StopAsyncIteration,
    GeneratorExit,
    asyncio.CancelledError,
    concurrent.futures.CancelledError,
)


@final
@dataclass(frozen=True, eq=False)
class Call:
    """Images with what belongs to them, row by row.

    Rows with one id are rollouts of one input; `tasks` name what was done to each image.
    """

    images: Images
    references: Images | None = None
    inputs: Images | None = None
    prompts: Sequence[str] | None = None
    ids: Groups | None = None
    tasks: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device | None:
        """Where the images are; None if there are none and no tensor says."""
        if isinstance(self.images, Tensor):
            return self.images.device
        return self.images[0].device if len(self.images) else None

    def for_reward(self, reward: Reward) -> "Call":
        """The call without columns that a reward does not look at; prompts go along if given.

        Raises:
            ValueError: A column that it needs is missing.
        """
        unneeded: dict[str, None] = {}
        for (name, what), column in zip(_NEEDS, self._columns()[1:], strict=True):
            if needs(reward, name):
                if column is None:
                    raise ValueError(f"{reward.name} expected {what}, got None. Pass {name}=...")
            elif column is not None and name != "prompts":
                unneeded[name] = None
        return replace(self, **unneeded) if unneeded else self

    def check(self, name: str) -> "Call":
        """Return the call itself after all checks of shape, dtype and device.

        Args:
            name: The reward's name, for error messages.

        Raises:
            TypeError: A column is not a floating-point tensor.
            ValueError: Shapes, devices or numbers of rows are wrong or do not match.
        """
        _checked_columns(name, self)
        return self

    @property
    def labels(self) -> dict[str, Any]:
        """The columns that hold no images, by name; those that are None are left out."""
        if self.prompts is None and self.ids is None and self.tasks is None:
            return {}
        columns = zip(_LABELS, self._columns()[3:], strict=True)
        return {name: column for name, column in columns if column is not None}

    def rows(self, rows: slice | list[int]) -> "Call":
        """Some of the rows."""
        return Call(*(None if column is None else _rows(column, rows) for column in self._columns()))  # pyright: ignore

    @property
    def nbytes(self) -> int:
        """Bytes of images, references and inputs in the dtype they have."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def pieces(self, size: int, max_bytes: int | None = None) -> Iterator["Call"]:
        """Calls of at most `size` rows and `max_bytes` bytes (but at least one row), in order."""
        most = self.nbytes if max_bytes is None else max_bytes
        if len(self) <= size and self.nbytes <= most:
            yield self
            return
        start, nbytes = 0, 0
        for row, row_bytes in enumerate(self._row_bytes()):
            if row - start == size or (row > start and nbytes + row_bytes > most):
                yield self.rows(slice(start, row))
                start, nbytes = row, 0
            nbytes += row_bytes
        yield self.rows(slice(start, len(self)))

    def score(self, reward: Reward) -> Scores:
        """The reward's scores.

        Raises:
            RuntimeError: The reward raised an exception that generators and futures take for a signal.
            ValueError: The scores are not a tensor with one score per image.
        """
        try:
            more = {name: getattr(self, name) for name in ("inputs", "ids", "tasks")}
            more = {name: column for name, column in more.items() if column is not None}  # not every reward knows them
            scores = reward(self.images, references=self.references, prompts=self.prompts, **more)
        except _SIGNALS as error:
            signal = type(error).__name__
            raise RuntimeError(
                f"{reward.name} raised {signal}, which would end its caller without an error."
            ) from error
        if not isinstance(scores, Tensor) or scores.shape != (len(self),):
            answer = f"scores {list(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(f"{reward.name} was given {len(self)} images, and answered {answer}.")
        return scores

    def score_with_parts(self, reward: Reward) -> tuple[Scores, dict[str, Scores]]:
        """The reward's scores and, from the same evaluation, those of each of its parts by name."""
        parts = parts_of(reward)
        if not parts:
            return self.score(reward), {}
        scores = {part.name: self.score(part) for part in parts}
        combined: Any = reward
        return combined.combine(scores), scores

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the call."""
        for column in (self.images, self.references, self.inputs):
            if isinstance(column, Tensor):
                yield column
            elif column is not None:
                yield from column

    def _row_bytes(self) -> list[int]:
        columns = [column for column in (self.images, self.references, self.inputs) if column is not None]
        return [sum(column[row].nbytes for column in columns) for row in range(len(self))]

    def _columns(self) -> tuple[Any, ...]:
        return self.images, self.references, self.inputs, self.prompts, self.ids, self.tasks


def parts_of(reward: Reward) -> Sequence[Reward]:
    """The rewards that a combination consists of; none for any other reward, whatever its `parts` may be."""
    return getattr(reward, "parts", ()) if hasattr(reward, "combine") else ()


def merged(calls: Sequence[Call]) -> Call:
    """One call of the rows of several, in order; they must be on one device and have the same columns."""
    if len(calls) == 1:
        return calls[0]
    columns = zip(*(call._columns() for call in calls), strict=True)  # pyright: ignore[reportPrivateUsage]
    return Call(*(_merge(column) for column in columns))


def _merge(columns: Sequence[Any]) -> Any:
    first = columns[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        same = [
            c for c in columns if isinstance(c, Tensor) and c.shape[1:] == first.shape[1:] and c.dtype == first.dtype
        ]
        if len(same) == len(columns):
            return torch.cat(same)
    return [row for column in columns for row in column]


def _rows(column: Any, rows: slice | list[int]) -> Any:
    if isinstance(rows, slice) or isinstance(column, Tensor):
        return column[rows]
    return [column[row] for row in rows]
