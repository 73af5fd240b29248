"""A small validation set of an odd size, its restorations, and the figures that a log should have."""

import torch
from torch import Tensor

import iqareward
from iqareward.functional import psnr

REWARDS = {"ssim": "ssim", "psnr": "psnr"}


def validation_set() -> tuple[Tensor, Tensor]:
    """Eleven degraded images, ever worse, of which one has no score, and their ground truth."""
    rng = torch.Generator().manual_seed(0)
    clean = torch.rand(11, 3, 4, 4, generator=rng).repeat_interleave(8, 2).repeat_interleave(8, 3)
    noise = torch.linspace(0.02, 0.3, 11)[:, None, None, None] * torch.randn(clean.shape, generator=rng)
    degraded = (clean + noise).clamp(0, 1)
    degraded[9, 0, 0, 0] = torch.nan
    return degraded, clean


def restored_of(degraded: Tensor) -> Tensor:
    """Stands for a model."""
    return degraded.lerp(torch.full_like(degraded, 0.5), 0.1)


def expected_figures(prefix: str) -> dict[str, float]:
    """By the plain rewards."""
    degraded, clean = validation_set()
    ease = psnr(degraded, clean).nan_to_num(torch.inf).argsort()[:10]  # ten inputs have a PSNR
    found: dict[str, float] = {}
    for name, reward in REWARDS.items():
        scores = iqareward.load(reward)(restored_of(degraded), references=clean).double()
        found[f"{prefix}/{name}"] = float(scores.nanmean())
        found[f"{prefix}/{name}/unscored"] = 1.0
        found[f"{prefix}/{name}/hard"] = float(scores[ease[:3]].mean())
        found[f"{prefix}/{name}/easy"] = float(scores[ease[7:]].mean())
    return found
