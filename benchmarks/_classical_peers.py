"""Other libraries' implementations of the classical metrics, each called as its documentation says for this definition.

`same` marks peers that compute our definition (luma, valid border, no hidden shrinking); their largest difference from
ours is printed with the speed. Others are shown for what a user would get from their nearest setting.
"""

import importlib
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Metric = Callable[..., Tensor]


class Peer(NamedTuple):
    """One library's version of a metric: `make()` imports it and gives a function of the same batches as ours."""

    library: str
    make: Callable[[], Metric]
    same: bool = True
    note: str = ""


def gray(images: Tensor) -> Tensor:
    weights = images.new_tensor([0.298936, 0.587043, 0.114021]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def rgb(images: Tensor) -> Tensor:
    return images


def function(path: str, planes: Callable[[Tensor], Tensor], **options: object) -> Callable[[], Metric]:
    """A function of a batch, e.g. `piq.ssim`."""

    def make() -> Metric:
        metric = _find(path)
        return lambda images, references: metric(planes(images), planes(references), **options)

    return make


def module(path: str, planes: Callable[[Tensor], Tensor], **options: object) -> Callable[[], Metric]:
    """A module that is built once, e.g. `piqa.SSIM`."""

    def make() -> Metric:
        metric = _find(path)(**options)
        return lambda images, references: metric(planes(images), planes(references))

    return make


def per_image(path: str, planes: Callable[[Tensor], Tensor], **options: object) -> Callable[[], Metric]:
    """A torch function that gives one number or map per call, in a loop."""

    def make() -> Metric:
        metric = _find(path)
        return lambda images, references: torch.stack(
            [metric(a, b, **options).mean() for a, b in zip(planes(images).split(1), planes(references).split(1))]
        )

    return make


def scikit_image(name: str, planes: Callable[[Tensor], Tensor], **options: object) -> Callable[[], Metric]:
    """A scikit-image function, image by image on NumPy arrays."""

    def make() -> Metric:
        metric = _find(f"skimage.metrics.{name}")

        def score(images: Tensor, references: Tensor) -> Tensor:
            pairs = zip(planes(images).numpy(), planes(references).numpy(), strict=True)
            return torch.tensor([metric(reference, image, data_range=1.0, **options) for image, reference in pairs])

        return score

    return make


def pyiqa(name: str) -> Callable[[], Metric]:
    """A pyiqa metric through its network, which is faster than its wrapper."""

    def make() -> Metric:
        create = _find("pyiqa.create_metric")
        return create(name, device=torch.get_default_device()).net

    return make


def pyiqa_niqe() -> Metric:
    """pyiqa's NIQE under our packaged parameters (its own must be downloaded)."""
    from iqareward.functional.niqe import packaged_model
    from iqareward.functional.nss import clipped_luma

    metric = _find("pyiqa.archs.niqe_arch.niqe")
    model = packaged_model(torch.get_default_device())
    mean, covariance, side = model.mean[None], model.covariance, model.block_size

    def score(images: Tensor) -> Tensor:
        plane = (clipped_luma(images)[0] * 255).round().double()[:, None]
        return metric(plane, mean, covariance, side, side)

    return score


def _find(path: str) -> Callable[..., object]:
    parent, _, name = path.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(parent), name)


GAUSSIAN = {"channel_axis": 0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
TORCHMETRICS = "torchmetrics.functional.image"
UNREDUCED = {"data_range": 1.0, "reduction": "none"}
VALID = {"window_size": 11, "padding": "valid"}

PEERS: dict[str, list[Peer]] = {
    "psnr": [
        Peer("pyiqa", pyiqa("psnr")),
        Peer("piq", function("piq.psnr", rgb, reduction="none")),
        Peer("torchmetrics", function(f"{TORCHMETRICS}.peak_signal_noise_ratio", rgb, dim=(1, 2, 3), **UNREDUCED)),
        Peer("kornia", per_image("kornia.metrics.psnr", rgb, max_val=1.0), note="image by image"),
        Peer("scikit-image", scikit_image("peak_signal_noise_ratio", rgb), note="image by image"),
        Peer("piqa", module("piqa.PSNR", rgb, reduction="none")),
    ],
    "ssim": [
        Peer("pyiqa", pyiqa("ssim"), note="float64; luma in 8 bits, negative structure floored"),
        Peer("piq", function("piq.ssim", gray, downsample=False, reduction="none")),
        Peer("pytorch-msssim", function("pytorch_msssim.ssim", gray, data_range=1.0, size_average=False)),
        Peer("piqa", module("piqa.SSIM", gray, n_channels=1, reduction="none")),
        Peer(
            "torchmetrics",
            function(f"{TORCHMETRICS}.structural_similarity_index_measure", gray, **UNREDUCED),
            same=False,
            note="padded border",
        ),
        Peer("kornia", per_image("kornia.metrics.ssim", gray, **VALID), note="image by image"),
        Peer("scikit-image", scikit_image("structural_similarity", gray, **GAUSSIAN), note="image by image"),
    ],
    "ssim_rgb": [
        Peer("pyiqa", pyiqa("ssimc"), note="float64; negative structure floored"),
        Peer("piq", function("piq.ssim", rgb, downsample=False, reduction="none")),
        Peer("pytorch-msssim", function("pytorch_msssim.ssim", rgb, data_range=1.0, size_average=False)),
        Peer("piqa", module("piqa.SSIM", rgb, reduction="none")),
        Peer(
            "torchmetrics",
            function(f"{TORCHMETRICS}.structural_similarity_index_measure", rgb, **UNREDUCED),
            same=False,
            note="padded border",
        ),
        Peer("kornia", per_image("kornia.metrics.ssim", rgb, **VALID), note="image by image"),
        Peer("scikit-image", scikit_image("structural_similarity", rgb, **GAUSSIAN), note="image by image"),
    ],
    "ms_ssim": [
        Peer("pyiqa", pyiqa("ms_ssim"), note="float64; luma in 8 bits, negative structure floored"),
        Peer("piq", function("piq.multi_scale_ssim", gray, reduction="none")),
        Peer("pytorch-msssim", function("pytorch_msssim.ms_ssim", gray, data_range=1.0, size_average=False)),
        Peer("piqa", module("piqa.MS_SSIM", gray, n_channels=1, reduction="none")),
        Peer(
            "torchmetrics",
            function(f"{TORCHMETRICS}.multiscale_structural_similarity_index_measure", gray, **UNREDUCED),
            same=False,
            note="padded border",
        ),
    ],
    "gmsd": [
        Peer("pyiqa", pyiqa("gmsd"), note="luma rounded to 8 bits"),
        Peer("piq", function("piq.gmsd", gray, reduction="none")),
        Peer("piqa", module("piqa.GMSD", rgb, reduction="none")),
    ],
    "haarpsi": [
        Peer("piq", function("piq.haarpsi", rgb, reduction="none"), note="YIQ matrix of four digits"),
        Peer("piqa", module("piqa.HaarPSI", rgb, reduction="none"), note="YIQ matrix of four digits"),
    ],
    "piqe": [Peer("pyiqa", pyiqa("piqe"))],
    "niqe": [Peer("pyiqa", pyiqa_niqe, note="under our parameters")],
}
