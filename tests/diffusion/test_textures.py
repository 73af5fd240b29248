"""Synthetic images: an image is its id's, and has the occlusions, spectra and colours that it should have."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.diffusion import synthetic_images
from iqareward.diffusion.textures import RADII, _draw_leaves, _Leaves, _paint, dead_leaves, power_law_textures
from tests.tolerances import EXACT, FORMULA_FP32

properties = settings(deadline=None, max_examples=25, derandomize=True)
MAKERS = (dead_leaves, power_law_textures, synthetic_images)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("size", [16, 33])
def test_image_does_not_depend_on_its_batch(make, size):
    """The same pixels alone, in a batch, in reverse and repeated, to the last bit."""
    together = make(range(13), size=size)
    assert together.shape == (13, 3, size, size)
    assert together.dtype == torch.float32
    torch.testing.assert_close(make(torch.arange(12, -1, -1), size=size).flip(0), together, **EXACT)
    for input_id in (0, 5, 12):
        torch.testing.assert_close(make([input_id], size=size)[0], together[input_id], **EXACT)
        torch.testing.assert_close(make([3, input_id, input_id], size=size)[2], together[input_id], **EXACT)


@pytest.mark.parametrize("make", MAKERS)
@properties
@given(first=st.integers(0, 2**40), seed=st.integers(0, 2**40))
def test_every_id_has_an_image_of_its_own(make, first, seed):
    """In [0, 1], not flat, unlike that of the next id and of the next seed."""
    images = make([first, first + 1], size=16, seed=seed)
    assert images.amin() >= 0
    assert images.amax() <= 1
    assert (images.std((1, 2, 3)) > 0.01).all()
    assert not images[0].equal(images[1])
    assert not images.equal(make([first, first + 1], size=16, seed=seed + 1))


def test_spectrum_falls_with_the_power_law():
    """The slope of the amplitude over frequency, fitted per image, lies in the range of the exponents."""
    size = 64
    images = power_law_textures(range(48), size=size)
    amplitude = torch.fft.rfft2(images.mean(1)).abs()
    frequency = torch.hypot(torch.fft.fftfreq(size)[:, None], torch.fft.rfftfreq(size))
    used = (frequency > 0.03) & (frequency < 0.5)
    position = frequency[used].log() - frequency[used].log().mean()
    slopes = (amplitude[:, used].log() * position).sum(1) / position.square().sum()
    assert ((slopes < -0.7) & (slopes > -1.7)).all()
    assert slopes.max() - slopes.min() > 0.5


def test_top_leaf_hides_what_lies_behind():
    """The last leaf shows its own colour inside, leaves the rest alone outside, and mixes on a line one pixel wide."""
    size = 64
    leaves = _draw_leaves(list(range(32)), 40, size=size, seed=0, texture=0.0)
    fields = torch.zeros(32, 3, size, size)
    full, behind = _paint(leaves, fields), _paint(_Leaves(*(field[:, :-1] for field in leaves)), fields)
    top = _Leaves(*(field[:, -1, ..., None, None].double() for field in leaves))
    x, y = torch.arange(size) + 0.5 - top.centers[:, 0], torch.arange(size)[:, None] + 0.5 - top.centers[:, 1]
    (cosine, sine), (long, short) = top.directions.unbind(1), top.axes.unbind(1)
    radius = torch.hypot((x * cosine + y * sine) / long, (y * cosine - x * sine) / short)[:, None].expand_as(full)
    inside, outside = radius < 1 - 1 / short[:, None], radius > 1 + 1 / short[:, None]
    assert inside.sum() > 1000
    colors = leaves.colors[:, -1, :, None, None].expand_as(full)
    torch.testing.assert_close(full[inside], colors[inside], **FORMULA_FP32)
    torch.testing.assert_close(full[outside], behind[outside], **EXACT)
    assert ((full != behind) & (full != colors))[~inside & ~outside].float().mean() > 0.5


def test_colours_vary_most_in_brightness():
    """As in photographs: brightness varies more than orange to blue, and that more than green to magenta."""
    red, green, blue = synthetic_images(range(64), size=32).unbind(1)
    brightness, warmth, magenta = (red + green + blue) / 3, (red - blue) / 2, (red - 2 * green + blue) / 3
    assert brightness.std() > 1.5 * warmth.std() > 1.5 * magenta.std() > 0.03
    assert 0.35 < brightness.mean() < 0.6


def test_radii_follow_the_inverse_cube():
    """The share of radii below r is that of the density r^-3 between the two limits."""
    leaves = _draw_leaves(list(range(40)), 97, size=96, seed=0, texture=1.0)
    radii = leaves.axes[:, 1:].prod(-1).sqrt() / 96
    low, high = RADII
    assert radii.amin() >= low * 0.999
    assert radii.amax() <= high * 1.001
    for radius in (1.2 * low, 1.5 * low, 3 * low):
        expected = (low**-2 - radius**-2) / (low**-2 - high**-2)
        assert (radii < radius).float().mean().item() == pytest.approx(expected, abs=0.03)


def test_bad_arguments_are_refused():
    """Ids are integers from 0, and there is at least one; leaves and texture have their ranges."""
    for ids in ([], [-1], torch.tensor([0.5])):
        with pytest.raises(ValueError, match="synthetic_images expected"):
            synthetic_images(ids, size=8)
    with pytest.raises(ValueError, match="num_leaves >= 1"):
        dead_leaves([0], size=8, num_leaves=0)
    with pytest.raises(ValueError, match="texture >= 0"):
        dead_leaves([0], size=8, texture=-1.0)
