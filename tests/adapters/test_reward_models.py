"""Rewards in mocks of the loops of imscore, DanceGRPO, AlignProp and VADER: their ranges, shapes and gradients."""

import pytest
import torch
from torch import Tensor, nn

import iqareward
from iqareward.adapters.reward_models import HPSv3Model, ImscoreModel, alignprop_loss, vader_loss
from iqareward.rewards.metric import NoReference
from iqareward.weighting import LossWeights
from tests.adapters.doubles.gradient_loops import AlignPropTrainer, vader_step
from tests.adapters.doubles.reward_models import dancegrpo_advantages, imscore_step
from tests.adapters.restoration_agent import as_pil, photographs
from tests.tolerances import EXACT, HALF_NETWORK

IMAGES = photographs(4, side=32)
PROMPTS = ["a", "b", "c", "d"]
PICTURES = [as_pil(image) for image in IMAGES]
STORED = (255 * IMAGES).round() / 255


def contrast(images: Tensor) -> Tensor:
    """The spread of the pixels of each image."""
    return images.std(dim=(1, 2, 3))


CONTRAST = NoReference(contrast, higher_is_better=True, differentiable=True)


def test_imscore_loop_gets_scores_and_a_gradient() -> None:
    """The README's post-training step reaches the pixels, with the library's own scores."""
    pixels = IMAGES.clone().requires_grad_()
    scores = imscore_step(ImscoreModel(CONTRAST), pixels, PROMPTS)
    torch.testing.assert_close(scores, contrast(IMAGES))
    assert pixels.grad is not None
    assert pixels.grad.flatten(1).abs().amax(1).gt(0).all()


def test_naive_reward_has_no_gradient_for_imscore() -> None:
    """A reward that is not differentiable scores, and cannot be trained through."""
    model = ImscoreModel("piqe", differentiable=False)
    torch.testing.assert_close(model.score(IMAGES, PROMPTS), iqareward.load("piqe")(IMAGES), **EXACT)
    with pytest.raises(RuntimeError, match="does not require grad"):
        imscore_step(model, IMAGES.clone().requires_grad_(), PROMPTS)
    with pytest.raises(ValueError, match="no useful gradient"):
        ImscoreModel("piqe")


def test_dancegrpo_scores_files(tmp_path) -> None:
    """One PNG at a time gives the scores of the batch, as a tensor on the device that gathers them."""
    advantages = dancegrpo_advantages(
        HPSv3Model(CONTRAST, device="cpu"), PICTURES, PROMPTS, tmp_path, generations=2, device="cpu"
    )
    groups = contrast(STORED).view(-1, 2)
    expected = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-8)
    torch.testing.assert_close(advantages, expected.flatten(), rtol=1e-3, atol=1e-4)
    with pytest.raises(AttributeError, match="reward"):
        dancegrpo_advantages(iqareward.load("piqe"), PICTURES, PROMPTS, tmp_path, generations=2, device="cpu")


@pytest.mark.parametrize(
    "build",
    [
        lambda: ImscoreModel("ssim"),
        lambda: HPSv3Model("ssim", device="cpu"),
        lambda: alignprop_loss("ssim"),
        lambda: vader_loss("ssim"),
    ],
)
def test_rewards_with_references_are_refused(build) -> None:
    """None of these loops passes a ground truth, so that such a reward is refused before training."""
    with pytest.raises(ValueError, match=r"needs `references`, and has none\. Choose another"):
        build()


@pytest.mark.parametrize(
    "build",
    [lambda: ImscoreModel(CONTRAST, on_nan="nan"), lambda: HPSv3Model(CONTRAST, device="cpu", on_nan="mean")],
)
def test_unknown_policies_are_refused(build) -> None:
    """A policy that a loop cannot honour is refused when the model is built."""
    with pytest.raises(ValueError, match="expected on_nan 'raise'"):
        build()


FRAMES = photographs(2, side=32)
TEXTS = ["a", "b"]


def brightness(images: Tensor) -> Tensor:
    """A reward whose range and gradient are known."""
    return images.mean(dim=(1, 2, 3))


REWARD = NoReference(brightness, higher_is_better=True, differentiable=True)


def test_alignprop_sees_the_image_as_it_is() -> None:
    """The reward is that of the image in [0, 1]; AlignProp's own losses see a washed-out one."""
    trainer = AlignPropTrainer("aesthetic", nn.Parameter(FRAMES.logit()))
    _, washed_out = trainer.step(TEXTS)
    torch.testing.assert_close(washed_out, brightness(FRAMES) / 2 + 0.5)
    trainer.loss_fn, trainer.pixels.grad = alignprop_loss(REWARD), None
    loss, rewards = trainer.step(TEXTS)
    torch.testing.assert_close(rewards, brightness(FRAMES))
    assert loss == pytest.approx(-0.01 * brightness(FRAMES).mean().item())
    assert trainer.pixels.grad is not None
    assert trainer.pixels.grad.lt(0).all()  # descending makes every pixel brighter


def test_alignprop_loss_takes_prompts_and_weights() -> None:
    """The loss is one number per sample before the mean, where a weight per sample belongs."""
    images = FRAMES.clone().requires_grad_()
    loss, _ = alignprop_loss(REWARD)(images, TEXTS)
    weights = LossWeights(rl=torch.tensor([1.0, 0.0]), sft=torch.tensor([0.0, 1.0]))
    (weights.rl * loss).mean().backward()
    assert images.grad is not None
    assert images.grad[0].abs().sum() > 0
    assert images.grad[1].abs().sum() == 0


def half_scored(images: Tensor) -> Tensor:
    """Brightness, except for the first image: NaN, with a gradient that is NaN."""
    first, others = brightness(images).split([1, len(images) - 1])
    zero = first - first.detach()
    return torch.cat([zero.sqrt() / zero, others])


@pytest.mark.parametrize("on_nan", ["mean", "worst", 0.0])
def test_an_image_without_a_score_spoils_no_weights(on_nan) -> None:
    """In both losses its gradient is 0, and that of the other image is a number."""
    reward = NoReference(half_scored, higher_is_better=True, differentiable=True)
    losses = (
        lambda images: alignprop_loss(reward, on_nan=on_nan)(images)[0].sum(),
        lambda images: vader_loss(reward, on_nan=on_nan)(2 * images - 1)[0],
    )
    for loss in losses:
        images = FRAMES.clone().requires_grad_()
        loss(images).backward()
        assert images.grad is not None
        assert images.grad[0].eq(0).all()
        assert images.grad[1].lt(0).all()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_vader_converts_its_range() -> None:
    """Frames in [-1, 1] and half precision are scored as images in [0, 1]; both results are scalars."""
    frames = (2 * FRAMES - 1).requires_grad_()
    for reward in ("aesthetic", "hps"):
        loss, logged = vader_step(vader_loss(REWARD), frames, TEXTS, reward=reward)
        expected = brightness(FRAMES).mean().item()
        assert logged == pytest.approx(expected, rel=HALF_NETWORK["rtol"])
        assert loss == pytest.approx(-logged)
    assert frames.grad is not None
    assert frames.grad.lt(0).all()
    naive = REWARD(2 * FRAMES - 1)
    assert not torch.allclose(naive, brightness(FRAMES), equal_nan=True)


@pytest.mark.parametrize("build", [alignprop_loss, vader_loss])
def test_losses_refuse_what_has_no_gradient(build) -> None:
    """A black box is refused before training."""
    with pytest.raises(ValueError, match="gradient to the pixels would be zero"):
        build(NoReference(brightness, higher_is_better=True))
    with pytest.raises(ValueError, match="no useful gradient"):
        build("niqe")


def test_a_broken_image_stops_or_counts_as_a_constant() -> None:
    """NaN raises by default; as a number it takes no part in the gradient and harms no other sample."""
    images = FRAMES.clone()
    images[0, 0, 0, 0] = torch.nan
    images.requires_grad_()
    with pytest.raises(ValueError, match=r"could not score images \[0\]"):
        alignprop_loss(REWARD)(images)
    loss, rewards = alignprop_loss(REWARD, on_nan=0.0)(images)
    assert rewards[0] == 0
    loss.mean().backward()
    assert images.grad is not None
    assert images.grad[0].eq(0).all()
    assert images.grad[1].lt(0).all()
