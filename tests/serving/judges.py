"""Rewards for the tests on Ray; a module of its own, so that the processes of Ray can import them."""

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iqareward.types import Images

WARM_UP_SIDE = 256  # the server's; what follows leaves that picture alone


class Dawdler:
    """The mean of each image, after so many seconds per batch."""

    name, bounds = "dawdler", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, images: Images, references: Any = None, prompts: Any = None, **ignored: Any) -> Tensor:
        if images[0].shape[-1] != WARM_UP_SIDE:
            time.sleep(self.seconds)
        return torch.stack([image.mean() for image in images])


class Mortal:
    """The mean of each image, slowly; leaves its process id where the test finds it. Black images end the process."""

    name, bounds = "mortal", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, images: Images, references: Any = None, prompts: Any = None, **ignored: Any) -> Tensor:
        (Path(self.folder) / str(os.getpid())).touch()
        if images[0].shape[-1] != WARM_UP_SIDE:
            time.sleep(0.02)
        if any(image.amax() == 0 for image in images):
            os._exit(1)
        return torch.stack([image.mean() for image in images])
