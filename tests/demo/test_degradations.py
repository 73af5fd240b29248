"""The damage of the demo: it grows with its level, and is the same in every run."""

import pytest
import torch
from torch import Tensor

from iqareward.demo.degradations import DEGRADATIONS, Degradation, degrade
from iqareward.demo.photographs import PHOTOGRAPHS, detail, load_photograph
from tests.tolerances import EXACT

pytest.importorskip("skimage", reason="the photographs come with scikit-image")


@pytest.fixture(scope="module")
def photos() -> list[Tensor]:
    """All four photographs, small."""
    return [load_photograph(photograph.name, 96) for photograph in PHOTOGRAPHS]


@pytest.mark.parametrize("degradation", DEGRADATIONS, ids=lambda degradation: degradation.name)
def test_every_level_is_farther_from_the_original(photos: list[Tensor], degradation: Degradation) -> None:
    """The mean squared error rises at each of the five levels, on each photograph."""
    for photo in photos:
        versions = degrade(photo, degradation, 5, seed=0)
        errors = (versions - versions[0]).square().flatten(1).mean(1)
        assert (errors.diff() > 0).all(), errors


@pytest.mark.parametrize("degradation", DEGRADATIONS, ids=lambda degradation: degradation.name)
def test_pictures_are_what_a_file_holds(photos: list[Tensor], degradation: Degradation) -> None:
    """Original first, shape kept, and every pixel a whole step of 1/255 in [0, 1]."""
    versions = degrade(photos[0], degradation, 3, seed=0)
    assert versions.shape == (4, *photos[0].shape)
    torch.testing.assert_close(versions[0], photos[0], **EXACT)
    steps = versions * 255
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)
    assert versions.min() >= 0
    assert versions.max() <= 1


def test_noise_follows_its_seed(photos: list[Tensor]) -> None:
    """The same seed gives the same pixels, another seed others, and torch's own generator is left alone."""
    noise = DEGRADATIONS[1]
    before = torch.get_rng_state()
    first, again, other = (degrade(photos[0], noise, 2, seed) for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, **EXACT)
    assert not torch.equal(first[1:], other[1:])
    torch.testing.assert_close(torch.get_rng_state(), before, **EXACT)


def test_blur_keeps_the_mean_of_a_flat_picture() -> None:
    """A flat picture has nothing to blur, also at its borders."""
    flat = torch.full((3, 40, 50), 0.4)
    versions = degrade(flat, DEGRADATIONS[0], 5, seed=0)
    torch.testing.assert_close(versions, versions[:1].expand_as(versions), **EXACT)


def test_photographs_are_shrunk_and_never_enlarged() -> None:
    """The shorter side becomes the one asked for, unless the photograph is smaller."""
    assert min(load_photograph("chelsea", 96).shape[1:]) == 96
    assert load_photograph("chelsea", 1000).shape == load_photograph("chelsea").shape == (3, 300, 451)


@pytest.mark.parametrize("focus", [(0.0, 0.0), (1.0, 1.0), (0.3, 0.9)])
def test_detail_stays_inside(focus: tuple[float, float]) -> None:
    """A detail is a square of the asked side wherever its focus is, or the largest that fits."""
    picture = torch.zeros(3, 60, 90)
    assert detail(picture, focus, 40).shape == (3, 40, 40)
    assert detail(picture, focus, 80).shape == (3, 60, 60)
