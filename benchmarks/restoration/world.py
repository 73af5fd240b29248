"""What every run shares: sizes, the inputs, the start, and what is measured."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

import iqareward
from examples.small_restorer import photographs, restorer
from examples.small_restorer.tasks import TASKS, damaged
from iqareward.difficulty import rmse
from iqareward.diffusion import PixelPolicy, StoredPairs, Validation
from iqareward.seeds import generator
from iqareward.types import Reward

LOWEST_SEVERITY = 0.3
TRAIN, TEST, SAMPLER = 1, 2, 3  # seeds of the inputs and of the sampler's noise in tests
PICTURES = 24
SHOWN = (15, 31, 37, 103, 14)  # test inputs on the figures, one of each task
DIGITS = {"rmse": 5, "haarpsi": 4, "ssim": 4, "stlpips": 4, "cvvdp": 3, "quick": 4, "niqe": 2}


@dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes:
        name: Of the scale.
        side: Pixels of a side of a training input.
        test_side: Pixels of a side of a test input.
        pictures: Number of Kodak pictures that are tested on.
        train_inputs: Number of training inputs.
        updates: Updates of a run.
        inputs: Inputs per update.
        group: Rollouts of an input; the reward's gradient needs no more.
        learning_rate: Of AdamW.
    """

    name: str
    side: int
    test_side: int
    pictures: int
    train_inputs: int
    updates: int
    inputs: int
    group: int = 1
    learning_rate: float = 1e-4


QUICK = Scale("quick", 32, 96, 3, 40, 2, 4)
CPU = Scale("cpu", 64, 128, PICTURES, 2400, 80, 12)
GPU = Scale("gpu", 128, 256, PICTURES, 1600, 60, 24)
SCALES = {scale.name: scale for scale in (QUICK, CPU, GPU)}


@lru_cache
def training(scale: Scale) -> StoredPairs:
    """Windows of the training photographs; input i has task i modulo 5."""
    crops, rng = photographs.training(), generator(TRAIN, scale.side)
    count = scale.train_inputs
    corners = torch.randint(crops.shape[-1] - scale.side + 1, (count, 2), generator=rng)
    rows, flips = (torch.randint(most, (count,), generator=rng) for most in (len(crops), 2))
    severity = LOWEST_SEVERITY + (1 - LOWEST_SEVERITY) * torch.rand(count, generator=rng)
    return damaged(photographs.windows(crops, rows, corners, scale.side, flips), severity, seed=TRAIN)


def quarters(images: Tensor) -> Tensor:
    """The four quarters `[4 N, C, H / 2, W / 2]` of each image, those of one image together."""
    rows = [half.chunk(2, 3) for half in images.chunk(2, 2)]
    return torch.stack([part for row in rows for part in row], 1).flatten(0, 1)


def quartered(pairs: StoredPairs) -> StoredPairs:
    """Every quarter of an input as an input of its own."""
    return StoredPairs(quarters(pairs.degraded), quarters(pairs.references))


def severities(pictures: int) -> Tensor:
    """`[pictures, tasks]` severities, spread evenly within each task, in another order for each."""
    even, rng = torch.linspace(LOWEST_SEVERITY, 1, pictures), generator(TEST)
    return torch.stack([even[torch.randperm(pictures, generator=rng)] for _ in TASKS], 1)


@lru_cache
def test(scale: Scale) -> StoredPairs:
    """Centres of the Kodak pictures, each with every task: row 5 p + t is picture p with task t."""
    pictures, margin = photographs.kodak()[: scale.pictures], (256 - scale.test_side) // 2
    centres = pictures[..., margin : 256 - margin, margin : 256 - margin].repeat_interleave(len(TASKS), 0)
    return damaged(centres, severities(scale.pictures).flatten(), seed=TEST)


@dataclass
class Bench:
    """Loads starts and measures models on one device.

    Args:
        scale: The sizes.
        device: "cpu" or "cuda".
        stlpips: File with the weights of ST-LPIPS; that of the package stlpips_pytorch if not given.
    """

    scale: Scale
    device: str = "cpu"
    stlpips: str | None = None
    measures: dict[str, Reward] = field(init=False)

    def __post_init__(self) -> None:
        names = [name for name in DIGITS if name not in ("rmse", "stlpips")]
        self.measures = {name: iqareward.load(name) for name in names} | {"stlpips": self.st_lpips()}

    def st_lpips(self, **options: Any) -> Reward:
        return iqareward.load("stlpips", weights=self.stlpips, **options)

    def accelerator(self) -> Accelerator:
        return Accelerator(cpu=self.device == "cpu", mixed_precision="bf16")

    def start(self, name: str) -> PixelPolicy:
        """The restorer "converged" or "early", with its own sampler."""
        policy = restorer.load(name)
        policy.model.to(device=self.device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return policy

    @torch.no_grad()
    def restored(self, policy: PixelPolicy, pairs: StoredPairs, steps: int | None = None) -> Tensor:
        """Restorations `[N, 3, H, W]` on the CPU, always with the same noise."""
        validation = Validation(pairs, {}, num_steps=steps, inputs_at_once=24)
        with torch.autocast(self.device, torch.bfloat16):
            return validation.restore(policy, *validation.batches, seed=SAMPLER).float()

    @torch.no_grad()
    def measured(self, images: Tensor, pairs: StoredPairs) -> dict[str, list[float]]:
        """Every measure of each image, higher is better but for `rmse`."""
        images, references = images.to(self.device), pairs.references.to(self.device)
        found = {"rmse": rmse(images, references)}
        for name, reward in self.measures.items():
            parts = zip(images.split(24), references.split(24), strict=True)
            found[name] = torch.cat([reward(some, references=own) for some, own in parts])
        return {name: [round(value, DIGITS[name]) for value in values.tolist()] for name, values in found.items()}


def strip(images: Tensor, rows: Sequence[int] = SHOWN) -> str:
    """Some images side by side, as JPEG in base64, at most 128 pixels of each from its centre."""
    shown = images[[row for row in rows if row < len(images)]]
    cut = max(0, shown.shape[-1] - 128) // 2
    centre = shown[..., cut : shown.shape[-2] - cut, cut : shown.shape[-1] - cut]
    pixels = torch.cat(list(centre), 2).clamp(0, 1).mul(255).round().byte().movedim(0, -1).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return base64.b64encode(file.getvalue()).decode()


def unstrip(text: str) -> Image.Image:
    """The images of `strip`."""
    return Image.open(io.BytesIO(base64.b64decode(text)))
