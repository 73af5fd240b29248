"""Gradients reach every pixel in [0, 1], black and white included, and are finite where metrics have traps."""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import iqareward
from iqareward import Calibrated, FidelityFloor, FullReference, NoReference, SoftMin
from iqareward.difficulty import rmse
from iqareward.diffusion import clamp_straight_through
from iqareward.functional import ssim
from iqareward.functional.resize import pillow_resize
from iqareward.rewards.catalog import CATALOG
from iqareward.rewards.combine import AffineMap, LogisticMap
from iqareward.rewards.core import sanitize
from iqareward.rewards.cvvdp import CVVDPReward
from iqareward.rewards.owl2.rewards import DeQAReward, QAlignReward
from iqareward.rewards.perceptual import DISTSReward, LPIPSReward, STLPIPSReward
from iqareward.rewards.pyiqa import MIN_SIDE, PyIQAReward
from iqareward.types import Reward
from tests.owl2.owl2_tiny import SMALL, seeded_model
from tests.rewards import clip_tiny
from tests.tolerances import EXACT

WITHOUT_WEIGHTS = [name for name, entry in CATALOG.items() if entry.differentiable and not entry.weights]
PYIQA = ["psnr", "psnry", "ssim", "ssimc", "ms_ssim", "cw_ssim", "fsim", "vif", "gmsd", "nlpd", "vsi"]
CLIP = clip_tiny.NAMES
VLM = ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"]
needs_piq = pytest.mark.skipif(importlib.util.find_spec("lpips") is None, reason="needs the extra perceptual")
needs_pyiqa = pytest.mark.skipif(importlib.util.find_spec("pyiqa") is None, reason="needs the extra pyiqa")
needs_vlm = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra vlm")


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def _vlm(family: str) -> Reward:
    from iqareward.rewards.vlm.rewards import LevelReward
    from tests.vlm import tiny

    return LevelReward(tiny.pair(family), differentiable=True)


def _rating() -> Reward:
    from iqareward.rewards.vlm.presets import VISUALQUALITY_R1
    from iqareward.rewards.vlm.rewards import RatingReward
    from tests.vlm import tiny

    words = tiny.processor("qwen2_5_vl")
    model = tiny.model("qwen2_5_vl", words.tokenizer)
    return RatingReward((model, words), VISUALQUALITY_R1, differentiable=True, min_digit_mass=0.0)


def _composed(kind: str) -> Reward:
    first, second = (iqareward.load(name, differentiable=True) for name in ("ssim", "haarpsi"))
    if kind == "sum":
        return iqareward.load("0.5*ssim + 0.5*haarpsi", differentiable=True)
    if kind == "softmin":
        return SoftMin([first, second], temperature=0.1)
    if kind == "affine":
        return Calibrated(first, AffineMap(-1.0, 1.0))
    if kind == "logistic":
        return Calibrated(first, LogisticMap(0.5, 0.2))
    return FidelityFloor(first, second, floor=0.9)


BUILD: dict[str, Callable[[dict[str, Path]], Reward]] = {
    **{name: lambda _, name=name: iqareward.load(name, differentiable=True) for name in WITHOUT_WEIGHTS},
    **{
        f"lpips_{net}": lambda files, net=net: LPIPSReward(net, weights=files[net], differentiable=True)
        for net in ("alex", "vgg", "squeeze")
    },
    "cvvdp": lambda _: CVVDPReward(device="cpu", differentiable=True),
    "quick": lambda _: iqareward.load("quick", device="cpu", differentiable=True),
    "stlpips": lambda _: STLPIPSReward(differentiable=True),
    **{name: lambda files, name=name: clip_tiny.reward(name, files["folder"], differentiable=True) for name in CLIP},
    "dists": lambda files: DISTSReward(weights=files["vgg"], differentiable=True),
    "qalign": lambda _: QAlignReward(seeded_model(SMALL), differentiable=True),
    "deqa": lambda _: DeQAReward(seeded_model(SMALL), differentiable=True),
    **{f"level_{family}": lambda _, family=family: _vlm(family) for family in VLM},
    "rating": lambda _: _rating(),
    **{f"pyiqa:{name}": lambda _, name=name: PyIQAReward(name, differentiable=True) for name in PYIQA},
    "pyiqa normalised": lambda _: PyIQAReward("ssim", differentiable=True, normalize=True),
    **{kind: lambda _, kind=kind: _composed(kind) for kind in ("sum", "softmin", "affine", "logistic", "floor")},
    "function": lambda _: NoReference(brightness, higher_is_better=True, differentiable=True),
    "minus rmse": lambda _: FullReference(rmse, higher_is_better=False, differentiable=True),
}


def _marks(name: str) -> list[pytest.MarkDecorator]:
    if name.startswith(("lpips", "stlpips", "dists")):
        return [needs_piq]
    if name.startswith("pyiqa"):
        unclosed = "ignore:unclosed file .*default_dataset_configs:ResourceWarning"
        ignored = "ignore:Exception ignored in.*default_dataset_configs:pytest.PytestUnraisableExceptionWarning"
        return [needs_pyiqa, pytest.mark.filterwarnings(unclosed), pytest.mark.filterwarnings(ignored)]
    return [needs_vlm] if name.startswith(("level", "rating", *CLIP)) else []


EVERY = pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in BUILD])


@pytest.fixture
def reward(name: str, request: pytest.FixtureRequest) -> Reward:
    """The reward of that name; weights of backbones are made only for those that need some."""
    files = request.getfixturevalue("backbone_files") if name.startswith(("lpips", "dists")) else {}
    return BUILD[name]({"folder": request.getfixturevalue("tmp_path"), **files})


def _side(name: str) -> int:
    if name.startswith("pyiqa:"):
        return max(48, MIN_SIDE.get(name.removeprefix("pyiqa:"), 1))
    return {"ms_ssim": 161}.get(name, 48)


@cache
def _textured(side: int) -> Tensor:
    """`[2, 3, side, side]` of smooth colours and noise; 15 % of the values are 0 and 15 % are 1."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, side // 8, side // 8, generator=rng)
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    images = (0.1 + 0.8 * smooth + 0.05 * torch.randn(2, 3, side, side, generator=rng)).clamp(0.05, 0.95)
    chance = torch.rand(2, 3, side, side, generator=rng)
    return torch.where(chance < 0.15, 0.0, torch.where(chance > 0.85, 1.0, images))


def _references(side: int) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    return 0.2 + 0.5 * _textured(side) + 0.1 * torch.rand(2, 3, side, side, generator=rng)


def _gradient(reward: Any, images: Tensor, references: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    prompts = ["the cat"] * len(images)
    (gradient,) = torch.autograd.grad(reward(images, references=references, prompts=prompts).sum(), images)
    return gradient


@EVERY
def test_black_and_white_pixels_have_the_gradient_of_their_neighbours(name: str, reward: Reward) -> None:
    """A pixel of exactly 0 or 1 gets the gradient that it gets a millionth inside."""
    side = _side(name)
    images = _textured(side)
    at_bounds = (images == 0) | (images == 1)
    gradient = _gradient(reward, images, _references(side))[at_bounds]
    inside = _gradient(reward, images.clamp(1e-6, 1 - 1e-6), _references(side))[at_bounds]
    assert (inside != 0).float().mean() > 0.9
    assert (gradient != 0)[inside != 0].float().mean() > 0.99
    # The few others lie at a kink of the metric itself, such as the magnitude of an edge between equal pixels.
    close = torch.isclose(gradient, inside, rtol=1e-2, atol=1e-3 * float(inside.abs().max()))
    assert close.float().mean() > 0.99


@EVERY
def test_an_overshoot_gets_the_gradient_through_a_straight_through_clamp(name: str, reward: Reward) -> None:
    """Pixels up to 1.0 too bright or too dark get the gradient of their clamped value."""
    side = _side(name)
    images = _textured(side)
    beyond = images.clone()
    beyond[images == 1] += 1.0
    beyond[images == 0] -= 0.7
    through = _gradient(
        lambda pixels, **columns: reward(clamp_straight_through(pixels), **columns),
        beyond,
        _references(side),
    )
    torch.testing.assert_close(through, _gradient(reward, images, _references(side)), **EXACT)


@EVERY
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")  # some have no score on some pairs
@pytest.mark.parametrize("kind", ["identical", "black", "white", "flat", "black image", "white reference"])
def test_gradients_are_finite(name: str, kind: str, reward: Reward) -> None:
    """Identical, black, white and flat pairs have finite gradients, also where the score is missing."""
    side = _side(name)
    textured = _references(side)
    plain = {level: torch.full_like(textured, level) for level in (0.0, 0.5, 1.0)}
    pair = {
        "identical": (textured, textured),
        "black": (plain[0.0], plain[0.0]),
        "white": (plain[1.0], plain[1.0]),
        "flat": (plain[0.5], plain[0.5]),
        "black image": (plain[0.0], textured),
        "white reference": (textured, plain[1.0]),
    }[kind]
    assert _gradient(reward, *pair).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rmse_of_identical_images(dtype: torch.dtype) -> None:
    """The root mean squared error is 0 with gradient 0 for one pair, and has its usual gradient for the other."""
    images = torch.full((2, 3, 4, 4), 0.5, dtype=dtype)
    references = images.clone()
    references[1] -= 0.25
    images.requires_grad_()
    distances = rmse(images, references)
    distances.sum().backward()
    assert distances.tolist() == [0.0, 0.25]
    torch.testing.assert_close(images.grad[0], torch.zeros_like(images[0]), **EXACT)
    torch.testing.assert_close(images.grad[1], torch.full_like(images[1], 1 / 48), rtol=1e-6, atol=0)


def test_outside_pixels_get_no_gradient_from_a_reward() -> None:
    """Without a straight-through clamp an overshoot is clamped, and its pixel's gradient is 0."""
    images = torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1]).repeat(1, 3, 1, 1).requires_grad_()
    clean, _ = sanitize(images)
    clean.sum().backward()
    assert images.grad[0, 0, 0].tolist() == [0.0, 1.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("size", [(24, 24), (70, 61), (40, 50)])
def test_resized_black_and_white_areas_keep_their_gradient(level: float, size: tuple[int, int]) -> None:
    """Pillow's resize passes each output pixel's gradient of 1 on to the input, in flat black and white areas too."""
    images = torch.full((1, 3, 40, 50), level).requires_grad_()
    pillow_resize(images, size).sum().backward()
    torch.testing.assert_close(images.grad.sum(), torch.tensor(3.0 * size[0] * size[1]), rtol=1e-5, atol=0)
    assert (images.grad > 0).all()


def test_a_gradient_of_the_gradient() -> None:
    """Second derivatives exist at the bounds: a gradient penalty can be trained through."""
    images = _textured(48).clone().requires_grad_()
    reward = iqareward.load("psnr", differentiable=True)
    (first,) = torch.autograd.grad(reward(images, references=_references(48)).sum(), images, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), images)
    assert second.isfinite().all()
    assert (second != 0).float().mean() > 0.9


def _ascend(start: Tensor, references: Tensor, steps: int, *, clamp: Callable[[Tensor], Tensor]) -> Tensor:
    pixels = start.clone().requires_grad_()
    reward = iqareward.load("ssim", differentiable=True)
    optimiser = torch.optim.Adam([pixels], lr=0.02)
    for _ in range(steps):
        optimiser.zero_grad()
        (-reward(clamp(pixels), references=references)).sum().backward()
        optimiser.step()
    return pixels.detach()


def test_an_overshoot_comes_back() -> None:
    """Half an image that is 1.0 too bright returns into [0, 1] under SSIM through a straight-through clamp."""
    references = _references(48)[:1]
    start = references.clone()
    start[..., 24:] += 1.0
    found = _ascend(start, references, 150, clamp=clamp_straight_through)
    assert ssim(start.clamp(0, 1), references) < 0.6
    assert ssim(found.clamp(0, 1), references) > 0.9


def test_a_black_start_moves() -> None:
    """From black pixels SSIM climbs towards its reference."""
    references = _references(48)[:1]
    found = _ascend(torch.zeros_like(references), references, 100, clamp=clamp_straight_through)
    assert ssim(found.clamp(0, 1), references) > ssim(torch.zeros_like(references), references) + 0.5


def test_a_screenshot_of_text_has_a_gradient_at_every_pixel() -> None:
    """Black letters on white, compared with a blurred copy: no pixel is left without a gradient."""
    rng = torch.Generator().manual_seed(0)
    letters = (torch.rand(1, 1, 24, 24, generator=rng) < 0.7).float().expand(-1, 3, -1, -1)
    images = nn.functional.interpolate(letters, scale_factor=2)
    blurred = nn.functional.avg_pool2d(images, 3, stride=1, padding=1)
    gradient = _gradient(iqareward.load("ssim", differentiable=True), images, blurred)
    assert (gradient != 0).all()
