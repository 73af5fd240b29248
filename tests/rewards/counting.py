"""Rewards whose calls can be counted, slowed down and broken."""

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iqareward.types import Images, Scores


class Brightness:
    """The mean of each image; remembers the size of each call, and fails for an image that holds the value 0.75."""

    name, needs_references, needs_prompts, differentiable = "brightness", False, False, False
    bounds = (0.0, 1.0)
    poison = 0.75

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.sizes: list[int] = []
        self.inside = 0
        self.most_inside = 0

    def __call__(
        self, images: Images, references: Images | None = None, prompts: Sequence[str] | None = None, **ignored: Any
    ) -> Scores:
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        self.sizes.append(len(images))
        time.sleep(self.seconds)
        self.inside -= 1
        if any(bool((image == self.poison).any()) for image in images):
            raise ArithmeticError("a poisoned image")
        return torch.stack([image.float().mean() for image in images])


class Together(Brightness):
    """Image, reference and prompt in one number, so that a mix-up shows."""

    name, needs_references, needs_prompts = "together", True, True
    bounds = (None, None)

    def __call__(
        self, images: Images, references: Images | None = None, prompts: Sequence[str] | None = None, **ignored: Any
    ) -> Scores:
        assert references is not None
        assert prompts is not None
        self.sizes.append(len(images))
        rows = zip(images, references, prompts, strict=True)
        return torch.stack([i.mean() + 10 * r.mean() + 100 * float(p) for i, r, p in rows])


class Held(Brightness):
    """Waits in its first call until it is let go, so that a queue builds up."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.let_go = threading.Event(), threading.Event()

    def __call__(self, images: Images, *arguments: Any, **keywords: Any) -> Scores:
        self.entered.set()
        assert self.let_go.wait(120)
        return super().__call__(images)


def flat(*values: float, side: int = 4) -> Tensor:
    """`[B, 3, side, side]`, one grey level per image."""
    return torch.tensor(values)[:, None, None, None].expand(-1, 3, side, side).clone()
