"""What every arm shares: sizes, data, the model, and its SFT checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks._photographs import PHOTOGRAPHS, load_photograph
from examples.small_restorer.network import SmallUNet
from iqareward.diffusion import DDIM, Degradation, PixelPolicy, StoredPairs, supervised, synthetic_images
from iqareward.seeds import generator

TASKS = {
    "super-resolution": Degradation(("resize",)),
    "denoising": Degradation(("noise",)),
    "deblurring": Degradation(("blur", "noise"), max_sigma=2.0, max_noise=12.0),
}
# Purposes of data sets, which share no scene; the seed of a run is added times 100.
TRAIN, TEST, JUDGE, HELD_OUT_JUDGE, VALIDATION = 1, 2, 3, 4, 5
PHOTOGRAPH_SIDE = 6  # the shorter side of a photograph, in crops
SFT_RATE, SFT_AVERAGE = 2e-3, 0.99


@dataclass(frozen=True)
class Scale:
    """How large an experiment is."""

    name: str
    size: int
    width: int
    depth: int
    sft_updates: int
    sft_batch: int
    judge_updates: int
    rl_updates: int
    inputs: int
    group: int
    steps: int
    test_inputs: int
    train_inputs: int


QUICK = Scale("quick", 16, 8, 1, 4, 6, 3, 2, 6, 2, 3, 27, 72)
CPU = Scale("cpu", 32, 16, 4, 3000, 32, 500, 60, 16, 2, 4, 288, 3072)
GPU = Scale("gpu", 64, 64, 4, 8000, 96, 3000, 200, 48, 8, 6, 576, 50_000)
SCALES = {scale.name: scale for scale in (QUICK, CPU, GPU)}


@dataclass(frozen=True)
class Job:
    """One arm with one seed: what a result belongs to."""

    scale: Scale
    seed: int
    arm: str
    folder: Path
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Also the name of its files."""
        return f"{self.seed}-{self.arm}".translate(str.maketrans({" ": "_", ",": None, ":": None}))

    @property
    def shared(self) -> Path:
        """Where everything lies that the arms of a seed share."""
        return self.folder / "shared"


@dataclass(frozen=True, eq=False)
class Kept(StoredPairs):
    """Pairs that are made once: N degraded images, their references and how damaged they are."""

    severity: Tensor

    @classmethod
    def damaged(cls, references: Tensor, tasks: Sequence[Degradation], seed: int) -> "Kept":
        """Each scene with a severity and noise of its own, the tasks in turns: row i has task i modulo their number."""
        severity = torch.rand(len(references), generator=generator(seed, len(references)))
        degraded = torch.empty_like(references)
        for number, task in enumerate(tasks):
            rows = list(range(number, len(references), len(tasks)))
            degraded[rows] = task(references[rows], severity[rows], rows, seed=seed)
        return cls(degraded, references, severity)


@lru_cache(maxsize=8)
def scenes(size: int, count: int, seed: int) -> Tensor:
    """`[count, 3, size, size]` clean synthetic images."""
    return synthetic_images(range(count), size=size, seed=seed)


@lru_cache(maxsize=8)
def pairs(scale: Scale, purpose: int, seed: int) -> Kept:
    """A data set of its own for each purpose and seed, of all three tasks."""
    count = {TRAIN: scale.train_inputs, TEST: scale.test_inputs}.get(purpose, scale.train_inputs // 4)
    seed = 100 * seed + purpose
    return Kept.damaged(scenes(scale.size, count, seed), list(TASKS.values()), seed)


@lru_cache(maxsize=1)
def photographs(scale: Scale) -> Kept:
    """Crops of the photographs of scikit-image, degraded like the test images; the same for all seeds."""
    pick, crops = generator(0, scale.size), []
    each = scale.test_inputs // (3 * len(PHOTOGRAPHS))
    for photograph in PHOTOGRAPHS:
        picture = load_photograph(photograph, PHOTOGRAPH_SIDE * scale.size)
        windows = picture.unfold(1, scale.size, scale.size).unfold(2, scale.size, scale.size).flatten(1, 2)
        crops += [windows[:, place] for place in torch.randperm(windows.shape[1], generator=pick)[:each].tolist()]
    crops = [crops[place] for place in torch.randperm(len(crops), generator=pick).tolist()]
    return Kept.damaged(torch.stack(crops), list(TASKS.values()), 7)


def untrained(scale: Scale, seed: int) -> PixelPolicy:
    """The model with seeded random weights: at first it leaves the degraded image as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = SmallUNet(scale.width, scale.depth)
    options: dict[str, Any] = {"prediction_type": "sample", "timestep_spacing": "trailing", "clip_sample": False}
    scheduler: Any = DDIMScheduler(**options, rescale_betas_zero_snr=True)
    return PixelPolicy(unet, DDIM(scheduler), residual=True)


def restorer(job: Job) -> PixelPolicy:
    """The model after SFT; trained once per seed, then read from its file."""
    policy, file = untrained(job.scale, job.seed), job.shared / f"sft-{job.seed}.safetensors"
    policy.model.to(job.device)
    if not file.exists():
        continue_sft(policy, job, job.scale.sft_updates, rate=SFT_RATE, seed=job.seed)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(policy.model.state_dict(), file)
    policy.model.load_state_dict(load_file(file, device=job.device))
    return policy


def continue_sft(policy: PixelPolicy, job: Job, updates: int, *, rate: float, seed: int) -> list[float]:
    """More SFT on the training data; the loss of every update."""
    return supervised(
        policy,
        pairs(job.scale, TRAIN, job.seed),
        num_updates=updates,
        batch_size=job.scale.sft_batch,
        learning_rate=rate,
        ema_decay=SFT_AVERAGE,
        accelerator=Accelerator(cpu=job.device == "cpu"),
        seed=seed,
        show_progress=False,
    )
