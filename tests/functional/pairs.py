"""The full-reference metrics in one table, and pictures to compare."""

import pytest
import torch
from torch import Tensor

from iqareward import functional as F
from iqareward.functional.gmsd import MIN_SIDE as GMSD_MIN_SIDE
from iqareward.functional.haarpsi import MIN_SIDE as HAARPSI_MIN_SIDE
from iqareward.functional.ms_ssim import MIN_SIDE as MS_SSIM_MIN_SIDE
from iqareward.functional.ssim import WINDOW_SIZE as SSIM_MIN_SIDE

# metric, smallest side, score of identical images, whether higher is better
METRICS = {
    "psnr": (F.psnr, 1, 100.0, True),
    "ssim": (F.ssim, SSIM_MIN_SIDE, 1.0, True),
    "ms_ssim": (F.ms_ssim, MS_SSIM_MIN_SIDE, 1.0, True),
    "gmsd": (F.gmsd, GMSD_MIN_SIDE, 0.0, False),
    "haarpsi": (F.haarpsi, HAARPSI_MIN_SIDE, 1.0, True),
}
METRIC = pytest.mark.parametrize("name", METRICS)
SIDE = 168


def textured(seed: int, batch: int = 3, height: int = SIDE, width: int = SIDE + 6) -> tuple[Tensor, Tensor]:
    """Smooth patches with an edge each, and a noisy copy; float64 `[batch, 3, height, width]` in [0, 1]."""
    rng = torch.Generator().manual_seed(seed)
    patches = torch.rand(batch, 3, height // 8 + 1, width // 8 + 1, generator=rng, dtype=torch.float64)
    references = patches.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :height, :width]
    noise = torch.randn(references.shape, generator=rng, dtype=torch.float64)
    return (references + 0.1 * noise).clamp(0, 1), references
