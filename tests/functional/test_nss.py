"""Local statistics and fitted distributions against literal transcriptions of their definitions."""

import numpy as np
import pytest
import scipy.special
import torch
from scipy.ndimage import correlate1d

from iqareward.functional.brisque import brisque_features
from iqareward.functional.niqe import block_features, natural_features, split_blocks
from iqareward.functional.nss import (
    clipped_luma,
    fit_aggd,
    fit_ggd,
    half_scale,
    local_statistics,
    mscn,
    neighbor_moments,
)
from tests.tolerances import EXACT, FORMULA_FP32

SHAPES = np.arange(200, 10001) / 1000
SHIFTS = ((0, 1), (1, 0), (1, 1), (1, -1))
WINDOW = np.exp(-0.5 * (np.arange(-3, 4) / (7 / 6)) ** 2)
WINDOW /= WINDOW.sum()


def levels(seed, height, width, batch=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.rand(batch, height // 8 + 1, width // 8 + 1, generator=generator, dtype=torch.float64) * 200
    smooth = smooth.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, :height, :width]
    grain = torch.randn(batch, height, width, generator=generator, dtype=torch.float64) * 15
    return (smooth + grain + 25).round().clamp(0, 255).to(dtype)


def moments_of(values):
    """Moments `[6]` of a 1-d tensor."""
    return neighbor_moments(values[None, None, None])[0, 0, 0]


def shape_by_search(ratio):
    """The shape of the grid with the nearest moment ratio."""
    gamma = scipy.special.gamma
    ratios = gamma(2 / SHAPES) ** 2 / (gamma(1 / SHAPES) * gamma(3 / SHAPES))
    return SHAPES[np.argmin((ratios - ratio) ** 2)]


def aggd_by_search(values):
    """Shape, mean, left and right standard deviation, and scale per deviation, of a 1-d array."""
    left = np.sqrt(np.mean(values[values < 0] ** 2))
    right = np.sqrt(np.mean(values[values > 0] ** 2))
    asymmetry = left / right
    ratio = np.mean(np.abs(values)) ** 2 / np.mean(values**2)
    shape = shape_by_search(ratio * (asymmetry**3 + 1) * (asymmetry + 1) / (asymmetry**2 + 1) ** 2)
    gamma = scipy.special.gamma
    scale = np.sqrt(gamma(1 / shape) / gamma(3 / shape))
    return shape, (right - left) * scale * gamma(2 / shape) / gamma(1 / shape), left, right, scale


def features_of_block(block):
    """The 18 features of one square array, with np.roll for the neighbours."""
    shape, _, left, right, scale = aggd_by_search(block.ravel())
    features = [shape, (left + right) / 2 * scale]
    for shift in SHIFTS:
        shape, mean, left, right, scale = aggd_by_search((block * np.roll(block, shift, (0, 1))).ravel())
        features += [shape, mean, left * scale, right * scale]
    return features


def features_of_plane(plane):
    """The 18 features of BRISQUE, with black beyond the border and neighbours that wrap around."""
    mean, power = (correlate1d(correlate1d(p, WINDOW, 0, mode="constant"), WINDOW, 1, mode="constant")
                   for p in (plane, plane**2))  # fmt: skip
    coefficients = (plane - mean) / (np.sqrt(np.abs(power - mean**2)) + 1)
    ratio = np.mean(np.abs(coefficients)) ** 2 / np.mean(coefficients**2)
    features = [shape_by_search(ratio), np.mean(coefficients**2)]
    for shift in SHIFTS:
        shape, mean, left, right, _ = aggd_by_search((coefficients * np.roll(coefficients, shift, (0, 1))).ravel())
        features += [shape, mean, left**2, right**2]
    return features


def test_mscn_is_the_published_formula():
    """(level - mean) / (std + 1) under a Gaussian window, with edge pixels repeated."""
    planes = levels(0, 40, 56, batch=2)

    def smooth(plane):
        return correlate1d(correlate1d(plane, WINDOW, 0, mode="nearest"), WINDOW, 1, mode="nearest")

    for plane, got in zip(planes.numpy(), mscn(planes)):
        mean = smooth(plane)
        expected = (plane - mean) / (np.sqrt(np.abs(smooth(plane**2) - mean**2)) + 1)
        torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-5, atol=1e-4)  # atol: deviations set to 0
        assert (got - torch.from_numpy(expected)).abs().median() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, 1.0, 77.0, 200.3, 255.0])
def test_flat_regions_deviate_by_exactly_zero(dtype, level):
    """Rounding in the window's sums must not give flat pixels a sign, which NIQE would count."""
    planes = torch.full((1, 30, 30), level, dtype=dtype)
    torch.testing.assert_close(local_statistics(planes)[0], torch.zeros_like(planes), **EXACT)


def test_ramps_deviate_by_exactly_zero_inside():
    """A linear ramp equals its symmetric mean, so away from the border no pixel lies on either side."""
    ramp = torch.arange(0.0, 240.0, 3.0).expand(1, 40, 80)
    deviation = local_statistics(ramp)[0][..., 3:-3]
    torch.testing.assert_close(deviation, torch.zeros_like(deviation), **EXACT)


def test_half_scale_is_cubic_interpolation_with_mirrored_borders():
    """MATLAB's imresize(x, 0.5): Keys' cubic (a = -0.5) twice as wide, edge pixels mirrored, weights summing to 1."""
    distance = np.abs(np.arange(-3.5, 4) / 2)
    near = 1.5 * distance**3 - 2.5 * distance**2 + 1
    far = -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    taps = np.where(distance <= 1, near, far)
    taps /= taps.sum()

    def halve_rows(values):
        padded = np.pad(values, ((3, 4), (0, 0)), mode="symmetric")
        return np.stack([taps @ padded[2 * row : 2 * row + 8] for row in range((len(values) + 1) // 2)])

    for size in ((12, 20), (13, 20), (12, 7)):
        plane = levels(1, *size)
        expected = torch.from_numpy(halve_rows(halve_rows(plane[0].numpy()).T).T.copy())
        torch.testing.assert_close(half_scale(plane)[0], expected, **FORMULA_FP32)


def test_half_scale_is_exact_in_float32():
    """The taps are multiples of 1/256, so a constant stays that constant."""
    planes = torch.full((1, 16, 16), 251.0)
    torch.testing.assert_close(half_scale(planes), torch.full((1, 8, 8), 251.0), **EXACT)


def test_split_blocks_goes_row_by_row():
    """Block 1 is right of block 0."""
    planes = torch.arange(4 * 6.0).reshape(1, 4, 6)
    blocks = split_blocks(planes, 2)
    assert blocks.shape == (1, 6, 2, 2)
    torch.testing.assert_close(blocks[0, 1], torch.tensor([[2.0, 3.0], [8.0, 9.0]]), **EXACT)
    torch.testing.assert_close(blocks[0, 3], torch.tensor([[12.0, 13.0], [18.0, 19.0]]), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_block_features_equal_a_loop_over_blocks(dtype):
    """Batched features equal a search over every shape in one block at a time."""
    coefficients = mscn(levels(2, 48, 72, batch=2)).to(dtype)
    expected = [
        [features_of_block(plane[top : top + 24, left : left + 24]) for top in (0, 24) for left in (0, 24, 48)]
        for plane in coefficients.double().numpy()
    ]
    # The nearest shape of the grid may be the neighbour when float32 sums fall on the boundary: none does here.
    torch.testing.assert_close(
        block_features(coefficients, 24), torch.tensor(expected, dtype=torch.float64), **FORMULA_FP32
    )


@pytest.mark.parametrize(
    ("shape", "left", "right"), [(0.6, 1.0, 1.0), (1.0, 0.5, 2.0), (2.0, 1.0, 1.5), (4.0, 2.0, 1.0)]
)
def test_fit_recovers_the_parameters_of_samples(shape, left, right):
    """From 400 000 samples of a known distribution shape and scales come back within 2 %."""
    rng = np.random.default_rng(0)
    magnitude = rng.gamma(1 / shape, size=400_000) ** (1 / shape)
    is_left = rng.random(magnitude.size) < left / (left + right)
    values = torch.from_numpy(np.where(is_left, -left, right) * magnitude)
    fitted = fit_aggd(moments_of(values), values.numel())
    scales = (fitted.left_std * fitted.scale_per_std, fitted.right_std * fitted.scale_per_std)
    expected = torch.tensor([shape, left, right], dtype=torch.float64)
    torch.testing.assert_close(torch.stack((fitted.shape, *scales)), expected, rtol=0.02, atol=0.0)
    torch.testing.assert_close(fitted.mean, values.mean(), rtol=0.0, atol=0.01)
    if left == right:
        symmetric = torch.stack(fit_ggd(moments_of(values), values.numel()))
        torch.testing.assert_close(symmetric, torch.stack((fitted.shape, values.square().mean())), rtol=0.02, atol=0.0)


@pytest.mark.parametrize("values", [torch.zeros(64), torch.ones(64), -torch.ones(64)])
def test_one_sided_blocks_are_undefined(values):
    """Without values on both sides of zero there is no asymmetric distribution: NaN, not a plausible number."""
    fitted = fit_aggd(moments_of(values), 64)
    assert torch.stack((fitted.left_std, fitted.right_std)).isnan().any()


def test_features_of_an_image_come_from_two_scales():
    """36 numbers per whole block; a rest of less than a block changes nothing."""
    planes = levels(3, 70, 100)
    features = natural_features(planes, 32)
    assert features.shape == (1, 6, 36)
    torch.testing.assert_close(features, natural_features(planes[:, :64, :96].contiguous(), 32), **EXACT)
    torch.testing.assert_close(features[..., :18], block_features(mscn(planes[:, :64, :96]), 32), **EXACT)


def test_float32_pixels_give_float64_features():
    """Local variance is computed in float64, so float32 levels lose nothing but the last digits of sums."""
    planes = levels(4, 64, 64)
    torch.testing.assert_close(natural_features(planes.float(), 32), natural_features(planes, 32), **FORMULA_FP32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_clipped_luma_tells_which_images_are_finite(value):
    """Clipping would hide an infinite pixel, so the flag is taken before."""
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[1, 2, 5, 5] = value
    plane, finite = clipped_luma(images)
    assert finite.tolist() == [True, False, True]
    assert plane[[0, 2]].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(64, 96), (75, 51), (200, 300)])
def test_brisque_features_equal_a_search(dtype, size):
    """Batched features of whole images, also of odd sides, equal a search over every shape, one image at a time."""
    planes = levels(5, *size, batch=2)
    expected = [features_of_plane(p) + features_of_plane(h) for p, h in zip(planes.numpy(), half_scale(planes).numpy())]
    torch.testing.assert_close(
        brisque_features(planes.to(dtype)), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-6
    )
