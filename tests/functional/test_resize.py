"""The resize equals Pillow bit for bit, in both precisions, and passes gradients."""

import numpy as np
import PIL
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from iqareward.functional.resize import bicubic_coefficients, pillow_resize, resize_levels, smooth_resize, to_levels
from tests.tolerances import EXACT

PILLOW_MAJOR = int(PIL.__version__.split(".")[0])
sides = st.integers(min_value=1, max_value=240)


def _noise(height: int, width: int, seed: int, *, binary: bool = False) -> np.ndarray:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return (image > 127).astype(np.uint8) * 255 if binary else image


def _tensor(image: np.ndarray, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].to(dtype)


def _by_pillow(image: np.ndarray, height: int, width: int) -> Tensor:
    return _tensor(np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)), torch.float64)


@given(sides, sides, sides, sides, st.integers(0, 9), st.booleans())
@settings(deadline=None, max_examples=40, derandomize=True)
def test_equals_pillow_for_any_sizes(
    height: int, width: int, new_height: int, new_width: int, seed: int, binary: bool
) -> None:
    """Noise and black-and-white noise (the worst case of clipping between passes) come out as Pillow's bytes."""
    new_height, new_width = max(new_height, height // 60), max(new_width, width // 60)
    columns_first = height - new_height > max(0, 2 * (width - new_width))
    if PILLOW_MAJOR < 13 and columns_first:
        return  # Pillow 13 changed the order of passes for such sizes
    image = _noise(height, width, seed, binary=binary)
    expected = _by_pillow(image, new_height, new_width)
    for dtype in (torch.float64, torch.float32):
        found = resize_levels(_tensor(image, dtype), (new_height, new_width))
        torch.testing.assert_close(found.double(), expected, **EXACT)


@pytest.mark.parametrize("side", [97, 448, 512, 1024])
def test_equals_pillow_for_squares_to_448(side: int) -> None:
    """The one resize that the mPLUG-Owl2 scorers need."""
    image = _noise(side, side, seed=side, binary=side == 512)
    found = resize_levels(_tensor(image, torch.float32), (448, 448))
    torch.testing.assert_close(found.double(), _by_pillow(image, 448, 448), **EXACT)


def test_unit_range_in_and_out() -> None:
    """Images in [0, 1] are rounded to bytes, resized as bytes, and returned in [0, 1]."""
    image = _noise(31, 45, seed=1)
    found = pillow_resize(_tensor(image, torch.float64) / 255 + 0.4 / 255, (20, 30))
    torch.testing.assert_close((found * 255).round(), _by_pillow(image, 20, 30), **EXACT)


def test_rounds_half_levels_and_clamps() -> None:
    """Levels are rounded, not truncated, and stay within 0..255."""
    images = torch.tensor([0.9 / 255, 254.6 / 255, -0.2, 1.2], dtype=torch.float64)
    torch.testing.assert_close(to_levels(images), torch.tensor([1.0, 255.0, 0.0, 255.0], dtype=torch.float64), **EXACT)


def test_batch_rows_are_independent() -> None:
    """Resizing a batch equals resizing its images one by one, exactly."""
    levels = torch.cat([_tensor(_noise(60, 33, seed), torch.float32) for seed in range(3)])
    together = resize_levels(levels, (25, 70))
    torch.testing.assert_close(together, torch.cat([resize_levels(row[None], (25, 70)) for row in levels]), **EXACT)


def test_reduced_matmul_precision_does_not_matter() -> None:
    """All intermediates are integers that a bf16 matmul pass represents: a precision flag is harmless."""
    levels = _tensor(_noise(200, 150, seed=4), torch.float32)
    exact = resize_levels(levels, (64, 64))
    torch.set_float32_matmul_precision("medium")
    try:
        reduced = resize_levels(levels, (64, 64))
        with torch.autocast("cpu", torch.bfloat16):
            autocast = resize_levels(levels, (64, 64))
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(reduced, exact, **EXACT)
    torch.testing.assert_close(autocast, exact, **EXACT)


def test_gradient_is_that_of_the_unrounded_resize() -> None:
    """Straight-through: inside the range, the gradient is the transposed kernel applied to the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    images = (0.3 + 0.4 * torch.rand(1, 3, 12, 17, generator=generator, dtype=torch.float64)).requires_grad_()
    weight = torch.rand(1, 3, 7, 23, generator=generator, dtype=torch.float64)
    (pillow_resize(images, (7, 23)) * weight).sum().backward()
    rows, columns = (
        torch.from_numpy(bicubic_coefficients(*pair) / 2.0**22) for pair in ((12, 7), (17, 23))
    )  # [in, out]
    torch.testing.assert_close(images.grad, rows @ weight @ columns.T)


def test_first_call_in_inference_mode_leaves_gradients_possible() -> None:
    """The cached kernel is an ordinary tensor whoever asked for it first."""
    with torch.inference_mode():
        resize_levels(torch.zeros(1, 3, 19, 21), (5, 6))
    images = torch.full((1, 3, 19, 21), 0.5, requires_grad=True)
    pillow_resize(images, (5, 6)).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().sum() > 0


def test_errors_say_what_to_do() -> None:
    """Wrong sizes and extreme shrinking are refused."""
    with pytest.raises(ValueError, match="positive"):
        pillow_resize(torch.zeros(1, 3, 8, 8), (0, 4))
    with pytest.raises(ValueError, match="127 fold"):
        pillow_resize(torch.zeros(1, 3, 8, 600), (8, 4))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        pillow_resize(torch.zeros(3, 8, 8), (4, 4))


@pytest.mark.parametrize("middle", [7, 24, 40])
@pytest.mark.parametrize("size", [(9, 70), (70, 24), (24, 24), (100, 33)])
def test_the_middle_alone_is_that_of_the_whole(size, middle):
    """A cut-out computed alone has the same levels and gradients, whichever pass comes first."""
    levels = torch.randint(0, 256, (2, 3, 24, 50), generator=torch.Generator().manual_seed(0)).float()
    whole, alone = (levels.clone().requires_grad_() for _ in range(2))
    cut = resize_levels(whole, size)
    for dim in (2, 3):
        side = min(middle, cut.shape[dim])
        cut = cut.narrow(dim, (cut.shape[dim] - side) // 2, side)
    found = resize_levels(alone, size, middle=middle)
    torch.testing.assert_close(found, cut, **EXACT)
    for result in (cut, found):
        result.square().sum().backward()
    torch.testing.assert_close(alone.grad, whole.grad, rtol=1e-5, atol=1e-2)


def test_smooth_resize_has_no_largest_factor():
    """A strip of 600 pixels on 4 is averaged, as torch does it."""
    values = torch.rand(1, 3, 2, 600, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.interpolate(values, (2, 4), mode="bicubic", antialias=True)
    torch.testing.assert_close(smooth_resize(values, (2, 4)), expected, rtol=0, atol=1e-5)
