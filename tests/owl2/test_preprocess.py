"""Preprocessing equals Pillow and numpy end to end; prompts are the published ids."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from iqareward.rewards.owl2.preprocess import CLIP_MEAN, CLIP_STD, LEVEL_IDS, PROMPTS, preprocess
from tests.tolerances import EXACT, FORMULA_FP32

IMAGE = -200


def pillow_pixels(image: np.ndarray, size: int = 448) -> np.ndarray:
    """The scorers' own pipeline from public parts: pad with the mean colour, bicubic, scale, normalise; `[3, S, S]`."""
    height, width = image.shape[:2]
    side = max(height, width)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(Image.fromarray(image), ((side - width) // 2, (side - height) // 2))
    levels = np.array(square.resize((size, size), Image.Resampling.BICUBIC)).astype(np.float32)
    mean, std = np.array(CLIP_MEAN, dtype=np.float32), np.array(CLIP_STD, dtype=np.float32)
    return ((levels / np.float32(255) - mean) / std).transpose(2, 0, 1)


@given(st.integers(1, 500), st.integers(1, 500), st.integers(0, 99))
@settings(deadline=None, max_examples=6, derandomize=True)
def test_equals_pillow_and_numpy(height: int, width: int, seed: int) -> None:
    """Any size, fp32: the network sees the same pixels, to the last bit."""
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = preprocess(torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255, 448)
    torch.testing.assert_close(found[0], torch.from_numpy(pillow_pixels(image)), **EXACT)


def test_wide_and_tall_images_are_centred() -> None:
    """Padding surrounds the content symmetrically, one row or column more after it when odd."""
    white = torch.ones(1, 3, 3, 8)
    pixels = preprocess(white, 8)
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    levels = ((pixels * std + mean) * 255).round()[0]
    assert [row.unique().numel() for row in levels[0]] == [1] * 8
    torch.testing.assert_close(levels[0, :, 0], torch.tensor([122.0, 122.0, 255.0, 255.0, 255.0, 122.0, 122.0, 122.0]))


def test_gradients_reach_original_pixels() -> None:
    """Every pixel of a differentiable call gets a gradient, at the resolution that was passed in."""
    images = torch.rand(2, 3, 60, 90, generator=torch.Generator().manual_seed(0)).requires_grad_()
    preprocess(images, 56).square().sum().backward()
    assert images.grad is not None
    assert images.grad.shape == images.shape
    assert (images.grad != 0).float().mean() > 0.95


def test_gradient_is_linear_in_the_resize() -> None:
    """For an image that is not resized the Jacobian is 1/std, exactly."""
    images = torch.full((1, 3, 16, 16), 0.5, dtype=torch.float64, requires_grad=True)
    preprocess(images, 16).sum().backward()
    expected = (1 / torch.tensor(CLIP_STD, dtype=torch.float64)).view(1, 3, 1, 1).expand(1, 3, 16, 16)
    torch.testing.assert_close(images.grad, expected, **FORMULA_FP32)


@pytest.mark.parametrize("task", ["quality", "aesthetics"])
def test_ids_are_the_reference_ids(fixtures_dir, task) -> None:
    """The hub prompt is what the original tokenizer and code produced."""
    expected = np.load(fixtures_dir / "mplug_owl2_tiny.npz")[f"ids_{task}"][0].tolist()
    prompt = PROMPTS[task]
    assert [*prompt.prefix, IMAGE, *prompt.suffix] == expected


def test_ids_written_out() -> None:
    """The published lists, independent of how they are assembled."""
    quality = [1, 3148, 1001, 29901, 1128, 723, 366, 6554, 278, 11029, 310, 445, 1967, 29973, 13, IMAGE]
    quality += [29871, 13, 22933, 9047, 13566, 29901, 450, 11029, 310, 278, 1967, 338]
    prompt = PROMPTS["quality"]
    assert [*prompt.prefix, IMAGE, *prompt.suffix] == quality
    assert LEVEL_IDS == (15129, 1781, 6534, 6460, 4319)
