"""Rewards for the tests of the server; a module of its own, so that the processes of Ray can import it."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iqareward.serving.replica import WARM_UP_SIDE
from iqareward.types import Images

FAILS, IS_SLOW, ENDS_THE_PROCESS = 9, 11, 13  # widths of the images that make `Moody` so
SLOW_SECONDS = 4.0


def means(images: Images) -> Tensor:
    """The mean of each image."""
    return torch.stack([image.mean() for image in images])


class Corner:
    """The last value of the first channel of each image: as fast for a large image as for a small one."""

    name, bounds = "corner", (None, None)
    needs_references = needs_prompts = differentiable = False

    def __call__(self, images: Images, references: Any = None, prompts: Any = None, **ignored: Any) -> Tensor:
        return torch.stack([image[0, -1, -1] for image in images])


class Slow:
    """The mean of each image, after so many seconds per batch."""

    name, bounds = "slow", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, images: Images, references: Any = None, prompts: Any = None, **ignored: Any) -> Tensor:
        if images[0].shape[-1] != WARM_UP_SIDE:
            time.sleep(self.seconds)
        return means(images)


class Weighty:
    """The mean of each image, while its weights are loaded; `diary` holds what happened to it."""

    name, bounds = "weighty", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.room = seconds, True
        self.diary: list[str] = []

    def __call__(self, images: Images, references: Any = None, prompts: Any = None, **ignored: Any) -> Tensor:
        time.sleep(self.seconds)
        self.diary.append("scored")
        return means(images)

    def offload(self) -> None:
        self.diary.append("offloaded")

    def onload(self) -> None:
        if not self.room:
            raise RuntimeError("out of memory")
        self.diary.append("loaded")


class Fragile:
    """A reward that fails on images whose first pixel is black: no reward should, but foreign ones do."""

    name, bounds = "fragile", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, images: Images, references: Any = None, prompts: Any = None, **ignored: Any) -> Tensor:
        if any(image[0, 0, 0] == 0 for image in images):
            raise self.error
        return means(images)


class Moody:
    """The mean of each image, unless their width says otherwise.

    Each process leaves a file named by its id, with a line for the begin and the end of each slow batch, and for being
    offloaded and loaded.
    """

    name, bounds = "moody", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, images: Images, references: Any = None, prompts: Any = None, **ignored: Any) -> Tensor:
        diary = Path(self.folder) / str(os.getpid())
        diary.touch()
        widths = {image.shape[-1] for image in images}
        if FAILS in widths:
            raise RuntimeError("as told")
        if ENDS_THE_PROCESS in widths:
            os._exit(1)
        if IS_SLOW in widths:
            with diary.open("a") as lines:
                lines.write("begin\n")
                lines.flush()
                time.sleep(SLOW_SECONDS)
                lines.write("end\n")
        time.sleep(0.01)
        return means(images)

    def offload(self) -> None:
        self._write("offloaded")

    def onload(self) -> None:
        self._write("loaded")

    def _write(self, line: str) -> None:
        with (Path(self.folder) / str(os.getpid())).open("a") as lines:
            lines.write(f"{line}\n")
