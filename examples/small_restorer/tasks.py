"""The five kinds of damage that the small restorer repairs, and data sets that have them in turns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from iqareward.diffusion import Degradation, RealESRGANDegradation, StoredPairs
from iqareward.diffusion.degradations import DegradationModel

TASKS: dict[str, DegradationModel] = {
    "denoising": Degradation(("noise",), max_noise=40),
    "deblurring": Degradation(("blur", "noise"), max_sigma=2.5, max_noise=8),
    "super-resolution": Degradation(("resize",), max_factor=4),
    "jpeg": Degradation(("jpeg",), min_quality=8),
    "blind": RealESRGANDegradation(scale=1),
}


@dataclass(frozen=True)
class InTurns:
    """One degradation for each image, the tasks in turns: id i has task i modulo their number."""

    scale = 1

    def __call__(
        self, images: Tensor, severity: Tensor | None, ids: Sequence[int] | Tensor, *, seed: int = 0
    ) -> Tensor:
        """Degrade each image `[B, 3, H, W]`; `severity` `[B]` in [0, 1], or None for strengths of their own."""
        ids, degraded = [int(each) for each in ids], torch.empty_like(images)
        for number, task in enumerate(TASKS.values()):
            rows = [row for row, each in enumerate(ids) if each % len(TASKS) == number]
            if rows:
                own = None if severity is None else severity[rows]
                degraded[rows] = task(images[rows], own, [ids[row] for row in rows], seed=seed)
        return degraded


def damaged(references: Tensor, severity: Tensor | float, *, seed: int) -> StoredPairs:
    """`references` `[N, 3, H, W]` with damage of `severity`, `[N]` or one for all; row i has task i modulo 5."""
    severities = torch.as_tensor(severity, dtype=torch.float32).expand(len(references))
    return StoredPairs(InTurns()(references, severities, range(len(references)), seed=seed), references)
