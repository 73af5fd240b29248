"""What every arm shares: sizes, data, the model, and its SFT checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file, save_file

from iqareward.diffusion import DDIM, PixelPolicy
from iqareward.diffusion.data.degradations import Degradation
from iqareward.diffusion.data.pairs import SyntheticPairs
from iqareward.diffusion.sft import supervised

TASKS = {"super-resolution": ("resize",), "denoising": ("noise",), "deblurring": ("blur",)}
# Seeds of data sets that must not share a scene; the seed of a run is added times 100.
TRAIN, TEST, JUDGE, HELD_OUT_JUDGE = 1, 2, 3, 4


@dataclass(frozen=True)
class Scale:
    """How large an experiment is."""

    name: str
    size: int
    channels: tuple[int, ...]
    layers: int
    sft_updates: int
    sft_batch: int
    judge_updates: int
    rl_updates: int
    inputs: int
    group: int
    steps: int
    test_inputs: int
    train_inputs: int


QUICK = Scale("quick", 16, (8, 8), 1, 4, 4, 3, 2, 4, 2, 3, 9, 32)
CPU = Scale("cpu", 32, (16, 32, 32), 1, 1500, 32, 400, 60, 8, 6, 5, 96, 4096)
GPU = Scale("gpu", 64, (32, 64, 128), 1, 8000, 64, 3000, 150, 32, 8, 6, 384, 100_000)
SCALES = {scale.name: scale for scale in (QUICK, CPU, GPU)}


def pairs(scale: Scale, task: str, purpose: int, seed: int) -> SyntheticPairs:
    """A data set of its own for each purpose and seed."""
    count = scale.test_inputs if purpose == TEST else scale.train_inputs
    return SyntheticPairs(count, size=scale.size, degradation=Degradation(TASKS[task]), seed=100 * seed + purpose)


def untrained(scale: Scale, seed: int) -> PixelPolicy:
    """The model with seeded random weights."""
    blocks = len(scale.channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet: Any = diffusers.UNet2DModel(
            scale.size,
            6,
            3,
            block_out_channels=scale.channels,
            layers_per_block=scale.layers,
            norm_num_groups=8,
            down_block_types=("DownBlock2D",) * blocks,
            up_block_types=("UpBlock2D",) * blocks,
        )
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample": False}
    scheduler: Any = diffusers.DDIMScheduler(**options, rescale_betas_zero_snr=True)
    return PixelPolicy(unet, DDIM(scheduler))


def restorer(scale: Scale, task: str, seed: int, folder: Path, device: str) -> PixelPolicy:
    """The model after SFT; trained once per task and seed, then read from `folder`."""
    policy, file = untrained(scale, seed), folder / f"sft-{task}-{seed}.safetensors"
    policy.model.to(device)
    if file.exists():
        policy.model.load_state_dict(load_file(file, device=device))
        return policy
    continue_sft(policy, scale, task, seed, scale.sft_updates)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(policy.model.state_dict(), file)
    return policy


def continue_sft(policy: PixelPolicy, scale: Scale, task: str, seed: int, updates: int, rate: float = 1e-3) -> None:
    """More SFT on the training data."""
    data = pairs(scale, task, TRAIN, seed)
    supervised(
        policy,
        data,
        num_updates=updates,
        batch_size=scale.sft_batch,
        learning_rate=rate,
        seed=seed,
        show_progress=False,
    )
