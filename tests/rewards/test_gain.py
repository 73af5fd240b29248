"""Rewards that compare with the input: in the order that people expect, at the right size, within bounds."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import iqareward
from iqareward import (
    Cached,
    FullReference,
    InputFidelity,
    MicroBatched,
    NoReference,
    Overlapped,
    QualityGain,
    RemoteReward,
    check_reward,
    load,
)
from tests.conftest import center_crop
from tests.rewards.counting import Brightness
from tests.rewards.http_double import Double
from tests.tolerances import EXACT, OTHER_PACKAGE

KODAK = Path(__file__).resolve().parents[3] / "shared" / "data" / "kodak24"


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def brightness(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3))


def agreement(images: Tensor, references: Tensor) -> Tensor:
    return 1 - (images - references).abs().mean((1, 2, 3))


def bright(differentiable: bool = False) -> NoReference:
    return NoReference(brightness, higher_is_better=True, bounds=(0.0, 1.0), differentiable=differentiable)


def faithful(differentiable: bool = False) -> FullReference:
    return FullReference(agreement, higher_is_better=True, bounds=(0.0, 1.0), differentiable=differentiable)


def gain_of(quality: float, input_quality: float, fidelity: float, gamma: float = 0.7) -> float:
    """The score for given scores of the parts."""
    reward = QualityGain(bright(), faithful(), gamma=gamma)
    parts = (quality, input_quality, fidelity)
    scores = {part.name: torch.tensor([value]) for part, value in zip(reward.parts, parts, strict=True)}
    return float(reward.combine(scores))


@pytest.mark.parametrize("differentiable", [False, True])
def test_they_keep_the_contract(differentiable: bool) -> None:
    """With and without a graph; the inputs of the check are smaller than the images."""
    images = noise(4, 3, 16, 16) * torch.tensor([0.3, 0.6, 0.9, 1.0]).view(-1, 1, 1, 1)
    for reward in (
        QualityGain(bright(differentiable), faithful(differentiable)),
        InputFidelity(faithful(differentiable)),
    ):
        assert not check_reward(reward, images).failed
        assert (reward.needs_inputs, reward.needs_references, reward.differentiable) == (True, False, differentiable)


def test_published_form() -> None:
    """Gains are as published, with gamma on the scale of [0, 1]; F = 0.5, Q_in = 0.35, Q_out = 0.75, by hand."""
    torch.testing.assert_close(gain_of(0.75, 0.35, 0.5), 0.5 * 0.35 + 0.5**0.5 * 0.4, **OTHER_PACKAGE)
    torch.testing.assert_close(gain_of(0.75, 0.35, 0.5, gamma=0.35), 0.5 * 0.35 + 0.5 * 0.4, **OTHER_PACKAGE)
    torch.testing.assert_close(gain_of(0.25, 0.35, 0.5), 0.5 * 0.35 - 0.1, **OTHER_PACKAGE)  # a loss is not gated


UNIT = st.floats(0, 1, width=32)


@settings(deadline=None, derandomize=True)
@given(UNIT, UNIT, UNIT, UNIT, UNIT, st.floats(0.05, 20))
def test_bounded_and_monotone(q: float, better: float, q_in: float, f: float, closer: float, gamma: float) -> None:
    """It never falls when quality or fidelity rises, gain or loss; and an unchanged input has its own quality."""
    q, better = sorted((q, better))
    f, closer = sorted((f, closer))
    score = gain_of(q, q_in, f, gamma)
    assert -1 - 1e-6 <= score <= 1 + 1e-6
    assert gain_of(better, q_in, f, gamma) >= score - 1e-6
    assert gain_of(q, q_in, closer, gamma) >= score - 1e-6
    assert gain_of(q_in, q_in, 1.0, gamma) == pytest.approx(q_in, abs=1e-6)


def test_the_gate_is_looser_for_poor_inputs_and_shut_for_other_pictures() -> None:
    """Half the fidelity costs a poor input less of its gain; an unrelated picture gains nothing, however poor it is."""
    shares = [(gain_of(q_in + 0.2, q_in, 0.5) - 0.5 * q_in) / 0.2 for q_in in (0.0, 0.2, 0.4, 0.8)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(1.0)
    for q_in in (0.0, 0.01, 0.5):
        assert gain_of(1.0, q_in, 0.0) == 0.0


def test_gradient() -> None:
    """It reaches the images, is finite at the ends of every scale, and does not reach the inputs."""
    images = torch.stack([torch.full((3, 4, 4), value) for value in (0.0, 0.3, 1.0, 1.0, torch.nan)]).requires_grad_()
    inputs = torch.stack([torch.full((3, 4, 4), value) for value in (1.0, 0.2, 0.0, 1.0, 0.5)]).requires_grad_()
    scores = QualityGain(bright(True), faithful(True))(images, inputs=inputs)
    assert scores.isnan().tolist() == [False, False, False, False, True]
    of_images, of_inputs = torch.autograd.grad(scores[:4].sum(), [images, inputs], allow_unused=True)
    assert of_images.isfinite().all()
    assert (of_images[:4].flatten(1).abs().sum(1) > 0).all()
    # a higher quality of the input would lower the gain; only fidelity may look at the input's pixels
    (of_fidelity,) = torch.autograd.grad(InputFidelity(faithful(True))(images, inputs=inputs)[1], inputs)
    assert of_inputs[1].sum().sign() == of_fidelity[1].sum().sign()


def test_gradient_is_that_of_finite_differences() -> None:
    """Through the resize as well, for a x2 input."""
    images, inputs = 0.25 + 0.5 * noise(1, 3, 8, 8), 0.1 + 0.2 * noise(1, 3, 4, 4, seed=1)
    reward = QualityGain(
        bright(True), FullReference(_square, higher_is_better=False, bounds=(0.0, 1.0), differentiable=True)
    )
    images.requires_grad_()
    (slope,) = torch.autograd.grad(reward(images, inputs=inputs).sum(), images)
    step = 1e-2 * noise(1, 3, 8, 8, seed=2)
    with torch.no_grad():
        found = reward(images + step, inputs=inputs) - reward(images - step, inputs=inputs)
    torch.testing.assert_close(found.sum(), 2 * (slope * step).sum(), rtol=1e-2, atol=1e-5)


def _square(images: Tensor, references: Tensor) -> Tensor:
    return (images - references).square().mean((1, 2, 3)) - 1


class Quality(Brightness):
    """Counts the images that it scores; knows of no inputs."""

    name = "quality"


def test_an_input_that_rollouts_share_is_judged_once() -> None:
    """As one tensor in a list or as an expanded batch; copies, other prompts and other sizes are judged again."""
    inputs, images = noise(2, 3, 8, 8), noise(6, 3, 8, 8, seed=1)
    rows = [row for row in inputs for _ in range(3)]
    expected = QualityGain(Quality(), faithful())(images, inputs=torch.stack(rows))
    for given_inputs, prompts, count in (
        (rows, None, 2),
        (torch.stack(rows), None, 6),
        (inputs[:1].expand(6, -1, -1, -1), None, 1),
        (rows, ["a", "a", "b", "a", "a", "a"], 3),
    ):
        quality = Quality()
        scores = QualityGain(quality, faithful())(images, inputs=given_inputs, prompts=prompts)
        assert quality.sizes == [6, count]
        if len(given_inputs) == 6 and count != 1:
            torch.testing.assert_close(scores, expected, **OTHER_PACKAGE)
    quality = Quality()
    QualityGain(quality, faithful())([*images[:5], noise(3, 4, 4)], inputs=rows)
    assert quality.sizes == [6, 3]


def test_low_resolution_inputs() -> None:
    """Detail beyond the input's resolution costs no fidelity; images and inputs of many sizes score as alone."""
    smooth = nn.functional.interpolate(0.2 + 0.6 * noise(2, 3, 8, 8), size=(64, 64), mode="bicubic")
    inputs = nn.functional.interpolate(smooth, size=(16, 16), mode="bicubic", antialias=True)
    checkers = 0.1 * ((torch.arange(64) + torch.arange(64)[:, None]) % 2 * 2 - 1)
    fidelity = InputFidelity(load("ssim"))
    plain, detailed = (fidelity(images, inputs=inputs) for images in (smooth, smooth + checkers))
    assert plain.min() > 0.999
    torch.testing.assert_close(detailed, plain, rtol=0, atol=0.002)
    assert fidelity(1 - smooth, inputs=inputs).max() < 0.5
    reward = QualityGain(bright(), faithful())
    images, given_inputs = [smooth[0], smooth[1, :, :40]], [inputs[0], inputs[1, :, :10]]
    alone = [reward(image[None], inputs=other[None]) for image, other in zip(images, given_inputs, strict=True)]
    torch.testing.assert_close(reward(images, inputs=given_inputs), torch.cat(alone), **OTHER_PACKAGE)


def test_what_cannot_be_scored_is_not_hidden_by_the_resize() -> None:
    """Images or inputs in [0, 255] or with NaN have no score, whether they are resized or not."""
    images, inputs = noise(4, 3, 16, 16), noise(4, 3, 8, 8, seed=1)
    images[0] *= 255
    images[1, 0, 0, 0] = torch.nan
    inputs[2] *= 255
    for reward in (InputFidelity(faithful()), QualityGain(bright(), faithful())):
        assert reward(images, inputs=inputs).isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("form", [Cached, MicroBatched, Overlapped])
def test_through_wrappers(form: type) -> None:
    """The inputs go along, and scores are those of the reward itself."""
    local = QualityGain(load("niqe[-12, 0]"), load("haarpsi[0.35, 1]"))
    inputs = noise(3, 3, 64, 64)
    images = nn.functional.interpolate(nn.functional.avg_pool2d(inputs, 2), size=(128, 128), mode="bicubic")
    images = images.clamp(0, 1)
    torch.testing.assert_close(form(local)(images, inputs=inputs), local(images, inputs=inputs), **OTHER_PACKAGE)


def test_through_a_server() -> None:
    """Served, it needs inputs, and gives the same scores."""
    local = QualityGain(bright(), faithful(), name="gain")
    images, inputs = noise(5, 3, 16, 16), noise(5, 3, 8, 8, seed=1)
    with Double([local]) as double, RemoteReward(double.url, "gain", batch_size=2) as reward:
        assert (reward.needs_inputs, reward.bounds) == (True, (-1.0, 1.0))
        for sent in (inputs, [*inputs]):
            torch.testing.assert_close(reward(images, inputs=sent), local(images, inputs=inputs), **EXACT)


def test_the_wrong_rewards_are_refused() -> None:
    """With what to write instead."""
    with pytest.raises(ValueError, match=r"reward that sees the images only, got haarpsi\. .*`fidelity`"):
        QualityGain(load("haarpsi"), load("niqe[-12, 0]"))
    with pytest.raises(ValueError, match=r"InputFidelity expected a full-reference reward .* got piqe"):
        QualityGain(load("niqe[-12, 0]"), load("piqe[-100, 0]"))
    with pytest.raises(ValueError, match=r"`quality` with scores in \[0, 1\], got niqe with bounds \(None, 0\.0\)"):
        QualityGain(load("niqe"), load("haarpsi"))
    with pytest.raises(ValueError, match=r"`fidelity` with scores in \[0, 1\], got ssim with bounds \(-1\.0, 1\.0\)"):
        QualityGain(load("niqe[-12, 0]"), load("ssim"))
    with pytest.raises(TypeError, match=r"iqareward\.load\('haarpsi'\)"):
        QualityGain(load("niqe[-12, 0]"), "haarpsi")
    with pytest.raises(ValueError, match="expected `inputs`, the degraded images"):
        QualityGain(bright(), faithful())(noise(1, 3, 8, 8))
    for gamma in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite `gamma` > 0"):
            QualityGain(bright(), faithful(), gamma=gamma)


def blurred(images: Tensor, sigma: float) -> Tensor:
    taps = torch.exp(-torch.arange(-8, 9.0).square() / (2 * sigma**2))
    taps = (taps / taps.sum()).expand(3, 1, 1, -1)
    images = nn.functional.conv2d(nn.functional.pad(images, (8, 8, 8, 8), mode="reflect"), taps, groups=3)
    return nn.functional.conv2d(images, taps.transpose(2, 3), groups=3)


def candidates(photographs: Tensor, sigma: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Blurred inputs, and restorations of them from good to bad."""
    inputs = blurred(photographs, sigma).clamp(0, 1)
    over_sharpened = (photographs + 2 * (photographs - blurred(photographs, 1.0))).clamp(0, 1)
    return inputs, {
        "half-way": (inputs + photographs) / 2,
        "truth": photographs,
        "over-sharpened": over_sharpened,
        "unchanged": inputs,
        "worse": blurred(inputs, 2.0).clamp(0, 1),
        "another": photographs.roll(1, 0),
        "another, over-sharpened": over_sharpened.roll(1, 0),
    }


@pytest.fixture(scope="module")
def kodak() -> Tensor:
    """`[24, 3, 256, 256]`: the centres of the Kodak photographs."""
    if not KODAK.is_dir():
        pytest.skip("the photographs are not distributed with the repository (no ../shared/data/kodak24)")
    return torch.stack([center_crop(iqareward.to_images(path)[0], 256) for path in sorted(KODAK.glob("*.png"))])


@pytest.mark.parametrize(("fidelity", "sigma"), [("haarpsi[0.35, 1]", 1), ("haarpsi[0.35, 1]", 2), ("ssim[0.5, 1]", 1)])
def test_order_on_photographs(fidelity: str, sigma: float, kodak: Tensor) -> None:
    """Blurred a little or much: half restored, unchanged, then worse or unrelated; over-sharpening is not the best."""
    inputs, images = candidates(kodak[:8], sigma)
    reward = QualityGain(load("niqe[-12, 0]"), load(fidelity))
    scores = {name: reward(batch, inputs=inputs) for name, batch in images.items()}
    assert (scores["half-way"] > scores["unchanged"]).all()
    assert scores["half-way"].mean() > scores["over-sharpened"].mean()
    for name in ("worse", "another", "another, over-sharpened"):
        assert (scores["unchanged"] > scores[name]).all()


def test_published_figures_on_photographs(kodak: Tensor) -> None:
    """The means that the documentation prints; another photograph wins if the fidelity of other pictures is not 0."""
    inputs, images = candidates(kodak, 2)
    ranged, plain = (QualityGain(load("niqe[-12, 0]"), load(name)) for name in ("haarpsi[0.35, 1]", "haarpsi"))
    figures = {
        "half-way": (0.63, 0.66), "truth": (0.57, 0.62), "over-sharpened": (0.42, 0.50), "unchanged": (0.14, 0.14),
        "worse": (0.01, 0.01), "another": (0.00, 0.45), "another, over-sharpened": (0.00, 0.37),
    }  # fmt: skip
    for name, expected in figures.items():
        means = [float(reward(images[name], inputs=inputs).mean()) for reward in (ranged, plain)]
        assert means == pytest.approx(expected, abs=0.006), name
