"""The JPEG round trip shows what Pillow shows, for any quality and size, whatever else is in the batch."""

import io

import pytest
import torch
from PIL import Image
from torch import Tensor

import iqareward
from iqareward.diffusion.data.jpeg import jpeg
from iqareward.diffusion.data.textures import synthetic_images
from tests.tolerances import EXACT


def by_pillow(image: Tensor, quality: int) -> Tensor:
    """The round trip of one image `[3, H, W]` through Pillow, with 4:2:0 chroma."""
    stream = io.BytesIO()
    pixels = (image * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    Image.fromarray(pixels).save(stream, format="JPEG", quality=quality, subsampling=2)
    return iqareward.to_images(Image.open(stream))[0]


def peak_ratio(images: Tensor, references: Tensor) -> float:
    """PSNR in dB over everything."""
    return -10 * (images - references).square().mean().log10().item()


@pytest.mark.parametrize("quality", [1, 10, 25, 49, 50, 75, 95, 100])
@pytest.mark.parametrize("size", [(64, 64), (37, 51)])
def test_round_trip_is_pillows(quality, size):
    """PSNR between the two is above 55 dB: measured 56 to 84, while either is 19 to 36 dB from the image."""
    images = synthetic_images(range(6), size=64)[..., : size[0], : size[1]]
    ours = jpeg(images, torch.full((6,), float(quality)))
    theirs = torch.stack([by_pillow(image, quality) for image in images])
    assert peak_ratio(ours, theirs) > 55
    assert (ours - theirs).abs().mean() < 0.1 / 255


def test_photographs_too(photographs):
    """Real photographs, whose colours and edges are not ours."""
    photographs = photographs[..., :130, :131]
    theirs = torch.stack([by_pillow(image, 40) for image in photographs])
    assert peak_ratio(jpeg(photographs, torch.full((4,), 40.0)), theirs) > 55


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (5, 2), (16, 17)])
def test_any_size(size):
    """Images smaller than a block, where the decoder has special cases, are as in Pillow."""
    images = synthetic_images(range(4), size=17)[..., : size[0], : size[1]]
    theirs = torch.stack([by_pillow(image, 60) for image in images])
    assert (jpeg(images, torch.full((4,), 60.0)) - theirs).abs().amax() < 3 / 255


def test_each_image_has_its_own_quality():
    """A batch of several qualities is the images one by one, to the last bit, and worse at lower quality."""
    images = synthetic_images([3], size=40).expand(9, -1, -1, -1)
    quality = torch.linspace(100, 5, 9)
    together = jpeg(images, quality)
    for row in range(9):
        torch.testing.assert_close(jpeg(images[row : row + 1], quality[row : row + 1])[0], together[row], **EXACT)
    damage = (together - images).square().mean((1, 2, 3))
    assert (damage.diff() > 0).all()
    torch.testing.assert_close(jpeg(images, quality.round() - 0.3), together, **EXACT)


def test_result_is_an_eight_bit_image():
    """Multiples of 1/255 in [0, 1], whatever came in; out-of-range qualities are the nearest valid ones."""
    wild = 3 * synthetic_images(range(3), size=24) - 1
    shown = jpeg(wild, torch.tensor([-5.0, 50.0, 300.0]))
    torch.testing.assert_close((shown * 255).round() / 255, shown, **EXACT)
    assert (shown.amin(), shown.amax()) == (0, 1)
    torch.testing.assert_close(shown, jpeg(wild.clamp(0, 1), torch.tensor([1.0, 50.0, 100.0])), **EXACT)


def test_bad_shapes_are_refused():
    """One quality per image, three channels, floating point."""
    with pytest.raises(ValueError, match="one per image"):
        jpeg(torch.zeros(2, 3, 16, 16), torch.tensor(50.0))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        jpeg(torch.zeros(2, 1, 16, 16), torch.full((2,), 50.0))
    with pytest.raises(TypeError, match="floating"):
        jpeg(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), torch.full((2,), 50.0))
