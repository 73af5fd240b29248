"""Whatever comes in, every classical metric answers with a number, NaN, or an error that says what was expected."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from iqareward import functional as F
from iqareward import load
from iqareward.rewards.catalog import CATALOG

FULL_REFERENCE = [F.psnr, F.ssim, F.ms_ssim, F.gmsd, F.haarpsi]
NO_REFERENCE = [F.piqe, F.niqe, F.brisque]
CLASSICAL = ["psnr", "ssim", "ms_ssim", "gmsd", "haarpsi", "piqe", "niqe", "brisque"]
MAX_PIXELS = 120_000

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int64, torch.bool]


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int]:
    """Sides from 1 to 4096, strips and squares, of a bounded area."""
    side = st.one_of(st.integers(1, 24), st.sampled_from([48, 95, 96, 97, 160, 161, 192, 257, 1000, 4096]))
    height = draw(side)
    width = draw(side.filter(lambda width: height * width <= MAX_PIXELS))
    return height, width


@st.composite
def batches(draw: st.DrawFn) -> Tensor:
    """Image batches of every dtype and range, some with a poisoned pixel."""
    height, width = draw(sizes())
    count = draw(st.integers(0, 3))
    low, high = draw(st.sampled_from([(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (0.5, 0.5), (-1e4, 1e4), (0.0, 1e30)]))
    dtype = draw(st.sampled_from(FLOATS + INTEGERS))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    images = torch.rand(count, 3, height, width, generator=rng, dtype=torch.float64) * (high - low) + low
    images = images.clamp(-1e18, 1e18).to(dtype) if dtype in INTEGERS else images.to(dtype)
    poison = draw(st.sampled_from([None, None, torch.nan, torch.inf, -torch.inf, 3e38]))
    if poison is not None and count and images.is_floating_point():
        images[draw(st.integers(0, count - 1)), 1, 0, -1] = poison
    return images


def outcome(metric, *arguments: Tensor) -> Tensor | None:
    """The scores, or None for an error that explains itself."""
    try:
        return metric(*arguments)
    except (ValueError, TypeError) as error:
        assert "expected" in str(error)
        assert "got" in str(error)
        return None


@pytest.mark.parametrize("metric", FULL_REFERENCE + NO_REFERENCE, ids=lambda metric: metric.__name__)
@settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(images=batches())
def test_functions(metric, images: Tensor) -> None:
    """A function gives `[B]` numbers or NaN, never inf; broken pixels give NaN; too small or integer is an error."""
    references = images.flip(-1)
    arguments = (images, references) if metric in FULL_REFERENCE else (images,)
    scores = outcome(metric, *arguments)
    if scores is None:
        return
    assert scores.shape == images.shape[:1]
    assert scores.dtype == (torch.float64 if images.dtype == torch.float64 else torch.float32)
    assert not scores.isinf().any()
    broken = ~images.isfinite().flatten(1).all(1)
    assert scores[broken].isnan().all()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("name", CLASSICAL)
@settings(deadline=None, max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(images=batches())
def test_rewards(name: str, images: Tensor) -> None:
    """A reward gives float32 numbers or NaN for any size; only integers are an error; what is not in [0, 1] is NaN."""
    scores = outcome(load(name), images, images.flip(-1))
    assert (scores is None) == (not images.is_floating_point())
    if scores is None:
        return
    assert scores.dtype == torch.float32
    assert scores.shape == images.shape[:1]
    assert not scores.isinf().any()
    outside = ~((images >= -0.25) & (images <= 1.25)).flatten(1).all(1)
    assert scores[outside].isnan().all()


@pytest.mark.parametrize("name", CLASSICAL)
@pytest.mark.parametrize(
    "shape", [(3, 64, 64), (2, 1, 64, 64), (2, 4, 64, 64), (64, 64), (2, 3, 0, 64), (1, 2, 3, 64, 64)]
)
def test_shapes_that_are_no_batch(name: str, shape: tuple[int, ...]) -> None:
    """A shape that is no image batch is refused with the shape in the message."""
    images = torch.zeros(shape)
    assert outcome(load(name), images, images) is None
    assert CATALOG[name].extra == ""
