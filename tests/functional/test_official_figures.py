"""The figures that the official MATLAB code gives for three calibration pairs."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from iqareward import functional as F
from tests.tolerances import FORMULA_FP32

PAIRS = ("I03", "I06", "I08")
ROUNDED = "half a unit of the last published digit"
# metric, options of the official run, absolute tolerance, why this much
FIGURES = {
    "psnr": ({}, 5e-3, ROUNDED),
    "ssim": ({"color": "luma8"}, 5e-5, ROUNDED),
    "gmsd": ({"color": "luma8"}, 5e-6, "fp32; in fp64 all published digits agree, see below"),
    "ms_ssim": ({"color": "luma8"}, 4.4e-3, "the official run is a variant that five other packages do not reproduce"),
}


def read_rgb(path) -> Tensor:
    pixels = np.array(Image.open(path).convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).double() / 255


@pytest.fixture(scope="module")
def calibration(fixtures_dir):
    """Published figures by metric, and `[1, 3, 384, 512]` distorted and reference images by pair."""
    folder = fixtures_dir / "calibration"
    with open(folder / "official.csv") as file:
        figures = {row["Method"]: row for row in csv.DictReader(file)}
    pairs = {name: (read_rgb(folder / f"dist/{name}.png"), read_rgb(folder / f"ref/{name}.png")) for name in PAIRS}
    return figures, pairs


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("metric", FIGURES)
def test_official_figures(metric: str, pair: str, calibration) -> None:
    """fp32 scores agree with the published figures to the digits published."""
    figures, pairs = calibration
    options, tolerance, _ = FIGURES[metric]
    images, references = (side.float() for side in pairs[pair])
    score = getattr(F, metric)(images, references, **options)
    assert score.item() == pytest.approx(float(figures[metric][pair]), abs=tolerance)


@pytest.mark.parametrize("pair", PAIRS)
def test_gmsd_to_every_published_digit(pair: str, calibration) -> None:
    """In fp64 GMSD agrees with MATLAB to 1e-12: luma weights, rounding, borders and deviation are all the authors'."""
    figures, pairs = calibration
    score = F.gmsd(*pairs[pair], color="luma8")
    assert score.item() == pytest.approx(float(figures["gmsd"][pair]), abs=1e-12)


@pytest.mark.parametrize(("metric", "difference"), [(F.ssim, 2e-3), (F.gmsd, 3e-4)], ids=["ssim", "gmsd"])
def test_what_rounding_luma_changes(metric, difference: float, calibration) -> None:
    """Leaving out MATLAB's rounding moves the published figures by at most 0.002 SSIM and 0.0003 GMSD."""
    images, references = (torch.cat(side) for side in zip(*calibration[1].values(), strict=True))
    moved = (metric(images, references) - metric(images, references, color="luma8")).abs()
    assert 1e-6 < moved.max().item() < difference


def test_psnr_of_y_is_that_of_restoration_papers() -> None:
    """The Y of MATLAB's rgb2ycbcr, written out in NumPy on 0 to 255: the figure that restoration papers report."""
    levels = np.random.default_rng(0).integers(0, 256, (2, 3, 24, 24)).astype(np.float64)
    red, green, blue = levels.transpose(1, 0, 2, 3)
    y = 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255
    expected = torch.tensor([10 * np.log10(255**2 / np.mean((y[0] - y[1]) ** 2))])
    images, references = torch.from_numpy(levels / 255).split(1)
    torch.testing.assert_close(F.psnr(images, references, color="y"), expected, **FORMULA_FP32)
