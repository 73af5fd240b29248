"""Full-reference metrics of the piq package, with direction, batching and undefined cases settled."""

from typing import NamedTuple, final

import torch
from torch import Tensor

from iqareward.optional import require
from iqareward.rewards.core import ImageReward
from iqareward.rewards.loading import plain_defaults
from iqareward.types import Bounds


class _Metric(NamedTuple):
    function: str  # in piq
    higher_is_better: bool
    min_side: int
    double: bool = False  # in float64, each image on its own


# min_side: SR-SIM, DSS and IW-SSIM raise or divide by zero below; the others stay defined down to a pixel, but their
# smallest filters (wavelength 6, Prewitt and Scharr kernels after a down-scaling) then see hardly anything but border.
_METRICS = {
    "fsim": _Metric("fsim", True, 8),
    "vsi": _Metric("vsi", True, 8),
    "mdsi": _Metric("mdsi", False, 8),
    # piq normalises SR-SIM's saliency by the extremes of the whole batch, so a score would depend on its neighbours (by
    # 0.3 on nearly flat images). In float32 all three lose digits on nearly flat or striped images: up to 0.02 in
    # IW-SSIM (which inverts a covariance), 0.02 in SR-SIM, 3e-4 in DSS, and other ones in another batch. The metrics
    # above agree with float64 within 1e-6 there.
    "srsim": _Metric("srsim", True, 40, double=True),
    "dss": _Metric("dss", True, 32, double=True),
    "iwssim": _Metric("information_weighted_ssim", True, 161, double=True),
}


@final
class PIQReward(ImageReward):
    """Closeness to the reference by a metric of the piq package: fsim, vsi, mdsi, srsim, dss or iwssim.

    An image that equals its reference has exactly the best score. Otherwise scores are NaN where the reference is one
    flat colour, because these metrics compare structure and would call a black and a white image the same, and where
    the metric has no value, as for IW-SSIM on stripes and nearly empty images. Scores carry no gradient: piq's is
    non-finite on many ordinary photographs (FSIM 16 of 30, VSI 18 of 30).

    Args:
        metric: `"fsim"`, `"vsi"`, `"srsim"`, `"dss"`, `"iwssim"`: similarity, 1 = identical; `"mdsi"`: minus the
            deviation, 0 = identical.
        differentiable: only False.
        batch_size: images per call of piq; None = as many as fit the budget of memory. SR-SIM, DSS and IW-SSIM are
            always computed one image at a time, in float64.

    Raises:
        ValueError: an unknown metric, or `differentiable=True`.
        ImportError: piq is not installed.

    Example:
        >>> import torch
        >>> reward = PIQReward("vsi")
        >>> images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reward(images, references=images)
        tensor([1., 1.])

    References:
        Zhang et al., "FSIM: A Feature Similarity Index for Image Quality Assessment", 2011,
        https://doi.org/10.1109/TIP.2011.2109730
        Zhang et al., "VSI: A Visual Saliency-Induced Index for Perceptual Image Quality Assessment", 2014,
        https://doi.org/10.1109/TIP.2014.2346028
        Nafchi et al., "Mean Deviation Similarity Index", 2016, https://arxiv.org/abs/1608.07433
        Zhang and Li, "SR-SIM: A fast and high performance IQA index based on spectral residual", 2012,
        https://doi.org/10.1109/ICIP.2012.6467149
        Balanov et al., "Image quality assessment based on DCT subband similarity", 2015,
        https://doi.org/10.1109/ICIP.2015.7351172
        Wang and Li, "Information Content Weighting for Perceptual Image Quality Assessment", 2011,
        https://doi.org/10.1109/TIP.2010.2092435
    """

    needs_references = True
    bytes_per_pixel = 256  # FSIM's working memory; the others take less, or one image at a time

    def __init__(self, metric: str, *, differentiable: bool = False, batch_size: int | None = None) -> None:
        if metric not in _METRICS:
            raise ValueError(f"PIQReward expected `metric` to be one of {', '.join(_METRICS)}, got {metric!r}.")
        if differentiable:
            raise ValueError(
                f"PIQReward({metric!r}) expected differentiable=False, got True: piq's gradient has NaN on ordinary "
                "images. Differentiable alternatives: ssim, ms_ssim, gmsd, haarpsi, LPIPSReward, DISTSReward."
            )
        require("piq", extra="perceptual", purpose=f"PIQReward({metric!r})")
        self.name, self.min_side = metric, _METRICS[metric].min_side
        self.batch_size = 1 if _METRICS[metric].double else batch_size
        self.bounds: Bounds = (0.0, 1.0) if _METRICS[metric].higher_is_better else (None, 0.0)

    def score_batch(self, images: Tensor, references: Tensor) -> Tensor:
        """Piq's value of each pair, higher is better."""
        metric = _METRICS[self.name]
        pair = (images.double(), references.double()) if metric.double else (images, references)
        with plain_defaults(f"PIQReward({self.name!r})"):
            piq = require("piq", extra="perceptual", purpose=f"PIQReward({self.name!r})")
            try:
                values = getattr(piq, metric.function)(*pair, data_range=1.0, reduction="none")
            except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
                # IW-SSIM, one image at a time, inverts a covariance that is singular for one with too little content
                values = images.new_full((1,), torch.nan)
        # similarities overshoot 1 by a rounding error
        scores = values.clamp(0, 1) if metric.higher_is_better else torch.neg(values.clamp(min=0))
        flat = (references.amax((2, 3)) == references.amin((2, 3))).all(1)
        identical = (images == references).flatten(1).all(1)
        best = 1.0 if metric.higher_is_better else 0.0
        return torch.where(identical, best, torch.where(flat, torch.nan, scores))
