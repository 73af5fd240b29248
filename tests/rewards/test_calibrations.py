"""The calibrations that ship: every reward that needs one has it or says why not, and `load` uses them in sums."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from iqareward import AffineMap, Calibrated, CDFMap, LogisticMap, WeightedSum, load
from iqareward.diffusion.degradations import blur
from iqareward.functional.resize import pillow_resize
from iqareward.image_files import read_image
from iqareward.images import to_images
from iqareward.rewards.calibrations import calibrations, uncalibrated
from iqareward.rewards.catalog import CATALOG, on_unit_scale
from tests.tolerances import EXACT, OTHER_PACKAGE

KODAK = Path(__file__).parents[3] / "shared" / "data" / "kodak24"
CORE = [  # with nothing to download or install
    name
    for name in calibrations()
    if name not in CATALOG or (CATALOG[name].weights in ("", "package:iqareward") and not CATALOG[name].extra)
]


def leaves_unit(name: str) -> bool:
    low, high = CATALOG[name].bounds
    return low is None or high is None or low < -1 or high > 1


@pytest.mark.parametrize("name", [name for name in CATALOG if leaves_unit(name)])
def test_every_reward_on_another_scale_has_a_calibration_or_a_reason(name: str) -> None:
    """After adding a reward run `python -m benchmarks.fit_calibration --only NAME --write`, or write the reason."""
    assert (name in calibrations()) != bool(uncalibrated().get(name))


def test_no_calibration_is_of_an_unknown_reward() -> None:
    """Every name in the file is one that `load` knows."""
    assert {name.partition("(")[0] for name in calibrations()} | uncalibrated().keys() <= CATALOG.keys()


@pytest.mark.parametrize("name", calibrations())
def test_calibrations_rise_everywhere_on_the_usual_range(name: str) -> None:
    """Each is strictly increasing between bad and best scores in float32, with a gradient that is not lost."""
    low, high = CATALOG[name.partition("(")[0]].usual
    scores = torch.linspace(low, high, 201, requires_grad=True)
    mapped = calibrations()[name](scores)
    (slopes,) = torch.autograd.grad(mapped.sum(), scores)
    assert (mapped.diff() > 0).all()
    assert (slopes > 0).all()
    assert mapped[0] < 0.2
    assert mapped[-1] > 0.8


def kodak() -> Tensor:
    """The centres of six photographs that took no part in the fit, `[6, 3, 256, 256]`."""
    if not KODAK.is_dir():
        pytest.skip(f"needs Kodak's photographs in {KODAK}")
    images = [to_images(read_image(path)[None])[0] for path in sorted(KODAK.glob("*.png"))[::4]]
    return torch.stack([
        image[:, (image.shape[1] - 256) // 2 :, (image.shape[2] - 256) // 2 :][:, :256, :256] for image in images
    ])  # fmt: skip


@pytest.mark.parametrize("name", CORE)
def test_held_out_photographs(name: str) -> None:
    """The best images come near the top and the worst near the bottom, in the order of their damage."""
    images, reward = kodak(), load(f"{name}[calibrated]")
    sigmas = (None, 1.0, 2.0, 4.0)
    damaged = [images if sigma is None else blur(images, torch.full((len(images),), sigma)) for sigma in sigmas]
    damaged.append(pillow_resize(pillow_resize(damaged[-1], (16, 16)), (256, 256)))
    rows = [reward(each.clamp(0, 1), references=images) for each in damaged]
    means = torch.stack(rows).mean(1)
    assert means[0] > 0.7
    assert means[-1] < 0.15
    assert (means[:4].diff() < 0).all()  # PIQE itself ends at -100
    assert all(((row > 0) & (row <= 1)).all() for row in rows)


def test_a_sum_of_load_is_the_sum_by_hand(photographs: Tensor, degraded_photographs: Tensor) -> None:
    """A part on another scale is calibrated, which its name shows; an explicit range and a lone name stay."""
    maps = calibrations()
    reward = load("0.7*haarpsi + 0.2*psnr + 0.1*niqe[-12, 0]")
    assert reward.name == load(reward.name).name == "0.7*haarpsi + 0.2*psnr[calibrated] + 0.1*niqe[-12, 0]"
    by_hand = WeightedSum([
        (0.7, load("haarpsi")),
        (0.2, Calibrated(load("psnr"), maps["psnr"])),
        (0.1, Calibrated(load("niqe"), AffineMap(-12.0, 0.0), name="niqe by hand")),
    ])  # fmt: skip
    scores = reward(degraded_photographs, references=photographs)
    torch.testing.assert_close(scores, by_hand(degraded_photographs, references=photographs), **EXACT)
    assert reward.bounds == pytest.approx((0.0, 1.0))
    assert load("psnr").name == "psnr"
    assert load("2*psnr").name == "2*psnr"
    alone = load("PSNR[ calibrated ]")(degraded_photographs, references=photographs)
    torch.testing.assert_close(alone, maps["psnr"](load("psnr")(degraded_photographs, references=photographs)), **EXACT)


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({"ssim": 0.5, "gmsd": 0.5}, "0.5*ssim + 0.5*gmsd[calibrated]"),
        ([{"name": "psnr", "range": "calibrated", "weight": 2}, "ssim"], "2*psnr[calibrated] + 1*ssim"),
        ("ssim + psnr(color=y)", "1*ssim + 1*psnr(color=y)[calibrated]"),
        ("haarpsi[calibrated] + psnr[20, 40]", "1*haarpsi[calibrated] + 1*psnr[20, 40]"),
        ("ssim - 0.5*gmsd[calibrated]", "1*ssim + -0.5*gmsd[calibrated]"),
    ],
)
def test_every_way_to_write_a_sum(spec: object, name: str) -> None:
    """Mappings, lists and options are calibrated as texts are, and what is asked for is not asked back."""
    assert load(spec).name == name


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("qalign[calibrated]", r"qalign has no shipped calibration: its scores lie in \[0, 1\]"),
        (
            "ssim - 0.5*gmsd",
            r"subtracts gmsd: higher is better here already; .* write 'ssim - 0\.5\*gmsd\[calibrated\]'",
        ),
        ({"name": "psnr", "range": "fitted"}, r"`range` of 'psnr' as \[low, high\] or 'calibrated', got 'fitted'"),
        ("psnr[fitted]", "could not read"),
    ],
)
def test_what_is_not_calibrated(spec: object, message: str) -> None:
    """A reward on [0, 1] needs no calibration, a distance is not subtracted by mistake, and no other word is taken."""
    with pytest.raises(ValueError, match=message):
        load(spec)


def test_a_reward_without_a_calibration_says_why() -> None:
    """Alone with the reason, in a sum with the line to write."""
    pytest.importorskip("piq")
    with pytest.raises(
        ValueError, match=r"lpips has no shipped calibration: its weights .*\[low, high\]', or fit a map"
    ):
        load("lpips[calibrated]")
    with pytest.raises(ValueError, match=r"no calibration of it ships\. Write '0\.5\*ssim \+ 0\.5\*lpips\[-1, 0\]'"):
        load("0.5*ssim + 0.5*lpips")
    with pytest.raises(ValueError, match=r"no calibration of it ships\. Write 'dists\[-1, 0\]'"):
        on_unit_scale("dists", load("dists"))


def test_the_kind_of_map_is_one_without_plateaus() -> None:
    """A policy that leaves the range of the fit still learns: only a logistic map has a slope there."""
    assert all(isinstance(each, LogisticMap) for each in calibrations().values())
    beyond = torch.tensor([0.0, 60.0], requires_grad=True)
    for score_map, flat in ((calibrations()["psnr"], False), (CDFMap((10.0, 50.0), (0.0, 1.0)), True)):
        (slopes,) = torch.autograd.grad(score_map(beyond).sum(), beyond)
        assert bool((slopes == 0).all()) is flat


def test_gradients_reach_the_pixels(photographs: Tensor) -> None:
    """A calibrated part of a differentiable sum has the gradient that the chain rule gives."""
    images = (0.9 * photographs[:1]).requires_grad_()
    (together,) = torch.autograd.grad(
        load("psnr[calibrated]", differentiable=True)(images, references=photographs[:1]).sum(), images
    )
    raw = load("psnr", differentiable=True)(images, references=photographs[:1])
    (by_hand,) = torch.autograd.grad(calibrations()["psnr"](raw).sum(), images)
    torch.testing.assert_close(together, by_hand, **OTHER_PACKAGE)
