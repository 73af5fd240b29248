"""What the loop reads: batches of inputs that share their sizes."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Inputs that share their sizes.

    Args:
        ids: Id of each input, B integers >= 0.
        degraded: `[B, 3, h, w]` fp32 in [0, 1].
        references: `[B, 3, H, W]` fp32 in [0, 1], the ground truth; None if there is none. H and W may differ from h, w.
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
            lambda value: value.repeat_interleave(times, 0)
            if isinstance(value, Tensor)
            else tuple(value[row] for row in rows)
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same inputs on another device."""
        return self._mapped(lambda value: value.to(device) if isinstance(value, Tensor) else value)

    def _mapped(self, function: Callable[[Any], Any]) -> "Batch":
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return replace(self, **{name: value if value is None else function(value) for name, value in values.items()})
