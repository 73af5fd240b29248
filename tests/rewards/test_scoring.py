"""The contract around a metric: whatever comes in, each image gets its own number, NaN, or the call a clear error."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import iqareward
from iqareward import FullReference, NoReference
from iqareward.rewards.core import RANGE_SLACK, UnscoredWarning, collect_reasons, sanitize
from tests.gpu import needs_cuda, no_waits
from tests.tolerances import EXACT, OTHER_PACKAGE


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def error(images: Tensor, references: Tensor) -> Tensor:
    return (images - references).square().mean(dim=(1, 2, 3))


def recorded_dtype(images: Tensor) -> Tensor:
    assert images.dtype == torch.float32
    assert not torch.is_grad_enabled()
    assert not torch.is_autocast_enabled(images.device.type)
    assert not torch.is_inference_mode_enabled()
    return (images @ images.mT).mean(dim=(1, 2, 3))  # autocast would run this in half precision


BRIGHTNESS = NoReference(brightness, higher_is_better=True, bounds=(0.0, 1.0), min_side=2)
ERROR = FullReference(error, higher_is_better=False, bounds=(-1.0, 0.0))


def photos(count: int = 4, side: int = 8, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def test_sign_and_name() -> None:
    """Lower-is-better metrics are negated; names come from the metric."""
    images = photos()
    torch.testing.assert_close(ERROR(images, references=1 - images), -error(images, 1 - images), **EXACT)
    assert (ERROR.name, BRIGHTNESS.name) == ("error", "brightness")
    assert FullReference(error, higher_is_better=False, name="mse").name == "mse"
    from functools import partial

    with pytest.raises(ValueError, match=r"pass name=\.\.\."):
        NoReference(partial(brightness), higher_is_better=True)


def test_micro_batches_and_order() -> None:
    """Scores do not depend on the batch size, and mixed sizes come back in their order."""
    images = photos(7)
    whole = BRIGHTNESS(images)
    for batch_size in (1, 3, 7):
        torch.testing.assert_close(
            NoReference(brightness, higher_is_better=True, batch_size=batch_size)(images), whole, **EXACT
        )
    mixed = [images[0], images[1, :, :4], images[2], images[3, :, :4], images[4, :, :, :5]]
    expected = torch.stack([image.mean() for image in mixed])
    torch.testing.assert_close(BRIGHTNESS(mixed), expected, **OTHER_PACKAGE)
    references = [1 - image for image in mixed]
    expected = torch.stack([-(image - reference).square().mean() for image, reference in zip(mixed, references)])
    torch.testing.assert_close(ERROR(mixed, references=references), expected, **OTHER_PACKAGE)


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": -1}, {"bytes_per_pixel": 0}])
def test_sizes_of_pieces_are_positive(options: dict[str, int]) -> None:
    """Others are refused in words, on every device."""
    reward = NoReference(brightness, higher_is_better=True, **options)
    with pytest.raises(ValueError, match="brightness expected `bytes_per_pixel` > 0, and `batch_size` >= 1 or None"):
        reward(photos())


def test_scores_of_other_dtypes_become_float32() -> None:
    """Verdicts of a metric count as 0 and 1, and what float32 cannot hold is no score."""
    images = torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)])
    bright = NoReference(lambda rows: brightness(rows) > 0.5, higher_is_better=True, name="bright")
    torch.testing.assert_close(bright(images), torch.tensor([0.0, 1.0]), **EXACT)
    huge = NoReference(lambda rows: brightness(rows).double() * 1e300, higher_is_better=True, name="huge")
    torch.testing.assert_close(huge(images), torch.tensor([0.0, torch.nan]), equal_nan=True, **EXACT)


def test_a_broken_image_is_alone() -> None:
    """NaN, inf, a wrong range, or a tiny size costs that image its score and no other."""
    images = list(photos(6))
    images[1][0, 3, 3] = torch.nan
    images[2][2, 0, 0] = -torch.inf
    images[3] *= 255
    images[4] = torch.rand(3, 1, 9)
    scores = BRIGHTNESS(images)
    assert scores.isnan().tolist() == [False, True, True, True, True, False]
    torch.testing.assert_close(scores[[0, 5]], torch.stack([images[0].mean(), images[5].mean()]), **OTHER_PACKAGE)
    broken = ERROR(photos(3), references=torch.stack([images[0], images[1], images[5]]))
    assert broken.isnan().tolist() == [False, True, False]


def test_slack() -> None:
    """A decoder's overshoot is clamped; what lies further outside was never in [0, 1]."""
    images = torch.full((3, 3, 4, 4), 0.5)
    images[0, 0, 0, 0] = 1 + RANGE_SLACK
    images[1, 0, 0, 0] = -RANGE_SLACK
    images[2, 0, 0, 0] = 1 + RANGE_SLACK + 0.01
    clean, valid = sanitize(images)
    assert valid.tolist() == [True, True, False]
    assert clean.amax(dim=(1, 2, 3)).tolist() == [1.0, 0.5, 0.5]
    assert clean.amin(dim=(1, 2, 3)).tolist() == [0.5, 0.0, 0.5]


def test_metric_that_is_not_finite() -> None:
    """An infinite value of the metric is no score."""
    reward = NoReference(_reciprocal_minimum, higher_is_better=True)
    scores = reward(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]))
    torch.testing.assert_close(scores, torch.tensor([torch.nan, 1.0]), equal_nan=True, **EXACT)


def _reciprocal_minimum(images: Tensor) -> Tensor:
    return 1 / images.amin(dim=(1, 2, 3))


def test_caller_state_does_not_matter() -> None:
    """The metric runs in float32 without graph, autocast or inference mode in every thread and under every state."""
    reward = NoReference(recorded_dtype, higher_is_better=True)
    images = photos()
    expected = reward(images)
    states = [torch.enable_grad, torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]

    def score(state) -> Tensor:
        with state():
            return reward(images.clone().requires_grad_())

    with ThreadPoolExecutor(4) as pool:
        for scores in pool.map(score, states * 3):
            assert not scores.requires_grad
            assert not scores.is_inference()
            torch.testing.assert_close(scores, expected, **EXACT)


def test_gradients_reach_valid_pixels_only() -> None:
    """With differentiable=True each valid image gets its gradient, under no_grad too; a broken one gets zeros."""
    images = photos(3)
    images[1, 0, 0, 0] = torch.nan
    images.requires_grad_()
    with torch.no_grad():
        scores = NoReference(brightness, higher_is_better=False, differentiable=True)(images)
    scores.nan_to_num().sum().backward()
    expected = torch.full_like(images, -1 / (3 * 8 * 8))
    expected[1] = 0
    torch.testing.assert_close(images.grad, expected, **OTHER_PACKAGE)


def test_checks_are_the_same_without_a_graph_and_under_transforms() -> None:
    """Images come out the same with and without a graph, mapped over and traced, and what was given stays as it was."""
    images = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 1.2 - 0.1
    images[1, 0, 0, 0], images[2] = torch.nan, 9.0
    given_images = images.clone()
    expected, valid = sanitize(images)
    assert valid.tolist() == [True, False, False]
    with torch.no_grad():
        traced = make_fx(lambda batch: sanitize(batch)[0])(images)
        torch.testing.assert_close(sanitize(images)[0], expected, **EXACT)
        torch.testing.assert_close(torch.vmap(sanitize)(images[None])[0][0], expected, **EXACT)
        torch.testing.assert_close(traced(images.flip(0)), expected.flip(0), **EXACT)
    torch.testing.assert_close(images, given_images, equal_nan=True, **EXACT)


def test_pickling() -> None:
    """A lifted metric travels to workers."""
    images = photos()
    copy = pickle.loads(pickle.dumps(ERROR))
    torch.testing.assert_close(copy(images, references=images / 2), ERROR(images, references=images / 2), **EXACT)


@pytest.mark.parametrize("images", [torch.zeros(0, 3, 8, 8), []])
def test_no_images(images) -> None:
    """No images give no scores."""
    assert BRIGHTNESS(images).shape == (0,)
    assert ERROR(images, references=images).shape == (0,)


GOOD = torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(
    ("images", "references", "kind", "message"),
    [
        (GOOD, None, ValueError, r"references=\.\.\."),
        (GOOD, GOOD[:1], ValueError, r"\[2, 3, 8, 8\].*\[1, 3, 8, 8\]"),
        (GOOD, GOOD[:, :, :4], ValueError, "Resize or repeat"),
        (GOOD.byte(), GOOD, TypeError, r"uint8.*to_images"),
        (GOOD[0], GOOD[0], ValueError, r"\[B, 3, H, W\].*\[3, 8, 8\]"),
        (GOOD[:, :1], GOOD[:, :1], ValueError, r"\[2, 1, 8, 8\]"),
        (GOOD[..., :0], GOOD[..., :0], ValueError, "H, W >= 1"),
        (GOOD.numpy(), GOOD, TypeError, "ndarray"),
        (list(GOOD), list(GOOD)[:1], ValueError, "as many references"),
        (list(GOOD), [GOOD[0], GOOD[1, :, :4]], ValueError, r"references\[1\]"),
        ([GOOD[0], "x"], list(GOOD), TypeError, r"images\[1\].*str"),
        ([GOOD], [GOOD], ValueError, r"images\[0\].*\[3, H, W\]"),
        (GOOD, GOOD.to("meta"), ValueError, r"references\.to\(images\.device\)"),
    ],
)
def test_bad_arguments(images, references, kind, message) -> None:
    """Each misuse is an error that says what was expected, what came and what to do."""
    with pytest.raises(kind, match=message):
        ERROR(images, references=references)


def test_metric_that_reduces_over_the_batch() -> None:
    """A metric that returns one number for the batch is refused, not broadcast."""
    with pytest.raises(ValueError, match="never over the batch"):
        NoReference(torch.mean, higher_is_better=True, name="mean")(GOOD)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), max_size=6),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    poison=st.sampled_from([0.0, 0.7, 1.2, 3.0, -1.0, torch.nan, torch.inf]),
)
def test_any_list_of_images(sizes: list[tuple[int, int]], dtype: torch.dtype, poison: float) -> None:
    """For every mix of sizes, dtypes and one odd pixel: float32 `[B]`, each the score of that image alone."""
    rng = torch.Generator().manual_seed(len(sizes))
    images = [torch.rand(3, *size, generator=rng).to(dtype) for size in sizes]
    if images:
        images[-1][0, 0, 0] = poison
    scores = BRIGHTNESS(images)
    assert scores.dtype == torch.float32
    assert scores.shape == (len(images),)
    for image, score in zip(images, scores, strict=True):
        torch.testing.assert_close(BRIGHTNESS(image[None])[0], score, equal_nan=True, **OTHER_PACKAGE)


SIGNED, BYTES = photos() * 2 - 1, photos() * 255
WHY_UNSCORED = [
    (
        SIGNED,
        None,
        r"4 of 4 images lie outside \[0, 1\].*looks like \[-1, 1\].*to_images\(images, value_range=\(-1, 1\)",
    ),
    (1.4 * photos(), None, r"or like a sampler that overshoots \(then clamp\)"),
    (BYTES, None, r"looks like \[0, 255\]; convert them with .*value_range=\(0, 255\)"),
    (list(BYTES), None, r"value_range=\(0, 255\)"),
    (photos() * 7 - 3, None, r"span -2.991 to 3.999; convert them with .*value_range=\(black, white\)"),
    (photos(), SIGNED, r"4 of 4 references lie outside .*to_images\(references, value_range=\(-1, 1\)"),
    (photos(3, side=1), None, "3 of 3 images have a side shorter than 2 pixels"),
    (torch.full((2, 3, 8, 8), torch.nan), None, "2 of 2 images have NaN or infinite pixels"),
    ([photos(1, side=1)[0], BYTES[0]], None, r"1 of 2 images have a side .*; 1 of 2 images lie outside"),
    (torch.zeros(1, 3, 8, 8), None, "has no finite value for these images"),
]


def inverse_brightness(images: Tensor, references: Tensor) -> Tensor:
    return 1 / images.amax((1, 2, 3))


@pytest.mark.parametrize(("images", "references", "why"), WHY_UNSCORED)
def test_a_batch_without_scores_is_reported_once(images, references, why: str) -> None:
    """Nothing scored: one warning in the life of the reward, which gives the reason and what to do."""
    reward = FullReference(inverse_brightness, higher_is_better=True, min_side=2)
    references = images if references is None else references
    with pytest.warns(UnscoredWarning, match=f"^inverse_brightness scored no image of this batch: .*{why}") as caught:
        assert reward(images, references=references).isnan().all()
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert reward(images, references=references).isnan().all()  # a second warning would be an error here


def test_each_reward_warns_for_itself() -> None:
    """A reward that scored before still warns, an equal one too, and a batch with one score does not."""
    reward, other = (NoReference(brightness, higher_is_better=True) for _ in range(2))
    assert reward == other
    assert reward(torch.cat([photos(), BYTES])).isfinite().sum() == 4
    assert reward(photos(0)).shape == (0,)
    for each in (reward, other, pickle.loads(pickle.dumps(NoReference(brightness, higher_is_better=True)))):
        with pytest.warns(UnscoredWarning):
            each(SIGNED)


def test_reasons_are_collected_in_place_of_warnings() -> None:
    """Within `collect_reasons` every call without a score gives its reason, each part of a sum too, and none warns."""
    reward = iqareward.load("0.5*ssim + 0.5*niqe[-12, 0]")
    small, broken = photos(1, side=8), torch.full((1, 3, 192, 192), torch.nan)
    with collect_reasons() as reasons:
        for images in (small, small, broken):
            reward(images, references=images)
        reward(torch.rand(2, 3, 192, 192), references=torch.rand(2, 3, 192, 192))
    sides = ["ssim: the image has a side shorter than 11 pixels", "niqe: the image has a side shorter than 96 pixels"]
    assert reasons[:4] == sides * 2
    assert reasons[4].startswith("ssim: the image has NaN")
    assert len(reasons) == 6
    with pytest.warns(UnscoredWarning, match="ssim scored no image"), pytest.warns(UnscoredWarning, match="niqe"):
        reward(small, references=small)


@pytest.mark.parametrize("name", ["psnr", "ssim", "ms_ssim", "gmsd", "haarpsi", "piqe", "niqe", "brisque"])
def test_rewards_of_the_catalogue_warn(name: str) -> None:
    """The error of most beginners is named by every reward of the catalogue."""
    images = photos(2, side=192) * 2 - 1
    with pytest.warns(UnscoredWarning, match=rf"^{name} .*value_range=\(-1, 1\)"):
        iqareward.load(name)(images, references=images)


@pytest.mark.gpu
@needs_cuda
def test_gpu_only_the_first_call_looks() -> None:
    """On a GPU the first call of a reward warns, and a warm one does not wait for the device."""
    with pytest.warns(UnscoredWarning):
        NoReference(brightness, higher_is_better=True)(SIGNED.cuda())
    reward = NoReference(brightness, higher_is_better=True)
    images = photos().cuda()
    reward(images)
    with no_waits():
        reward(images)


def test_inference_tensors_are_scored_in_pieces() -> None:
    """Pieces that are scored again for a gradient may be inference tensors, as images or beside images."""

    def reward(batch_size: int | None) -> FullReference:
        return FullReference(
            lambda images, references: (images * references).mean((1, 2, 3)),
            higher_is_better=True,
            name="product",
            differentiable=True,
            batch_size=batch_size,
        )

    pieces = reward(2)
    images, references = torch.rand(2, 5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        made, compared = images.clone(), references.clone()
        inside = pieces(made, references=compared)
    pixels = images.clone().requires_grad_()
    whole = reward(None)(pixels, references=references)
    (expected,) = torch.autograd.grad(whole.sum(), pixels)
    torch.testing.assert_close(inside, whole.detach(), **EXACT)
    torch.testing.assert_close(pieces(made, references=compared), whole.detach(), **EXACT)
    (gradient,) = torch.autograd.grad(pieces(pixels, references=compared).sum(), pixels)
    torch.testing.assert_close(gradient, expected, **EXACT)
