"""Degradations: damage grows with the severity, each image has its own, and none depends on its batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.agreement import spearman
from iqareward.difficulty import rmse
from iqareward.diffusion import Degradation, synthetic_images
from iqareward.diffusion.degradations import TASKS, add_noise, blur, jpeg, lower_resolution
from tests.tolerances import EXACT, FORMULA_FP32

properties = settings(deadline=None, max_examples=25, derandomize=True)
CHOICES = [(task,) for task in TASKS] + [TASKS]


@pytest.mark.parametrize("tasks", CHOICES, ids="+".join)
def test_damage_grows_with_severity(tasks):
    """RMSE follows the severity of one image (Spearman > 0.95), and across different images (> 0.7; JPEG > 0.5)."""
    severity = torch.linspace(0, 1, 65)
    images = synthetic_images(range(65), size=32)
    for row in (0, 5, 7):
        same = images[row : row + 1].expand_as(images)
        assert spearman(rmse(Degradation(tasks)(same, severity, [row] * 65), same), severity) > 0.95
    # What JPEG does to an image depends on its detail and colours as much as on the quality, in photographs too (0.48).
    across = spearman(rmse(Degradation(tasks)(images, severity, range(65)), images), severity)
    assert across > (0.5 if tasks == ("jpeg",) else 0.7)


@pytest.mark.parametrize("tasks", CHOICES, ids="+".join)
def test_severity_zero_is_nearly_clean(tasks):
    """The mildest damage is less than half of the strongest, and small; JPEG has halved the chroma even then."""
    images = synthetic_images(range(16), size=32)
    mild, strong = (rmse(Degradation(tasks)(images, torch.full((16,), u), range(16)), images) for u in (0.0, 1.0))
    assert mild.mean() < 0.45 * strong.mean()
    assert mild.mean() < 0.04


@pytest.mark.parametrize("tasks", CHOICES, ids="+".join)
@properties
@given(seed=st.integers(0, 2**31 - 1), height=st.integers(1, 24), width=st.integers(1, 24))
def test_a_result_does_not_depend_on_its_batch(tasks, seed, height, width):
    """Alone, in a batch and in reverse: the same to the last bit, in [0, 1], for any size."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(5, 3, height, width, generator=generator)
    severity, ids, degrade = torch.rand(5, generator=generator), [seed + row for row in range(5)], Degradation(tasks)
    together = degrade(images, severity, ids, seed=3)
    assert together.shape == images.shape
    assert together.amin() >= 0
    assert together.amax() <= 1
    torch.testing.assert_close(degrade(images.flip(0), severity.flip(0), ids[::-1], seed=3).flip(0), together, **EXACT)
    for row in range(5):
        alone = degrade(images[row : row + 1], severity[row : row + 1], ids[row : row + 1], seed=3)
        torch.testing.assert_close(alone[0], together[row], **EXACT)


def test_blur_is_a_gaussian():
    """The response to a point has the standard deviation asked for, keeps the sum, and matches the formula in fp64."""
    point = torch.zeros(2, 3, 41, 41)
    point[:, :, 20, 20] = 1
    sigma = torch.tensor([1.0, 3.0])
    shown = blur(point, sigma)
    torch.testing.assert_close(shown.sum((2, 3)), torch.ones(2, 3), **FORMULA_FP32)
    offsets = torch.arange(-20, 21, dtype=torch.float64)
    for row, width in enumerate(sigma.tolist()):
        line = torch.where(offsets.abs() <= 3 * width, torch.exp(-(offsets**2) / (2 * width**2)), 0)
        expected = torch.outer(line, line) / line.sum() ** 2
        torch.testing.assert_close(shown[row, 1].double(), expected, **FORMULA_FP32)


def test_lost_resolution_is_lost():
    """What is finer than the small image disappears, what is coarser stays, and a factor of 1 changes nothing."""
    fine = torch.tensor([0.25, 0.75]).repeat(16).expand(3, 3, 32, 32)
    coarse = torch.tensor([0.25, 0.75]).repeat_interleave(16).expand(3, 3, 32, 32)
    factor = torch.tensor([1.0, 2.0, 4.0])
    kept = [(lower_resolution(images, factor)).std((1, 2, 3)) / images.std((1, 2, 3)) for images in (fine, coarse)]
    assert kept[0][0] > 0.99
    assert (kept[0][1:] < 0.3).all()
    assert (kept[1] > 0.9).all()


def test_noise_pattern_is_the_inputs():
    """An id has one pattern, scaled by the strength; other ids and seeds have others."""
    grey = torch.full((3, 3, 16, 16), 0.5)
    weak, strong, other = add_noise(grey, torch.tensor([4.0, 8.0, 8.0]), [5, 5, 6]) - grey
    torch.testing.assert_close(2 * weak, strong, **FORMULA_FP32)
    assert torch.corrcoef(torch.stack([strong.flatten(), other.flatten()]))[0, 1].abs() < 0.15
    assert not add_noise(grey, torch.full((3,), 4.0), [5, 5, 6], seed=1)[0].sub(grey[0]).equal(weak)


def test_tasks_apply_in_the_order_given():
    """Noise before JPEG is not JPEG before noise; the chain is the functions one after the other."""
    images, severity = synthetic_images(range(4), size=32), torch.full((4,), 0.5)
    chain = Degradation(("noise", "jpeg"), max_noise=20.0, min_quality=35.0)(images, severity, range(4), seed=2)
    noisy = add_noise(images, torch.full((4,), 11.0), range(4), seed=2)
    torch.testing.assert_close(chain, jpeg(noisy, torch.full((4,), 65.0)), **EXACT)
    other = Degradation(("jpeg", "noise"), max_noise=20.0, min_quality=35.0)(images, severity, range(4), seed=2)
    assert not other.equal(chain)


def test_strongest_settings_are_options():
    """At severity 1 each task is the function with the option's value; severities beyond are clamped."""
    images, ones = synthetic_images(range(2), size=32), torch.ones(2)
    strongest = {
        "blur": (Degradation(("blur",), max_sigma=1.5), blur(images, 1.5 * ones)),
        "resize": (Degradation(("resize",), max_factor=2.0), lower_resolution(images, 2 * ones)),
        "jpeg": (Degradation(("jpeg",), min_quality=60.0), jpeg(images, 60 * ones)),
    }
    for degrade, expected in strongest.values():
        torch.testing.assert_close(degrade(images, 7 * ones, [0, 1]), expected.clamp(0, 1), **EXACT)


def test_bad_arguments_are_refused():
    """Unknown or repeated tasks, options out of range, and batches that do not fit together."""
    for options in (
        {"tasks": ("rain",)},
        {"tasks": ()},
        {"tasks": ("blur", "blur")},
        {"max_sigma": 0.1},
        {"max_factor": 0.5},
        {"max_noise": 1.0},
        {"min_quality": 0.0},
    ):
        with pytest.raises(ValueError, match=f"Degradation expected {next(iter(options))}"):
            Degradation(**options)
    with pytest.raises(ValueError, match="one severity and one id"):
        Degradation()(torch.zeros(2, 3, 8, 8), torch.zeros(2), [0])
    with pytest.raises(ValueError, match="one severity and one id"):
        Degradation()(torch.zeros(2, 3, 8, 8), torch.tensor(0.5), [0, 1])
