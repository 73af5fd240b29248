"""BRISQUE against published figures, other packages, the authors' model, and the ways a training batch goes wrong."""

import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import resources

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

import iqareward
from iqareward.functional.brisque import MIN_SIDE, PACKAGED, brisque
from tests.functional.test_niqe import noisy
from tests.gpu import no_waits, on_devices
from tests.tolerances import EXACT, FORMULA_FP32, OTHER_PACKAGE

# (figure of the authors' release, tolerance). In exactly flat regions the release counts the rounding noise of its
# filter by sign, and here it is zero. Other orders of the filter's sums move I08 between 5.16 and 5.59.
OFFICIAL = {"I03": (94.6421, 1e-3), "I06": (0.992889, 2e-4), "I08": (5.35827, 0.56)}


def shipped():
    with resources.as_file(resources.files("iqareward.functional") / "data" / PACKAGED) as path:
        return safe_open(path, framework="pt")


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_official_figures(fixtures_dir, name, dtype):
    """The figures of the authors' release come out, up to its noise in flat regions."""
    pixels = np.asarray(Image.open(fixtures_dir / "calibration" / "dist" / f"{name}.png").convert("RGB"), np.float64)
    image = (torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255).to(dtype)
    figure, tolerance = OFFICIAL[name]
    torch.testing.assert_close(brisque(image), torch.tensor([figure], dtype=dtype), rtol=0.0, atol=tolerance)


def test_model_is_the_authors():
    """Rows of the text `allmodel` in the authors' release, and of its ranges, are in the shipped file."""
    with shipped() as file:
        vectors, weights, low, high = (file.get_tensor(key) for key in ("vectors", "weights", "low", "high"))
    rows = {
        0: (-1024, (-0.596978, -0.136393, -0.248933, 0.432246, -0.769052), (-0.241827, -0.191255)),
        9: (293.0204221462269, (-0.749741, -0.439988, -0.556188, 0.0252192, -0.812375), (-0.479187, -0.559999)),
        773: (1024, (-0.713931, -0.396502, -0.446657, 0.431536, -0.898251), (-0.515538, -0.579269)),
    }
    for index, (weight, first, last) in rows.items():
        torch.testing.assert_close(weights[index], torch.tensor(float(weight)), rtol=1e-7, atol=0.0)
        found = torch.cat((vectors[index, :5], vectors[index, -2:]))
        torch.testing.assert_close(found, torch.tensor((*first, *last)), rtol=1e-7, atol=0.0)
    ranges = torch.stack((low, high), 1)[[0, 1, 3, 35]]
    expected = torch.tensor([(0.338, 10), (0.017204, 0.806612), (-0.123884, 0.20293), (0.001118, 0.370399)])
    torch.testing.assert_close(ranges, expected, rtol=1e-6, atol=0.0)
    licence = resources.files("iqareward.functional") / "data" / "BRISQUE-LICENSE.txt"
    assert "The University of Texas at Austin" in licence.read_text()


@pytest.mark.parametrize("package", ["piq", "pyiqa"])
def test_equals_other_packages_without_flat_regions(package, photographs, monkeypatch):
    """In float64, with the same vectors, even sides and no flat regions, two other packages give the same score.

    The images are grey, because piq rounds the weights of luma to three digits.
    """
    with shipped() as file:
        vectors, weights = file.get_tensor("vectors"), file.get_tensor("weights")
    if package == "piq":
        pytest.importorskip("piq", reason="the extra `perceptual` is not installed")
        monkeypatch.setattr(sys.modules["piq.brisque"], "load_url", lambda *_, **__: (weights, vectors.clone()))
        theirs = partial(sys.modules["piq"].brisque, reduction="none")
    else:
        arch = pytest.importorskip("pyiqa.archs.brisque_arch", reason="the extra `pyiqa` is not installed")
        theirs = partial(arch.brisque, sv_coef=weights, sv=vectors)
    grain = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(3)) * 0.04
    images = ((photographs + grain).clamp(0, 1)[:, 1:2] * 255).round().double().expand(-1, 3, -1, -1) / 255
    torch.testing.assert_close(brisque(images), theirs(images).flatten(), **OTHER_PACKAGE)


def test_degradation_raises_the_score(photographs, degraded_photographs):
    """Every photograph scores better than its coarse and noisy copy, by a twentieth of the scale or more."""
    assert (brisque(degraded_photographs) > brisque(photographs) + 5).all()


def test_score_does_not_depend_on_the_batch():
    """An image alone, in a batch, in another order and beside broken images scores bit-identically."""
    images = noisy(7, 201, 250, batch=7)
    together = brisque(images)
    torch.testing.assert_close(torch.cat([brisque(image[None]) for image in images]), together, **EXACT)
    torch.testing.assert_close(brisque(images.flip(0)), together.flip(0), **EXACT)
    broken = images.clone()
    broken[2, 0, 3, 3], broken[4] = torch.inf, 0.5
    scores = brisque(broken)
    assert scores.isnan().tolist() == [False, False, True, False, True, False, False]
    torch.testing.assert_close(scores[[0, 1, 3, 5, 6]], together[[0, 1, 3, 5, 6]], **EXACT)


def test_float64_agrees():
    """float32 pixels lose nothing beyond the last digits of sums."""
    images = noisy(6, 144, 192, batch=2)
    torch.testing.assert_close(brisque(images).double(), brisque(images.double()), **FORMULA_FP32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (2, 99, 99)])
def test_one_bad_pixel_gives_nan(value, place):
    """One NaN or infinite pixel makes that score NaN."""
    images = noisy(8, 100, 100, batch=2)
    images[(0, *place)] = value
    assert brisque(images).isnan().tolist() == [True, False]


def test_images_without_statistics_are_nan():
    """Flat images of any level have no deviations below zero: NaN, no exception."""
    assert brisque(torch.stack([torch.full((3, 144, 144), level) for level in (0.0, 0.3, 1.0)])).isnan().all()


def test_images_unlike_the_training_set_score_the_constant():
    """Far from every support vector, as for pixels black or white at random, the regression is its constant."""
    strange = torch.rand(1, 1, 256, 256, generator=torch.Generator().manual_seed(0)).round().expand(-1, 3, -1, -1)
    torch.testing.assert_close(brisque(strange), torch.tensor([153.591]), rtol=0.0, atol=1e-3)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    height=st.integers(64, 130),
    width=st.integers(64, 130),
    density=st.sampled_from([0.0005, 0.01, 0.3, 1.0]),
    scale=st.sampled_from([1e-30, 1 / 255, 1.0, 255.0, 1e30]),
)
def test_scores_are_never_infinite(seed, height, width, density, scale):
    """Sparse dots, dense noise, tiny and huge values give a number or NaN."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(2, 3, height, width, generator=generator)
    images = images * (torch.rand(2, 1, height, width, generator=generator) < density) * scale
    scores = brisque(images)
    assert scores.shape == (2,)
    assert not scores.isinf().any()


def test_caller_settings_do_not_matter():
    """Half precision, autocast and grad mode leave the score as it is, and no graph is built."""
    images = noisy(13, 96, 144).bfloat16().float().requires_grad_()
    expected = brisque(images)
    assert not expected.requires_grad
    torch.testing.assert_close(brisque(images.bfloat16()), expected, **EXACT)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        torch.testing.assert_close(brisque(images), expected, **EXACT)


def test_same_scores_from_threads():
    """Concurrent calls neither race nor see each other."""
    batches = [noisy(seed, 100, 100, batch=2) for seed in range(6)]
    expected = [brisque(batch) for batch in batches]
    with ThreadPoolExecutor(3) as pool:
        for got, want in zip(pool.map(brisque, batches), expected):
            torch.testing.assert_close(got, want, **EXACT)


def test_sizes():
    """No images give no scores; images too small are an error as a function and NaN as a reward."""
    assert brisque(torch.empty(0, 3, 96, 96)).shape == (0,)
    with pytest.raises(ValueError, match=f"H, W >= {MIN_SIDE}, got \\[1, 3, 63, 200\\]"):
        brisque(torch.rand(1, 3, 63, 200))
    images = [noisy(2, 64, 63)[0], noisy(2, 64, 64)[0]]
    assert iqareward.load("brisque")(images).isnan().tolist() == [True, False]


def test_reward_is_the_negative(photographs):
    """The reward is minus the published score and has no bounds."""
    reward = iqareward.load("brisque")
    torch.testing.assert_close(reward(photographs), -brisque(photographs), **EXACT)
    assert reward.bounds == (None, None)


@on_devices
def test_any_device_agrees_and_never_waits(device):
    """The same scores as on the CPU, from a call that never synchronises with the host once the model is loaded."""
    images = noisy(15, 255, 320, batch=4)
    images[3] = 0.0
    there = images.to(device)
    brisque(there)
    with no_waits():
        scores = brisque(there)
    torch.testing.assert_close(scores.cpu(), brisque(images), **FORMULA_FP32, equal_nan=True)
