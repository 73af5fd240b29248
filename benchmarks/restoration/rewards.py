"""The rewards of the reward study, by name."""

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import Tensor

import iqareward
from benchmarks.restoration import world
from benchmarks.restoration.judges import trained_judge
from benchmarks.restoration.world import JUDGE, VALIDATION, Job
from iqareward import Calibrated, FidelityFloor, LogisticMap, WeightedSum
from iqareward.diffusion import PixelPolicy, Validation
from iqareward.functional.niqe import NaturalModel, fit_natural_model, niqe
from iqareward.rewards.metric import NoReference
from iqareward.types import Reward

MIRRORS = 3  # 3 x 3 mirrored copies of a 32-pixel image have the 96 pixels that NIQE needs
MEMBERS = 3  # of the ensemble
SHARE_BELOW_FLOOR = 0.25
PRISTINE = 300  # scenes that NIQE is fitted on


def mirrored(images: Tensor) -> Tensor:
    """Copies side by side, every other one flipped, so that there are no seams; both sides at least 96."""
    copies = max(MIRRORS, -(-96 // images.shape[-1]))
    for dim in (2, 3):
        images = torch.cat([images.flip(dim) if copy % 2 else images for copy in range(copies)], dim)
    return images


@lru_cache(maxsize=4)
def synthetic_model(size: int, count: int, seed: int) -> NaturalModel:
    """NIQE's statistics of clean synthetic scenes, mirrored like the images that are judged."""
    return fit_natural_model(list(mirrored(world.scenes(size, count, seed))), scales=(1.0,))


def mirrored_niqe(job: Job) -> NoReference:
    """NIQE, fitted on clean synthetic scenes; the library's own model is fitted on photographs."""
    model = synthetic_model(job.scale.size, min(PRISTINE, job.scale.train_inputs), 100 * job.seed + JUDGE)
    return NoReference(lambda images: niqe(mirrored(images), model=model), higher_is_better=False, name="niqe")


def study(job: Job, frozen: PixelPolicy) -> Mapping[str, Callable[[], Reward]]:
    """What builds each reward; `frozen` is the model before RL."""
    return {
        "psnr": lambda: iqareward.load("psnr", differentiable=True),
        "haarpsi": lambda: iqareward.load("haarpsi", differentiable=True),
        "piqe": lambda: iqareward.load("piqe"),
        "niqe": lambda: mirrored_niqe(job),
        "judge": lambda: trained_judge(job, frozen),
        "ensemble": lambda: WeightedSum([(1 / MEMBERS, trained_judge(job, frozen, n)) for n in range(MEMBERS)]),
        "judge with floor": lambda: floored(job, frozen),
    }


def floored(job: Job, frozen: PixelPolicy) -> FidelityFloor:
    """The judge above a floor of PSNR that the frozen model misses on a quarter of the validation inputs."""
    judge, fidelity = trained_judge(job, frozen), iqareward.load("psnr", differentiable=True)
    kept = world.pairs(job.scale, VALIDATION, job.seed)
    validation = Validation(kept, {}, num_steps=job.scale.steps, inputs_at_once=96)
    restored = validation.restore(frozen, *validation.batches, seed=job.seed)
    floor = float(fidelity(restored, references=kept.references).quantile(SHARE_BELOW_FLOOR))
    return FidelityFloor(Calibrated(judge, LogisticMap.fit(judge(restored))), fidelity, floor=floor)
