"""Losses of AlignProp, VADER and ReNO inside doubles of those loops: their ranges, shapes and gradients."""

import pytest
import torch
from torch import Tensor, nn

from iqareward.adapters._values import OnNan
from iqareward.adapters.reward_losses import ReNOLoss, alignprop_loss, vader_loss
from iqareward.rewards.metric import NoReference
from iqareward.weighting import LossWeights
from tests.adapters.doubles.gradient_loops import AlignPropTrainer, LatentNoiseTrainer, vader_step
from tests.adapters.restoration_agent import photographs
from tests.tolerances import HALF_NETWORK

IMAGES = photographs(2, side=32)
PROMPTS = ["a", "b"]


def brightness(images: Tensor) -> Tensor:
    """A stand-in for a judge whose range and gradient are known."""
    return images.mean(dim=(1, 2, 3))


JUDGE = NoReference(brightness, higher_is_better=True, differentiable=True)


def test_alignprop_sees_the_image_as_it_is() -> None:
    """The reward is that of the image in [0, 1]; AlignProp's own losses see a washed-out one."""
    trainer = AlignPropTrainer("aesthetic", nn.Parameter(IMAGES.logit()))
    _, washed_out = trainer.step(PROMPTS)
    torch.testing.assert_close(washed_out, brightness(IMAGES) / 2 + 0.5)
    trainer.loss_fn, trainer.pixels.grad = alignprop_loss(JUDGE), None
    loss, rewards = trainer.step(PROMPTS)
    torch.testing.assert_close(rewards, brightness(IMAGES))
    assert loss == pytest.approx(-0.01 * brightness(IMAGES).mean().item())
    assert trainer.pixels.grad is not None
    assert trainer.pixels.grad.lt(0).all()  # descending makes every pixel brighter


def test_alignprop_loss_takes_prompts_and_weights() -> None:
    """The loss is one number per sample before the mean, where a weight per sample belongs."""
    images = IMAGES.clone().requires_grad_()
    loss, _ = alignprop_loss(JUDGE)(images, PROMPTS)
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
def test_an_image_without_a_score_spoils_no_weights(on_nan: OnNan) -> None:
    """In each of the three losses its gradient is 0, and that of the other image is a number."""
    judge = NoReference(half_scored, higher_is_better=True, differentiable=True)
    losses = (
        lambda images: alignprop_loss(judge, on_nan=on_nan)(images)[0].sum(),
        lambda images: vader_loss(judge, on_nan=on_nan)(2 * images - 1)[0],
        lambda images: ReNOLoss(judge, on_nan=on_nan)(images, "a"),
    )
    for loss in losses:
        images = IMAGES.clone().requires_grad_()
        loss(images).backward()
        assert images.grad is not None
        assert images.grad[0].eq(0).all()
        assert images.grad[1].lt(0).all()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.scoring.UnscoredWarning")
def test_vader_converts_its_range() -> None:
    """Frames in [-1, 1] and half precision are scored as images in [0, 1]; both results are scalars."""
    frames = (2 * IMAGES - 1).requires_grad_()
    for reward in ("aesthetic", "hps"):
        loss, logged = vader_step(vader_loss(JUDGE), frames, PROMPTS, reward=reward)
        expected = brightness(IMAGES).mean().item()
        assert logged == pytest.approx(expected, rel=HALF_NETWORK["rtol"])
        assert loss == pytest.approx(-logged)
    assert frames.grad is not None
    assert frames.grad.lt(0).all()
    naive = JUDGE(2 * IMAGES - 1)
    assert not torch.allclose(naive, brightness(IMAGES), equal_nan=True)


def test_reno_needs_its_preprocessing_taken_out() -> None:
    """At native resolution the noise follows the reward; CLIP's crop is refused, however harmless its values look."""
    latents = nn.Parameter(2 * IMAGES[:1] - 1)
    trainer = LatentNoiseTrainer([ReNOLoss(JUDGE, 2.0)], iterations=3)
    with pytest.raises(ValueError, match=r"preprocess_fn = torch\.nn\.Identity"):
        trainer.train(latents, "a cat")
    trainer.preprocess_fn = nn.Identity()
    logs = trainer.train(latents, "a cat")
    assert logs[0] == pytest.approx({"brightness": -brightness(IMAGES[:1]).item()})
    assert logs[0]["brightness"] > logs[1]["brightness"] > logs[2]["brightness"]  # a loss: lower is better


@pytest.mark.parametrize("build", [alignprop_loss, vader_loss, ReNOLoss])
def test_losses_refuse_what_has_no_gradient_or_no_reference(build) -> None:
    """A black box, or a reward that waits for a ground truth, is refused before training."""
    with pytest.raises(ValueError, match="gradient to the pixels would be zero"):
        build(NoReference(brightness, higher_is_better=True))
    with pytest.raises(ValueError, match="no useful gradient"):
        build("niqe")
    with pytest.raises(ValueError, match="no-reference reward, got 'ssim'"):
        build("ssim")


def test_a_broken_image_stops_or_counts_as_a_constant() -> None:
    """NaN raises by default; as a number it takes no part in the gradient and harms no other sample."""
    images = IMAGES.clone()
    images[0, 0, 0, 0] = torch.nan
    images.requires_grad_()
    with pytest.raises(ValueError, match=r"could not score images \[0\]"):
        alignprop_loss(JUDGE)(images)
    loss, rewards = alignprop_loss(JUDGE, on_nan=0.0)(images)
    assert rewards[0] == 0
    loss.mean().backward()
    assert images.grad is not None
    assert images.grad[0].eq(0).all()
    assert images.grad[1].lt(0).all()
