"""The same pictures through other packages: equal where the definition is, and a named step where it is not."""

import warnings

import pytest
import torch
from torch import Tensor

from iqareward import functional as F
from iqareward.functional.color import luma
from tests.tolerances import OTHER_PACKAGE


def gray(images: Tensor) -> Tensor:
    return luma(images).unsqueeze(1)


def piq_metric(name: str, planes=gray, **options):
    piq = pytest.importorskip("piq")
    return lambda images, references: getattr(piq, name)(
        planes(images), planes(references), reduction="none", **options
    )


def piqa_metric(name: str, planes=gray, **options):
    module = getattr(pytest.importorskip("piqa"), name)(reduction="none", **options)
    return lambda images, references: module(planes(images), planes(references))


def msssim_metric(name: str, planes=gray):
    package = pytest.importorskip("pytorch_msssim")
    return lambda images, references: getattr(package, name)(
        planes(images), planes(references), data_range=1, size_average=False
    )


def torchmetrics_metric(name: str, planes=gray, **options):
    functional = pytest.importorskip("torchmetrics.functional.image")
    return lambda images, references: getattr(functional, name)(
        planes(images), planes(references), data_range=1.0, reduction="none", **options
    )


def kornia_metric(name: str, planes=gray, **options):
    with warnings.catch_warnings():  # kornia uses torch.jit, deprecated in torch 2.15, when it is imported
        warnings.simplefilter("ignore")
        metrics = pytest.importorskip("kornia.metrics")
    metric = getattr(metrics, name)
    return lambda images, references: torch.stack(
        [metric(*pair, **options).mean() for pair in zip(planes(images).split(1), planes(references).split(1))]
    )


def skimage_metric(name: str, planes=gray, **options):
    metric = getattr(pytest.importorskip("skimage.metrics"), name)
    return lambda images, references: torch.tensor(
        [
            float(metric(*pair, data_range=1, **options))
            for pair in zip(planes(references).numpy(), planes(images).numpy())
        ]
    )


def pyiqa_metric(name: str):
    with warnings.catch_warnings():  # pyiqa's own imports warn about themselves
        warnings.simplefilter("ignore")
        network = pytest.importorskip("pyiqa").create_metric(name, device="cpu").net
    return lambda images, references: network(images, references).flatten().float()


def rgb(images: Tensor) -> Tensor:
    return images


GAUSSIAN = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0}
SAME_MATHEMATICS = {
    "psnr: piq": (F.psnr, {}, lambda: piq_metric("psnr", rgb)),
    "psnr: torchmetrics": (F.psnr, {}, lambda: torchmetrics_metric("peak_signal_noise_ratio", rgb, dim=(1, 2, 3))),
    "psnr: kornia": (F.psnr, {}, lambda: kornia_metric("psnr", rgb, max_val=1.0)),
    "psnr: scikit-image": (F.psnr, {}, lambda: skimage_metric("peak_signal_noise_ratio", rgb)),
    "psnr: piqa": (F.psnr, {}, lambda: piqa_metric("PSNR", rgb)),
    "psnr: pyiqa": (F.psnr, {}, lambda: pyiqa_metric("psnr")),
    "psnr luma: scikit-image": (F.psnr, {"color": "luma"}, lambda: skimage_metric("peak_signal_noise_ratio")),
    "ssim: piq": (F.ssim, {}, lambda: piq_metric("ssim", downsample=False)),
    "ssim: kornia": (F.ssim, {}, lambda: kornia_metric("ssim", window_size=11, padding="valid")),
    "ssim: scikit-image": (F.ssim, {}, lambda: skimage_metric("structural_similarity", **GAUSSIAN)),
    "ssim: pytorch-msssim": (F.ssim, {}, lambda: msssim_metric("ssim")),
    "ssim: piqa": (F.ssim, {}, lambda: piqa_metric("SSIM", n_channels=1)),
    "ssim rgb: piq": (F.ssim, {"color": "rgb"}, lambda: piq_metric("ssim", rgb, downsample=False)),
    "ssim rgb: kornia": (F.ssim, {"color": "rgb"}, lambda: kornia_metric("ssim", rgb, window_size=11, padding="valid")),
    "ssim rgb: scikit-image": (
        F.ssim,
        {"color": "rgb"},
        lambda: skimage_metric("structural_similarity", rgb, **GAUSSIAN),
    ),
    "ssim rgb: pytorch-msssim": (F.ssim, {"color": "rgb"}, lambda: msssim_metric("ssim", rgb)),
    "ssim rgb: piqa": (F.ssim, {"color": "rgb"}, lambda: piqa_metric("SSIM", rgb)),
    "ms_ssim: piq": (F.ms_ssim, {}, lambda: piq_metric("multi_scale_ssim")),
    "ms_ssim: pytorch-msssim": (F.ms_ssim, {}, lambda: msssim_metric("ms_ssim")),
    "ms_ssim: piqa": (F.ms_ssim, {}, lambda: piqa_metric("MS_SSIM", n_channels=1)),
    "ms_ssim rgb: pytorch-msssim": (F.ms_ssim, {"color": "rgb"}, lambda: msssim_metric("ms_ssim", rgb)),
    "gmsd: piq": (F.gmsd, {}, lambda: piq_metric("gmsd")),
    "gmsd: piqa": (F.gmsd, {}, lambda: piqa_metric("GMSD", rgb)),
}


@pytest.mark.parametrize("row", SAME_MATHEMATICS)
def test_same_definition(row: str, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """Another package agrees on photographs once its options select the published definition."""
    ours, options, peer = SAME_MATHEMATICS[row]
    scores = ours(degraded_photographs, photographs, **options)
    torch.testing.assert_close(scores, peer()(degraded_photographs, photographs).flatten(), **OTHER_PACKAGE)


OTHER_MATHEMATICS = {
    "ssim: torchmetrics": (F.ssim, {}, lambda: torchmetrics_metric("structural_similarity_index_measure"), 5e-3,
                           "reflects the border and averages there too"),
    "ssim: pyiqa": (F.ssim, {"color": "luma8"}, lambda: pyiqa_metric("ssim"), 1e-3,
                    "floors negative contrast-structure at 0"),
    "ssim rgb: pyiqa": (F.ssim, {"color": "rgb"}, lambda: pyiqa_metric("ssimc"), 2e-3,
                        "floors negative contrast-structure at 0"),
    "ms_ssim: torchmetrics": (F.ms_ssim, {}, lambda: torchmetrics_metric(
        "multiscale_structural_similarity_index_measure"), 1e-3, "reflects the border and averages there too"),
    "ms_ssim: pyiqa": (F.ms_ssim, {"color": "luma8"}, lambda: pyiqa_metric("ms_ssim"), 1e-3,
                       "floors negative contrast-structure at 0"),
    "gmsd: pyiqa": (F.gmsd, {"color": "luma8"}, lambda: pyiqa_metric("gmsd"), 5e-5, "luma weights of three digits"),
    "haarpsi: piq": (F.haarpsi, {}, lambda: piq_metric("haarpsi", rgb), 2e-4, "YIQ matrix of four digits"),
    "haarpsi: piqa": (F.haarpsi, {}, lambda: piqa_metric("HaarPSI", rgb), 2e-4, "YIQ matrix of four digits"),
}  # fmt: skip


@pytest.mark.parametrize("row", OTHER_MATHEMATICS)
def test_named_difference(row: str, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """Where a package takes one step differently, its scores stay as near as that step allows."""
    ours, options, peer, tolerance, _ = OTHER_MATHEMATICS[row]
    scores = ours(degraded_photographs, photographs, **options)
    torch.testing.assert_close(scores, peer()(degraded_photographs, photographs).flatten(), rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("peer", ["piq", "piqa"])
def test_haarpsi_without_colour(peer: str, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """On gray pictures, where the rounding of the YIQ matrix has no effect, HaarPSI is the same everywhere."""
    images, references = (gray(batch).expand(-1, 3, -1, -1) for batch in (degraded_photographs, photographs))
    metric = piq_metric("haarpsi", rgb) if peer == "piq" else piqa_metric("HaarPSI", rgb)
    torch.testing.assert_close(F.haarpsi(images, references), metric(images, references), **OTHER_PACKAGE)


def test_ms_ssim_of_odd_sizes(photographs: Tensor, degraded_photographs: Tensor) -> None:
    """Odd sides are halved as in the authors' code and piqa (others pad with zeros and differ by up to 0.008)."""
    images, references = degraded_photographs[..., :187, :173], photographs[..., :187, :173]
    peer = piqa_metric("MS_SSIM", n_channels=1)
    torch.testing.assert_close(F.ms_ssim(images, references), peer(images, references), **OTHER_PACKAGE)
