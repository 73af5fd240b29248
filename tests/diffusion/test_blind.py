"""Published degradations: the kernels' formulas, the published statistics, severity, and independence of the batch."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from iqareward.agreement import spearman
from iqareward.difficulty import rmse
from iqareward.diffusion import DegradationOrder, FaceDegradation, RealESRGANDegradation, synthetic_images
from iqareward.diffusion.blind import SECOND_ORDER, convolved, gaussian_kernel, sinc_kernel
from tests.tolerances import EXACT, FORMULA_FP32

MODELS = [RealESRGANDegradation(), RealESRGANDegradation(scale=1), FaceDegradation()]
NAMES = ("x4", "x1", "face")


def enlarged(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=side, mode="bicubic", align_corners=False).clamp(0, 1)


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_damage_grows_with_severity(model):
    """RMSE of an input that is only enlarged, the difficulty of a model that does nothing, follows the severity."""
    severity = torch.linspace(0, 1, 17)
    ranks = []
    for row in range(12):
        image = synthetic_images([row], size=64).expand(17, -1, -1, -1)
        ranks.append(spearman(rmse(enlarged(model(image, severity, [row] * 17), 64), image), severity))
    assert min(ranks) > 0.6
    assert sum(ranks) / 12 > 0.9
    # Across different images the detail that any reduction to a quarter loses differs as much as the damage.
    images, severity = synthetic_images(range(64), size=64), torch.linspace(0, 1, 64)
    across = spearman(rmse(enlarged(model(images, severity, range(64)), 64), images), severity)
    assert across > (0.4 if model.scale == 4 else 0.7)


@pytest.mark.parametrize("severities", [True, False])
@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_a_result_does_not_depend_on_its_batch(model, severities):
    """Alone and in a batch the same to the last bit, in [0, 1], in 8 bits, in the promised size; seeds differ."""
    images, severity = synthetic_images(range(6), size=48)[..., :40], torch.linspace(0, 1, 6) if severities else None
    together = model(images, severity, range(6), seed=3)
    assert together.shape == (6, 3, 48 // model.scale, 40 // model.scale)
    torch.testing.assert_close((together * 255).round() / 255, together, **EXACT)
    assert together.amin() >= 0
    assert together.amax() <= 1
    for row in range(6):
        own = None if severity is None else severity[row : row + 1]
        torch.testing.assert_close(model(images[row : row + 1], own, [row], seed=3)[0], together[row], **EXACT)
    assert not model(images, severity, range(6), seed=4).equal(together)


@pytest.mark.parametrize("model", MODELS, ids=NAMES)
def test_a_result_does_not_depend_on_the_number_of_threads(model):
    """A worker process has one thread, the trainer's own process has several."""
    images, before = synthetic_images(range(4), size=128), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(model(images, None, range(4)))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, **EXACT)


def test_size_factors_are_as_published():
    """The first order enlarges 0.2, keeps 0.1 and reduces 0.7 of the images, the second 0.3, 0.3 and 0.4."""
    quantiles = torch.linspace(0, 1, 1001).tolist()
    for order, (up, keep), (low, high) in (
        (DegradationOrder(), (0.2, 0.1), (0.15, 1.5)),
        (SECOND_ORDER, (0.3, 0.3), (0.3, 1.2)),
    ):
        factors = torch.tensor([order.factor(quantile) for quantile in quantiles])
        assert (factors.diff() <= 0).all()
        shares = [(factors > 1).float().mean(), (factors == 1).float().mean()]
        torch.testing.assert_close(torch.stack(shares), torch.tensor([up, keep]), rtol=0, atol=0.005)
        torch.testing.assert_close(factors[[0, -1]], torch.tensor([high, low]), **FORMULA_FP32)
        reduced = factors[factors < 1]
        torch.testing.assert_close(reduced.mean(), torch.tensor((1 + low) / 2), rtol=0, atol=0.005)


def test_noise_has_the_published_kinds_and_strengths():
    """On grey without any other step: half Gaussian, half Poisson, of the given strengths, grey in two of five."""
    size = {"blur": 0.0, "enlarge": 0.0, "keep": 1.0, "quality": (100.0, 100.0)}
    noisy = DegradationOrder(**size, gaussian=(30.0, 30.0), poisson=(1.0, 1.0))
    silent = DegradationOrder(**size, gaussian=(0.0, 0.0), poisson=(0.0, 0.0))
    model, grey = RealESRGANDegradation(1, noisy, silent, ringing=0.0), torch.full((100, 3, 32, 32), 0.5)
    result = model(grey, None, range(100))
    deviation = result.sub(grey).mul(255)[:, 1].std((1, 2))  # green is least changed by the coding of colour
    gaussian, poisson = deviation[deviation > 20], deviation[deviation <= 20]
    assert 35 <= len(gaussian) <= 65
    grey_noise = result.sub(result.mean(1, keepdim=True)).mul(255).flatten(1).std(1) < 0.1 * deviation
    assert 25 <= grey_noise.sum() <= 55
    plain = grey_noise[deviation > 20], grey_noise[deviation <= 20]
    torch.testing.assert_close(gaussian[plain[0]].mean(), torch.tensor(30.0), rtol=0.05, atol=0)
    expected = math.sqrt(0.5 * 256) / 256 * 255  # 128 photons
    torch.testing.assert_close(poisson[plain[1]].mean(), torch.tensor(expected), rtol=0.05, atol=0)


def test_kernels_follow_their_formulas():
    """Each sums to 1; a Gaussian has its deviations along its axes; sinc keeps low frequencies only."""
    kernel = gaussian_kernel(41, 4.0, 2.0, math.pi / 2).double()  # turned: the long axis is vertical
    places = torch.arange(41, dtype=torch.float64) - 20
    for axis, sigma in ((1, 4.0), (0, 2.0)):
        spread = (kernel.sum(axis) * places.square()).sum().sqrt()
        torch.testing.assert_close(spread, torch.tensor(sigma, dtype=torch.float64), rtol=1e-2, atol=0)
    for kind, beta in (("plain", 1.0), ("generalised", 0.5), ("plateau", 2.0)):
        torch.testing.assert_close(
            gaussian_kernel(21, 2, 2, 0, kind=kind, beta=beta).sum(), torch.tensor(1.0), **FORMULA_FP32
        )
    low, high = (torch.cos(torch.arange(64) * omega).expand(1, 3, 64, 64) / 2 + 0.5 for omega in (0.4, 2.6))
    kernel = sinc_kernel(21, math.pi / 3)
    middle = (..., slice(16, 48), slice(16, 48))
    kept = [convolved(images, kernel)[middle].std() / images[middle].std() for images in (low, high)]
    assert abs(kept[0] - 1) < 0.15
    assert kept[1] < 0.15
    point = torch.zeros(1, 3, 41, 41)
    point[..., 20, 20] = 1
    torch.testing.assert_close(convolved(point, kernel)[0, 0, 10:31, 10:31], kernel, rtol=0, atol=1e-6)


def test_sides_must_divide_by_the_scale():
    """The size of the result would else be a guess."""
    with pytest.raises(ValueError, match="multiples of 4"):
        RealESRGANDegradation()(torch.zeros(1, 3, 30, 32), None, [0])
    with pytest.raises(ValueError, match="scale >= 1"):
        RealESRGANDegradation(0)
