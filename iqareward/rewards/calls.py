"""One call of a reward as rows to check, cut, merge and score: what batching, caching and sending share."""

import asyncio
import concurrent.futures
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from iqareward.rewards.batches import checked_columns
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
    inputs: Images | None = None
    prompts: Sequence[str] | None = None

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
            ValueError: something that it needs is missing.
        """
        name, needs_inputs = reward.name, getattr(reward, "needs_inputs", False)
        if reward.needs_references and self.references is None:
            raise ValueError(
                f"{name} expected `references` (it is a full-reference reward), got None. Pass references=..."
            )
        if needs_inputs and self.inputs is None:
            raise ValueError(f"{name} expected `inputs`, the degraded pictures, got None. Pass inputs=...")
        if reward.needs_prompts and self.prompts is None:
            raise ValueError(f"{name} expected `prompts`, one per image, got None. Pass prompts=...")
        references = self.references if reward.needs_references else None
        return Call(self.images, references, self.inputs if needs_inputs else None, self.prompts)

    def check(self, name: str) -> "Call":
        """The call, if its images are in order, so that a bad one fails where it is made.

        Args:
            name: The reward's name, for error messages.

        Raises:
            TypeError: something is not a floating-point tensor.
            ValueError: shapes, devices or numbers are wrong or do not match.
        """
        checked_columns(name, self.images, self.references, self.inputs, self.prompts)
        return self

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
            inputs = {} if self.inputs is None else {"inputs": self.inputs}  # not every reward knows of them
            scores = reward(self.images, references=self.references, prompts=self.prompts, **inputs)
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
        """Every tensor in it."""
        for column in (self.images, self.references, self.inputs):
            if isinstance(column, Tensor):
                yield column
            elif column is not None:
                yield from column

    def _row_bytes(self) -> list[int]:
        columns = [column for column in (self.images, self.references, self.inputs) if column is not None]
        return [sum(column[row].nbytes for column in columns) for row in range(len(self))]

    def _columns(self) -> tuple[Any, ...]:
        return self.images, self.references, self.inputs, self.prompts


def parts_of(reward: Reward) -> Sequence[Reward]:
    """The rewards that a combination is made of; none for any other reward, whatever its `parts` may be."""
    return getattr(reward, "parts", ()) if hasattr(reward, "combine") else ()


def merged(calls: Sequence[Call]) -> Call:
    """One call of the rows of several, in order; they must be on one device and have the same columns."""
    if len(calls) == 1:
        return calls[0]
    images, references, inputs = (
        _merge_images([getattr(c, name) for c in calls]) for name in ("images", "references", "inputs")
    )
    prompts = None if calls[0].prompts is None else [prompt for call in calls for prompt in call.prompts or ()]
    assert images is not None
    return Call(images, references, inputs, prompts)


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
