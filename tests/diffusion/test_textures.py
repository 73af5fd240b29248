"""Synthetic images: an image belongs to its id, and has colours like photographs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.diffusion import synthetic_images
from tests.tolerances import EXACT, FORMULA_FP32

properties = settings(deadline=None, max_examples=25, derandomize=True)


def test_images_keep_their_pixels():
    """The middle pixels of three images, as the first version drew them."""
    found = synthetic_images([0, 5, 17], size=16, seed=3)[:, :, 8, 8]
    expected = torch.tensor(
        [
            [0.34008157, 0.39844447, 0.43106440],
            [0.40335068, 0.36670271, 0.28365809],
            [0.47826821, 0.57448483, 0.71326095],
        ]
    )
    torch.testing.assert_close(found, expected, **FORMULA_FP32)


@pytest.mark.parametrize("size", [16, 33])
def test_image_does_not_depend_on_its_batch(size):
    """The same pixels alone, in a batch, in reverse and repeated, to the last bit."""
    together = synthetic_images(range(13), size=size)
    assert together.shape == (13, 3, size, size)
    assert together.dtype == torch.float32
    torch.testing.assert_close(synthetic_images(torch.arange(12, -1, -1), size=size).flip(0), together, **EXACT)
    for input_id in (0, 5, 12):
        torch.testing.assert_close(synthetic_images([input_id], size=size)[0], together[input_id], **EXACT)
        torch.testing.assert_close(synthetic_images([3, input_id, input_id], size=size)[2], together[input_id], **EXACT)


@properties
@given(first=st.integers(0, 2**40), seed=st.integers(0, 2**40))
def test_every_id_has_an_image_of_its_own(first, seed):
    """In [0, 1], not flat, unlike that of the next id and of the next seed."""
    images = synthetic_images([first, first + 1], size=16, seed=seed)
    assert images.amin() >= 0
    assert images.amax() <= 1
    assert (images.std((1, 2, 3)) > 0.01).all()
    assert not images[0].equal(images[1])
    assert not images.equal(synthetic_images([first, first + 1], size=16, seed=seed + 1))


def test_colours_vary_most_in_brightness():
    """As in photographs: brightness varies more than orange to blue, and that more than green to magenta."""
    red, green, blue = synthetic_images(range(64), size=32).unbind(1)
    brightness, warmth, magenta = (red + green + blue) / 3, (red - blue) / 2, (red - 2 * green + blue) / 3
    assert brightness.std() > 1.5 * warmth.std() > 1.5 * magenta.std() > 0.03
    assert 0.35 < brightness.mean() < 0.6


def test_bad_ids_are_refused():
    """Ids are integers from 0, and there is at least one."""
    for ids in ([], [-1], torch.tensor([0.5])):
        with pytest.raises(ValueError, match="synthetic_images expected"):
            synthetic_images(ids, size=8)
