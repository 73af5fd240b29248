"""One call of a reward as rows to check, cut, merge and score: what batching, caching and sending share."""

import asyncio
import concurrent.futures
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from iqareward.rewards.batches import checked_rows
from iqareward.types import Images, Reward, Scores

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
    """Images with what travels along with them, row by row."""

    images: Images
    references: Images | None = None
    prompts: Sequence[str] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def device(self) -> torch.device | None:
        """Where the images are; None if there are none and no tensor says."""
        if isinstance(self.images, Tensor):
            return self.images.device
        return self.images[0].device if len(self.images) else None

    def rows(self, rows: slice | list[int]) -> "Call":
        """Some of the rows."""
        return Call(*(None if column is None else _rows(column, rows) for column in self._columns()))  # pyright: ignore

    @property
    def nbytes(self) -> int:
        """Bytes of images and references in the dtype they have."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def pieces(self, size: int, max_bytes: int | None = None) -> Iterator["Call"]:
        """Calls of at most `size` rows and `max_bytes` bytes (but at least one row), in order."""
        most = self.nbytes if max_bytes is None else max_bytes
        if len(self) <= size and self.nbytes <= most:
            yield self
            return
        start, held = 0, 0
        for row, pixels in enumerate(self._row_bytes()):
            if row - start == size or (row > start and held + pixels > most):
                yield self.rows(slice(start, row))
                start, held = row, 0
            held += pixels
        yield self.rows(slice(start, len(self)))

    def score(self, reward: Reward) -> Scores:
        """The reward's scores.

        Raises:
            RuntimeError: the reward raised what generators and futures take for a signal, such as StopIteration.
            ValueError: the scores are no tensor with one for each image.
        """
        try:
            scores = reward(self.images, references=self.references, prompts=self.prompts)
        except _SIGNALS as error:
            signal = type(error).__name__
            raise RuntimeError(
                f"{reward.name} raised {signal}, which would end its caller without an error."
            ) from error
        if not isinstance(scores, Tensor) or scores.shape != (len(self),):
            answer = f"scores {list(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            raise ValueError(f"{reward.name} was given {len(self)} images, and answered {answer}.")
        return scores

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor in it."""
        for column in (self.images, self.references):
            if isinstance(column, Tensor):
                yield column
            elif column is not None:
                yield from column

    def _row_bytes(self) -> list[int]:
        columns = [column for column in (self.images, self.references) if column is not None]
        return [sum(column[row].nbytes for column in columns) for row in range(len(self))]

    def _columns(self) -> tuple[Any, ...]:
        return self.images, self.references, self.prompts


def checked_call(
    reward: Reward, images: Images, references: Images | None, prompts: Sequence[str] | None, *, name: str | None = None
) -> Call:
    """A call as the reward itself would accept it, so that a bad one fails where it is made.

    Args:
        reward: whose facts decide; it is not called.
        images: as for any reward.
        references: go along if the reward needs them, and are dropped otherwise.
        prompts: go along if given.
        name: for error messages; default: the reward's.

    Raises:
        TypeError: something is not a floating-point tensor.
        ValueError: shapes or devices are wrong, or references or prompts are missing or do not match.
    """
    name = name or reward.name
    if reward.needs_references and references is None:
        raise ValueError(f"{name} expected `references` (it is a full-reference reward), got None. Pass references=...")
    if reward.needs_prompts and prompts is None:
        raise ValueError(f"{name} expected `prompts`, one per image, got None. Pass prompts=...")
    references = references if reward.needs_references else None
    checked_rows(name, images, references)
    if prompts is not None and len(prompts) != len(images):
        raise ValueError(f"{name} expected one prompt per image ({len(images)}), got {len(prompts)}.")
    return Call(images, references, prompts)


def merged(calls: Sequence[Call]) -> Call:
    """One call of the rows of several, in order; they must be on one device and have the same columns."""
    if len(calls) == 1:
        return calls[0]
    images, references = (_merge_images([getattr(c, name) for c in calls]) for name in ("images", "references"))
    prompts = None if calls[0].prompts is None else [prompt for call in calls for prompt in call.prompts or ()]
    assert images is not None
    return Call(images, references, prompts)


def _merge_images(columns: list[Images | None]) -> Images | None:
    first = columns[0]
    if first is None:
        return None
    if isinstance(first, Tensor):
        same = [
            c for c in columns if isinstance(c, Tensor) and c.shape[1:] == first.shape[1:] and c.dtype == first.dtype
        ]
        if len(same) == len(columns):
            return torch.cat(same)
    return [row for column in columns for row in column or ()]


def _rows(column: Any, rows: slice | list[int]) -> Any:
    if isinstance(rows, slice) or isinstance(column, Tensor):
        return column[rows]
    return [column[row] for row in rows]
