"""What the value of every full-reference metric promises, whatever its formula."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.functional.pairs import METRIC, METRICS, SIDE, textured
from tests.tolerances import EXACT, FORMULA_FP32


@METRIC
def test_shape_and_dtype(name: str) -> None:
    """Scores are `[B]`: float64 for float64 pixels, float32 for anything narrower."""
    metric = METRICS[name][0]
    images, references = textured(0)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        scores = metric(images.to(dtype), references.to(dtype))
        assert scores.shape == (3,)
        assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert metric(images[:0].float(), references[:0].float()).shape == (0,)


@METRIC
def test_fp32_against_fp64(name: str, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """fp32 loses nothing that a training loop could see, on photographs and on bright, nearly flat pictures."""
    metric = METRICS[name][0]
    images, references = textured(1)
    faint = 0.9 + 0.01 * images, 0.9 + 0.01 * references
    for pair in [(degraded_photographs, photographs), (images, references), faint]:
        narrow = tuple(side.float() for side in pair)
        exact = metric(*(side.double() for side in narrow))
        torch.testing.assert_close(metric(*narrow).double(), exact, **FORMULA_FP32)


@METRIC
def test_identical_images(name: str, photographs: Tensor) -> None:
    """A picture compared with itself, with black and with flat pictures too, gets the best score."""
    metric, _, best, _ = METRICS[name]
    flat = torch.tensor([0.0, 0.3, 1.0]).reshape(3, 1, 1, 1).expand(3, 3, SIDE, SIDE)
    for images in (photographs, flat):
        torch.testing.assert_close(metric(images, images), torch.full((len(images),), best), rtol=0.0, atol=1e-5)


@METRIC
def test_more_noise_is_worse(name: str, photographs: Tensor) -> None:
    """Scores fall strictly with the strength of the noise, on every photograph."""
    metric, _, _, higher = METRICS[name]
    noise = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(2))
    scores = torch.stack([metric((photographs + s * noise).clamp(0, 1), photographs) for s in (0.01, 0.03, 0.1, 0.3)])
    steps = scores.diff(dim=0)
    assert ((steps < 0) if higher else (steps > 0)).all()


@METRIC
@pytest.mark.parametrize("shape", [(SIDE, SIDE + 6), (161, 163), (530, 520)], ids=str)
def test_an_image_does_not_see_its_batch(name: str, shape: tuple[int, int]) -> None:
    """Alone, in any batch, in any order and split by any chunk, an image scores the same to the last bit."""
    metric = METRICS[name][0]
    images, references = (side.float() for side in textured(3, 4, *shape))
    whole = metric(images, references)
    single = torch.cat([metric(images[i : i + 1], references[i : i + 1]) for i in range(4)])
    order = torch.tensor([3, 0, 2, 1])
    torch.testing.assert_close(single, whole, **EXACT)
    torch.testing.assert_close(metric(images[order], references[order]), whole[order], **EXACT)


@METRIC
def test_memory_layout_does_not_matter(name: str) -> None:
    """Channels-last, expanded and strided pictures score as their contiguous copies."""
    metric = METRICS[name][0]
    images, references = (side.float() for side in textured(4, 2, SIDE, 2 * SIDE))
    strided, expanded = images[..., ::2], references[:1, ..., ::2].expand(2, -1, -1, -1)
    expected = metric(strided.contiguous(), expanded.contiguous())
    torch.testing.assert_close(metric(strided, expanded), expected, **FORMULA_FP32)
    last = strided.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(metric(last, expanded), expected, **FORMULA_FP32)


@METRIC
@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["images", "references"])
def test_a_broken_pixel_stays_in_its_image(name: str, poison: float, side: int) -> None:
    """One non-finite pixel, even in the last corner, makes its image NaN and no other image differ."""
    metric = METRICS[name][0]
    pair = [batch.float() for batch in textured(5, 3, 165, 167)]
    clean = metric(*pair)
    for row, column in ((80, 80), (-1, -1), (0, 0)):
        broken = [batch.clone() for batch in pair]
        broken[side][1, 2, row, column] = poison
        scores = metric(*broken)
        assert scores[1].isnan()
        torch.testing.assert_close(scores[[0, 2]], clean[[0, 2]], **EXACT)


@METRIC
@pytest.mark.parametrize("scale", [1.000003, 2.0, 255.0, 1e4, 1e30])
def test_out_of_range_pixels(name: str, scale: float) -> None:
    """Finite pixels outside [0, 1] get the formula's value, or NaN where fp32 overflows; never inf."""
    metric = METRICS[name][0]
    images, references = textured(6)
    scores = metric((scale * images).float(), (scale * references).float())
    assert not scores.isinf().any()
    if scale <= 1e4:
        exact = metric((scale * images).float().double(), (scale * references).float().double())
        torch.testing.assert_close(scores.double(), exact, rtol=1e-3, atol=1e-4)


@METRIC
def test_surroundings_do_not_matter(name: str) -> None:
    """Autocast, inference mode, reduced matrix precision, default dtype and number of threads change no bit."""
    metric = METRICS[name][0]
    images, references = (side.float() for side in textured(10))
    expected = metric(images, references)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        torch.testing.assert_close(metric(images, references), expected, **EXACT)
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    threads = torch.get_num_threads()
    try:
        torch.set_float32_matmul_precision("medium")
        torch.set_default_dtype(torch.float64)
        torch.set_num_threads(1 if threads > 1 else 2)
        torch.testing.assert_close(metric(images, references), expected, **EXACT)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)


@METRIC
def test_threads(name: str) -> None:
    """Eight calls from four threads give what one thread gives."""
    metric = METRICS[name][0]
    pairs = [tuple(side.float() for side in textured(seed, 1)) for seed in range(8)]
    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(lambda pair: metric(*pair), pairs))
    torch.testing.assert_close(torch.cat(threaded), torch.cat([metric(*pair) for pair in pairs]), **EXACT)


@METRIC
def test_smallest_size(name: str) -> None:
    """The documented smallest side is scored; one pixel less is an error that says so."""
    metric, side, _, _ = METRICS[name]
    images, references = textured(11, 1, side, side)
    assert metric(images.float(), references.float()).isfinite().all()
    with pytest.raises(ValueError, match=f"{name} expected .* >= {side}"):
        metric(images[..., 1:, :], references[..., 1:, :])


@METRIC
def test_errors(name: str) -> None:
    """Mismatched, integer and misshapen inputs are refused with what was expected and what to do."""
    metric = METRICS[name][0]
    images, references = (side.float() for side in textured(12, 2))
    with pytest.raises(ValueError, match="references` of the shape of"):
        metric(images, references[:1])
    with pytest.raises(TypeError, match=r"floating-point .*to_images"):
        metric(images, (255 * references).to(torch.uint8))
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        metric(images[:, :1], references[:, :1])


@pytest.mark.parametrize("name", ["psnr", "ssim", "ms_ssim", "gmsd"])
def test_unknown_color(name: str) -> None:
    """An unknown plane is refused by name."""
    images, references = textured(13, 1)
    with pytest.raises(ValueError, match=f"{name} expected `color`"):
        METRICS[name][0](images, references, color="lab")


@METRIC
@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 10**6), strength=st.floats(0, 1))
def test_symmetry_and_bounds(name: str, seed: int, strength: float) -> None:
    """Swapping image and reference changes nothing, and no score is better than that of identical images."""
    metric, _, best, higher = METRICS[name]
    noisy, references = (side.float() for side in textured(seed, 1, 161, 161))
    images = torch.lerp(references, noisy, strength)
    score = metric(images, references)
    torch.testing.assert_close(metric(references, images), score, **FORMULA_FP32)
    assert (score <= best).all() if higher else (score >= best).all()
