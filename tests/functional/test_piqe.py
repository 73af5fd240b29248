"""PIQE against published figures, an independent per-block transcription, and the ways a training batch goes wrong."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import correlate1d

from iqareward.functional.color import LUMA
from iqareward.functional.piqe import MIN_SIDE, piqe
from iqareward.functional.ssim import ssim
from tests.tolerances import EXACT, FORMULA_FP32, OTHER_PACKAGE

# MATLAB's piqe on the calibration pairs, two decimals
OFFICIAL = {"I03": 100.00, "I06": 35.86, "I08": 41.15}
# One level of rounding in fp32 luma moves a block across a threshold at most rarely; what remains is summation order.
ROUNDED_FIGURE = {"rtol": 0.0, "atol": 0.005}


def textured(seed, height, width, batch=1):
    """Large patches plus grain: some blocks flat, some busy, some noisy."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.rand(batch, 3, -(-height // 8), -(-width // 8), generator=generator, dtype=torch.float64)
    patches = patches.repeat_interleave(8, 2).repeat_interleave(8, 3)[..., :height, :width]
    grain = torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)
    strength = torch.rand(batch, 1, 1, width, generator=generator, dtype=torch.float64) * 0.1
    return (patches + grain * strength).clamp(0, 1)


def load(path):
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), np.float64) / 255).permute(2, 0, 1)[None]


def piqe_block_by_block(image):
    """The published algorithm for one [3, H, W] float64 image, one block and one segment at a time."""
    luma = np.tensordot(np.array(LUMA), image.numpy(), 1)
    luma = np.round(255 * luma / luma.max())
    luma = np.pad(luma, ((0, -luma.shape[0] % 16), (0, -luma.shape[1] % 16)), mode="edge")
    window = np.exp(-0.5 * (np.arange(-3, 4) / (7 / 6)) ** 2)
    window /= window.sum()

    def smooth(plane):
        return correlate1d(correlate1d(plane, window, 0, mode="nearest"), window, 1, mode="nearest")

    mean = smooth(luma)
    coefficients = (luma - mean) / (np.sqrt(np.abs(smooth(luma**2) - mean**2)) + 1)
    total, num_active = 0.0, 0
    for top in range(0, luma.shape[0], 16):
        for left in range(0, luma.shape[1], 16):
            block = coefficients[top : top + 16, left : left + 16]
            variance = block.var(ddof=1)
            if variance <= 0.1:
                continue
            num_active += 1
            edges = (block[0], block[-1], block[:, 0], block[:, -1])
            if any(edge[start : start + 6].std(ddof=1) < 0.1 for edge in edges for start in range(11)):
                total += 1 - variance
            std = np.sqrt(variance)
            ratio = block[:, 7:9].std(ddof=1) / np.delete(block, [7, 9], axis=1).std(ddof=1)
            if std > 2 * abs(std - ratio) / max(std, ratio):
                total += variance
    return (total + 1) / (num_active + 1) * 100


@pytest.mark.parametrize("name", OFFICIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_official_figures(fixtures_dir, name, dtype):
    """The figures that MATLAB's piqe gives come out to both published decimals."""
    image = load(fixtures_dir / "calibration" / "dist" / f"{name}.png").to(dtype)
    torch.testing.assert_close(piqe(image), torch.tensor([OFFICIAL[name]], dtype=dtype), **ROUNDED_FIGURE)


@pytest.mark.parametrize("size", [(16, 16), (96, 128), (100, 100), (17, 47), (129, 240)])
def test_equals_block_by_block_transcription(size):
    """The batched formula equals a loop over blocks and segments, also where a side is not a multiple of 16."""
    images = textured(3, *size, batch=3)
    expected = torch.tensor([piqe_block_by_block(image) for image in images], dtype=torch.float64)
    torch.testing.assert_close(piqe(images), expected, **FORMULA_FP32)
    assert expected.std() > 0.1, "the images must differ, or this compares constants"


def test_equals_pyiqa_where_no_padding_is_needed():
    """pyiqa gives the same score at multiples of 16; at other sizes it pads by `size % 16` and is left out."""
    pyiqa = pytest.importorskip("pyiqa")
    metric = pyiqa.create_metric("piqe", device="cpu")
    images = textured(5, 160, 224, batch=4).float()
    torch.testing.assert_close(piqe(images), metric(images).flatten(), **OTHER_PACKAGE)


def test_score_does_not_depend_on_the_batch():
    """An image alone, in a batch, in another order and beside a broken image scores bit-identically."""
    images = textured(7, 112, 144, batch=5).float()
    together = piqe(images)
    alone = torch.cat([piqe(image[None]) for image in images])
    torch.testing.assert_close(together, alone, **EXACT)
    torch.testing.assert_close(piqe(images.flip(0)), together.flip(0), **EXACT)
    broken = images.clone()
    broken[2, 0, 3, 3] = torch.nan
    kept = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(piqe(broken)[kept], together[kept], **EXACT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_one_bad_pixel_gives_nan(value, channel):
    """One NaN or infinite pixel in any channel makes that score NaN instead of a plausible number."""
    images = textured(8, 64, 64, batch=2).float()
    images[0, channel, 40, 10] = value
    scores = piqe(images)
    assert scores[0].isnan()
    assert scores[1].isfinite()


@pytest.mark.parametrize("level", [0.0, 0.25, 0.7, 1.0])
def test_flat_image_is_worst(level):
    """Without a busy block the definition gives (0 + 1) / (0 + 1) * 100, also for black."""
    torch.testing.assert_close(piqe(torch.full((2, 3, 40, 33), level)), torch.full((2,), 100.0), **EXACT)


def test_out_of_range_luminance_saturates():
    """A decoder's overshoot, or 0..255 input, is read like an 8-bit file: clipped, never NaN."""
    gray = textured(9, 64, 64).float().mean(1, keepdim=True).expand(-1, 3, -1, -1) * 1.4 - 0.2
    torch.testing.assert_close(piqe(gray), piqe(gray.clamp(0, 1)), **EXACT)
    assert piqe(textured(9, 64, 64).float() * 255).isfinite().all()
    assert piqe(textured(9, 64, 64).float() * -1e30).isfinite().all()


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    height=st.integers(16, 70),
    width=st.integers(16, 70),
    density=st.sampled_from([0.001, 0.02, 0.3, 1.0]),
)
def test_scores_stay_between_0_and_100(seed, height, width, density):
    """Sparse dots, dense noise and flat areas of any size stay within the documented range."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(2, 3, height, width, generator=generator) < density).float()
    scores = piqe(images)
    assert scores.shape == (2,)
    assert ((scores >= 0) & (scores <= 100)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images_are_computed_in_fp32(dtype):
    """Half-precision images that touch 1.0 score as their float32 copies do."""
    images = textured(11, 64, 80, batch=2).to(dtype)
    scores = piqe(images)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, piqe(images.float()), **EXACT)


def test_degradation_raises_the_score():
    """Noise and JPEG-like 8x8 averaging of a photograph score worse than the photograph."""
    data = pytest.importorskip("skimage.data")
    photo = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255
    noise = torch.randn(photo.shape, generator=torch.Generator().manual_seed(0)) * 0.1
    blocky = torch.nn.functional.avg_pool2d(photo, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    pristine, noisy, averaged = piqe(torch.cat([photo, (photo + noise).clamp(0, 1), blocky]))
    assert noisy > pristine + 5
    assert averaged > pristine + 5


def test_blind_to_global_darkening():
    """The documented limit: halving every pixel leaves the score as it was."""
    images = textured(12, 64, 64, batch=2).float()
    torch.testing.assert_close(piqe(images * 0.5), piqe(images), **EXACT)


def test_pays_for_light_noise(photographs):
    """The documented fault: noise of 3/255 improves every photograph's score, while SSIM sees that it got worse."""
    noise = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    noisy = (photographs + 3 / 255 * noise).clamp(0, 1)
    assert (piqe(noisy) < piqe(photographs)).all()
    assert (ssim(noisy, photographs) < 0.99).all()


def test_no_graph_is_built():
    """Scores carry no gradient, since the formula is piecewise constant."""
    assert not piqe(textured(13, 32, 32).requires_grad_()).requires_grad


def test_same_scores_from_threads():
    """Concurrent calls neither race nor see each other."""
    batches = [textured(seed, 80, 80, batch=2).float() for seed in range(8)]
    expected = [piqe(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(piqe, batches), expected):
            torch.testing.assert_close(got, want, **EXACT)


def test_empty_batch():
    """No images give no scores."""
    assert piqe(torch.empty(0, 3, 32, 32)).shape == (0,)


def test_too_small_names_the_size():
    """Below one block the error states the smallest side; 16 itself is scored."""
    with pytest.raises(ValueError, match=f"H, W >= {MIN_SIDE}, got \\[1, 3, 15, 64\\]"):
        piqe(torch.rand(1, 3, 15, 64))
    assert piqe(torch.rand(1, 3, 16, 16)).isfinite().all()
