"""The one door for pixels: every kind of image arrives as float RGB in [0, 1], or is refused with a reason."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from iqareward import to_images
from iqareward.images import drop_broken_gradients
from tests.tolerances import EXACT, FORMULA_FP32

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
UNIT = torch.from_numpy(PIXELS).permute(2, 0, 1)[None].float() / 255


def test_one_image_in_every_container() -> None:
    """PIL, uint8 ndarray, uint8 tensor, a list and a diffusers output give the same batch."""
    pil = Image.fromarray(PIXELS)
    tensor = torch.from_numpy(PIXELS).permute(2, 0, 1)
    for images in (pil, PIXELS, tensor, [pil], [PIXELS], [tensor], tensor[None], SimpleNamespace(images=[pil])):
        torch.testing.assert_close(to_images(images), UNIT, **EXACT)


def test_float_ranges() -> None:
    """The stated range is mapped to [0, 1]; nothing is clamped."""
    torch.testing.assert_close(to_images(UNIT * 2 - 1, value_range=(-1, 1)), UNIT, **FORMULA_FP32)
    torch.testing.assert_close(to_images(UNIT * 255, value_range=(0, 255)), UNIT, **FORMULA_FP32)
    torch.testing.assert_close(to_images(UNIT + 1, value_range=(0, 1)), UNIT + 1, **EXACT)
    array = UNIT[0].permute(1, 2, 0).double().numpy()
    torch.testing.assert_close(to_images(array, value_range=(0, 1)), UNIT, **EXACT)


def test_range_is_never_guessed() -> None:
    """Floats without a range are refused, whatever their values."""
    with pytest.raises(ValueError, match=r"value_range.*\(-1, 1\)"):
        to_images(UNIT)
    with pytest.raises(ValueError, match="black < white"):
        to_images(UNIT, value_range=(1, 0))
    with pytest.raises(TypeError, match=r"int64.*uint8"):
        to_images(torch.zeros(3, 4, 4, dtype=torch.int64))


def test_gray_alpha_sixteen_bit_and_bool() -> None:
    """Gray is repeated, alpha is laid on white, 16 bits and bool are scaled by their dtype."""
    gray = to_images(PIXELS[..., 0])
    torch.testing.assert_close(gray, UNIT[:, :1].expand(-1, 3, -1, -1).contiguous(), **EXACT)
    alpha = np.concatenate([PIXELS, np.full((5, 7, 1), 51, np.uint8)], axis=-1)  # 51/255 = 0.2
    torch.testing.assert_close(to_images(alpha), UNIT * 0.2 + 0.8, **FORMULA_FP32)
    deep = (PIXELS[..., 0].astype(np.uint16) * 257).astype(np.uint16)
    torch.testing.assert_close(to_images(deep), gray, **FORMULA_FP32)
    torch.testing.assert_close(to_images(Image.fromarray(deep)), gray, **FORMULA_FP32)
    assert to_images(np.array([[True, False]])).unique().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"])
def test_every_pil_mode_is_a_picture(mode: str) -> None:
    """Each 8-bit PIL mode becomes RGB like Pillow's own conversion."""
    source = Image.fromarray(PIXELS)
    image = source.convert("L").convert(mode) if mode == "LA" else _converted(source, mode)
    expected = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    torch.testing.assert_close(to_images(image)[0].permute(1, 2, 0), torch.from_numpy(expected), **FORMULA_FP32)


def _converted(source: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        from PIL import ImageCms

        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(source, srgb, lab, outputMode="LAB")
        assert image is not None
        return image
    return source.convert(mode)


def test_transparency_of_palette_images_is_laid_on_white() -> None:
    """A palette image with a transparent colour shows white there."""
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.info["transparency"] = 0
    torch.testing.assert_close(to_images(image)[0, :, 0], torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]]), **EXACT)


def test_exif_orientation(tmp_path: Path) -> None:
    """A photo that a camera marked as rotated arrives upright, from a path too."""
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 270 degrees to show
    path = tmp_path / "rotated.png"
    image.save(path, exif=exif)
    upright = torch.rot90(UNIT, k=-1, dims=(2, 3))
    torch.testing.assert_close(to_images(path), upright, **EXACT)
    torch.testing.assert_close(to_images([str(path)]), upright, **EXACT)


def test_mixed_sizes_stay_a_list() -> None:
    """Images of different sizes come back as a list in their order."""
    images = to_images([PIXELS, PIXELS[:3], PIXELS])
    assert isinstance(images, list)
    assert [tuple(image.shape) for image in images] == [(3, 5, 7), (3, 3, 7), (3, 5, 7)]


def test_gradients_flow_and_input_is_kept() -> None:
    """A tensor in [-1, 1] keeps its graph; ndarrays are copied, read-only ones too."""
    decoded = (UNIT * 2 - 1).requires_grad_()
    to_images(decoded, value_range=(-1, 1)).sum().backward()
    torch.testing.assert_close(decoded.grad, torch.full_like(decoded, 0.5), **EXACT)
    frozen = PIXELS.copy()
    frozen.flags.writeable = False
    batch = to_images(frozen)
    batch.zero_()
    assert frozen.any()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 5, 7, dtype=torch.uint8), r"channels first.*\[2, 5, 7\]"),
        (np.zeros((3, 5, 7), dtype=np.uint8), r"channels last.*\[3, 5, 7\]"),
        (torch.zeros(1, 4, 5, 7), "latents"),
        (torch.zeros(3, 0, 7, dtype=torch.uint8), "at least one pixel"),
        ([], "empty"),
        ([torch.zeros(2, 3, 4, 4, dtype=torch.uint8)], r"batch of 2 as images\[0\]"),
    ],
)
def test_what_is_no_image(images: object, message: str) -> None:
    """Shapes that are no image, and latents, are refused with what to do."""
    with pytest.raises(ValueError, match=message):
        to_images(images, value_range=(0, 1))


def test_unknown_types() -> None:
    """Things without pixels are a TypeError that names the place, and an unclear PIL range too."""
    with pytest.raises(TypeError, match=r"images\[1\].*got dict"):
        to_images([PIXELS, {}])
    with pytest.raises(TypeError, match="mode 'I'"):
        to_images(Image.new("I", (2, 2)))
    with pytest.raises(ValueError, match=r"no-such-file.png: No such file"):
        to_images("no-such-file.png")


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.uint16, np.dtype(">u2"), np.float16, np.float32, np.float64]),
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
    )
)
def test_any_array_is_an_image_or_a_clear_error(array: np.ndarray) -> None:
    """Whatever the shape and dtype: float32 RGB of the same size, or a ValueError that names the shape."""
    try:
        images = to_images(array, value_range=(0, 1))
    except ValueError as error:
        assert "expected" in str(error)
    else:
        assert isinstance(images, torch.Tensor)
        assert images.dtype == torch.float32
        assert images.shape[1] == 3


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 5)])
def test_a_broken_gradient_does_not_leave_its_image(shape: tuple[int, ...]) -> None:
    """An image without a score, or with an infinite gradient, gets none; the others keep theirs to the last bit."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    images[1] = 0  # sqrt has no derivative there
    for broken in (lambda rows: rows.sqrt(), lambda rows: rows / rows, lambda rows: (rows.log() * 0).exp() * rows):
        whole, alone = images.clone().requires_grad_(), images[:1].clone().requires_grad_()
        broken(drop_broken_gradients(whole)).flatten(1).mean(1).sum().backward()
        broken(alone).flatten(1).mean(1).sum().backward()
        torch.testing.assert_close(whole.grad[:1], alone.grad, **EXACT)
        assert (whole.grad[1] == 0).all()
    single = torch.tensor([[[0.0]], [[1.0]], [[1.0]]], requires_grad=True)  # [3, H, W] is one image
    drop_broken_gradients(single).sqrt().sum().backward()
    assert (single.grad == 0).all()
    assert not drop_broken_gradients(images).requires_grad
