"""Rewards in mocks of the loops of imscore, DanceGRPO, AlignProp and VADER: what they call, and what follows."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import iqareward
from iqareward.adapters.reward_models import HPSv2Model, HPSv3Model, ImscoreModel, alignprop_loss, vader_loss
from iqareward.rewards.core import ImageReward
from iqareward.rewards.metric import NoReference
from iqareward.weighting import LossWeights, weighted_advantages
from tests.adapters.doubles.gradient_loops import alignprop_module, vader_step
from tests.adapters.doubles.reward_models import dancegrpo, group_advantages, imscore_step
from tests.adapters.restoration_agent import photographs
from tests.tolerances import EXACT, HALF_NETWORK, OTHER_PACKAGE

IMSCORE = pytest.mark.trainer("imscore", "0.0.11 (cb28b8b)", "caller", "reader", "gradients", "weights")
DANCEGRPO = pytest.mark.trainer("DanceGRPO", "15cc71d", "caller", "reader", "configuration", "weights")
ALIGNPROP = pytest.mark.trainer("AlignProp", "b22918a", "caller", "reader", "configuration", "gradients", "weights")
VADER = pytest.mark.trainer("VADER", "adaf2ef", "caller", "reader", "configuration", "gradients", "weights")

IMAGES = photographs(4, side=32)
PROMPTS = ["a", "b", "c", "d"]
TEXTS = ["a", "b"]
STORED = (255 * IMAGES).round() / 255


def contrast(images: Tensor) -> Tensor:
    """The spread of the pixels of each image."""
    return images.std(dim=(1, 2, 3))


CONTRAST = NoReference(contrast, higher_is_better=True, differentiable=True)


class Brightest(ImageReward):
    """Brightness, for a caption that asks for it; else 0."""

    name, needs_prompts, bounds = "brightest", True, (0.0, 1.0)

    def score_batch(self, images: Tensor, prompts) -> Tensor:
        return images.mean((1, 2, 3)) * torch.tensor([float(prompt == "hellstes Bild, größer") for prompt in prompts])


def hpsv2(reward) -> SimpleNamespace:
    """The three names that DanceGRPO's scripts build for HPSv2, from ours."""
    model = HPSv2Model(reward, device="cpu")
    return SimpleNamespace(reward_model=model, processor=model.tokenizer, preprocess_val=model.preprocess)


def hpsv3(reward) -> SimpleNamespace:
    """The name that DanceGRPO's scripts build for HPSv3, from ours."""
    return SimpleNamespace(reward_model=HPSv3Model(reward, device="cpu"))


@IMSCORE
def test_imscore_loop_follows_the_reward() -> None:
    """The loss of the README's post-training step is that of the reward, and the step raises the reward."""
    pixels = nn.Parameter(IMAGES.clone())
    loss = imscore_step(ImscoreModel(CONTRAST), pixels, PROMPTS)
    assert loss == pytest.approx(-contrast(IMAGES).mean().item())
    assert contrast(pixels.detach()).gt(contrast(IMAGES)).all()
    scores = ImscoreModel(CONTRAST).score(pixels, PROMPTS)
    pixels.grad = None
    (torch.tensor([1.0, 0.0, 0.0, 0.0]) * -scores).mean().backward()  # a weight per sample
    assert pixels.grad is not None
    assert pixels.grad.flatten(1).abs().amax(1).gt(0).tolist() == [True, False, False, False]


@IMSCORE
def test_naive_reward_has_no_gradient_for_imscore() -> None:
    """A reward that is not differentiable scores, and cannot be trained through."""
    model = ImscoreModel("piqe", differentiable=False)
    torch.testing.assert_close(model.score(IMAGES, PROMPTS), iqareward.load("piqe")(IMAGES), **EXACT)
    with pytest.raises(RuntimeError, match="does not require grad"):
        imscore_step(model, nn.Parameter(IMAGES.clone()), PROMPTS)
    with pytest.raises(ValueError, match="no useful gradient"):
        ImscoreModel("piqe")


@DANCEGRPO
@pytest.mark.parametrize("slot", [hpsv2, hpsv3])
@pytest.mark.parametrize("generations", [2, None])
def test_dancegrpo_learns_from_the_scores(tmp_path, slot, generations) -> None:
    """In both slots of the FLUX and Qwen-Image scripts, gathered rewards and gradients are those of the reward.

    Close to float32 exactly, although the script multiplies the features of HPSv2 under autocast.
    """
    rewards, gradient = dancegrpo("flux", slot(CONTRAST), IMAGES, PROMPTS, tmp_path, generations=generations)
    torch.testing.assert_close(rewards, contrast(STORED), **OTHER_PACKAGE)
    torch.testing.assert_close(gradient, -group_advantages(contrast(STORED), generations or 4), rtol=1e-3, atol=1e-3)
    with pytest.raises(AttributeError):
        dancegrpo("flux", SimpleNamespace(reward_model=iqareward.load("piqe")), IMAGES, PROMPTS, tmp_path)


@DANCEGRPO
@pytest.mark.parametrize("slot", [hpsv2, hpsv3])
def test_dancegrpo_passes_each_image_its_caption(tmp_path, slot) -> None:
    """Captions reach a reward that reads them, also through the tensor that HPSv2's tokenizer makes."""
    captions = ["a", "hellstes Bild, größer"] * 2
    rewards, _ = dancegrpo("flux", slot(Brightest()), IMAGES, captions, tmp_path)
    assert rewards.gt(0).tolist() == [False, True] * 2


@DANCEGRPO
def test_dancegrpo_stable_diffusion_must_write_png(tmp_path) -> None:
    """A JPEG would be scored with the traces of the codec, so it is refused; with another suffix the image arrives."""
    smooth = photographs(2, side=512)
    noisy = smooth + 0.01 * torch.randn(smooth.shape, generator=torch.Generator().manual_seed(0))
    levels = (255 * noisy).byte() / 255
    with pytest.raises(ValueError, match=r"image-0-0-rank-0\.jpg.*'\.jpg' to '\.png'"):
        dancegrpo("sd", hpsv3("niqe"), noisy, TEXTS, tmp_path)
    expected = iqareward.load("niqe")(levels)
    for slot in (hpsv2, hpsv3):
        rewards, _ = dancegrpo("sd", slot("niqe"), noisy, TEXTS, tmp_path, suffix=".png")
        torch.testing.assert_close(rewards, expected, **OTHER_PACKAGE)
    codec, _ = dancegrpo("sd", hpsv2("niqe"), noisy, TEXTS, tmp_path)  # HPSv2 gets a decoded image, which tells nothing
    assert (codec - expected).min() > 1  # the codec smoothes the grain away, which NIQE prefers


@DANCEGRPO
@pytest.mark.parametrize(("script", "key"), [("flux", "advantages"), ("sd", "final_advantages")])
def test_dancegrpo_weights_its_advantages(tmp_path, script, key) -> None:
    """A weight per sample changes that sample's gradient only, under the key that the script trains on."""
    weights = LossWeights(rl=torch.tensor([1.0, 1.0, 0.5, 0.0]), sft=torch.zeros(4))

    def weigh(samples: dict[str, Tensor]) -> None:
        samples[key] = weighted_advantages(samples[key], weights)

    _, plain = dancegrpo(script, hpsv2(CONTRAST), IMAGES, PROMPTS, tmp_path)
    _, weighted = dancegrpo(script, hpsv2(CONTRAST), IMAGES, PROMPTS, tmp_path, weigh=weigh)
    assert plain.abs().min() > 0.5
    torch.testing.assert_close(weighted, weights.rl * plain, **OTHER_PACKAGE)


@DANCEGRPO
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
@pytest.mark.parametrize("slot", [hpsv2, hpsv3])
def test_dancegrpo_stops_at_an_image_without_a_score(tmp_path, slot) -> None:
    """An image that cannot be scored stops the script."""
    with pytest.raises(ValueError, match=r"could not score images \[0\]"):
        dancegrpo("flux", slot("piqe"), IMAGES[:, :, :8, :8], PROMPTS, tmp_path)


@pytest.mark.parametrize(
    "build",
    [
        lambda: ImscoreModel("ssim"),
        lambda: HPSv2Model("ssim", device="cpu"),
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
    [
        lambda: ImscoreModel(CONTRAST, on_nan="nan"),
        lambda: HPSv2Model(CONTRAST, device="cpu", on_nan="mean"),
        lambda: HPSv3Model(CONTRAST, device="cpu", on_nan="mean"),
    ],
)
def test_unknown_policies_are_refused(build) -> None:
    """A policy that a loop cannot honour is refused when the model is built."""
    with pytest.raises(ValueError, match="expected on_nan 'raise'"):
        build()


FRAMES = photographs(2, side=32)


def brightness(images: Tensor) -> Tensor:
    """A reward whose range and gradient are known."""
    return images.mean(dim=(1, 2, 3))


REWARD = NoReference(brightness, higher_is_better=True, differentiable=True)


@ALIGNPROP
@pytest.mark.parametrize(("reward_fn", "factory"), [("aesthetic", "aesthetic_loss_fn"), ("hps", "hps_loss_fn")])
def test_alignprop_logs_and_follows_the_reward(reward_fn, factory) -> None:
    """In place of a factory, the loss downloads nothing, sees the image as it is, and the step makes it brighter."""
    module, pixels = alignprop_module(), nn.Parameter(FRAMES.logit())
    setattr(module, factory, lambda *args, **options: alignprop_loss(REWARD))
    logs = module.AlignPropTrainer(pixels, reward_fn).step(TEXTS)
    assert module.downloads == []
    assert logs["reward_mean"] == pytest.approx(brightness(FRAMES).mean().item())
    assert logs["loss"] == pytest.approx(-0.01 * logs["reward_mean"])
    assert pixels.detach().sigmoid().gt(FRAMES).all()


@ALIGNPROP
def test_alignprop_downloads_before_its_loss_is_replaced() -> None:
    """Its own loss is loaded with the trainer, and takes [0, 1] for [-1, 1]."""
    module = alignprop_module()
    trainer = module.AlignPropTrainer(nn.Parameter(FRAMES.logit()), "aesthetic")
    assert trainer.step(TEXTS)["reward_mean"] == pytest.approx((brightness(FRAMES) / 2 + 0.5).mean().item(), rel=1e-2)
    assert module.downloads == ["CLIP and the aesthetic head"]


@ALIGNPROP
def test_alignprop_takes_a_weight_per_sample() -> None:
    """The loss is one number per sample before the trainer's mean; a row of weight 0 does not move."""
    module, pixels = alignprop_module(), nn.Parameter(FRAMES.logit())
    weights = LossWeights(rl=torch.tensor([1.0, 0.0]), sft=torch.tensor([0.0, 1.0]))
    loss_fn = alignprop_loss(REWARD)

    def weighted(images, prompts=None):
        loss, rewards = loss_fn(images, prompts)
        return weights.rl * loss, rewards

    module.aesthetic_loss_fn = lambda **options: weighted
    logs = module.AlignPropTrainer(pixels, "aesthetic").step(TEXTS)
    assert logs["reward_mean"] == pytest.approx(brightness(FRAMES).mean().item())
    moved = pixels.detach().sub(FRAMES.logit()).flatten(1).abs().amax(1)
    assert moved[0] > 0
    assert moved[1] == 0


def half_scored(images: Tensor) -> Tensor:
    """Brightness, except for the first image: NaN, with a gradient that is NaN."""
    first, others = brightness(images).split([1, len(images) - 1])
    zero = first - first.detach()
    return torch.cat([zero.sqrt() / zero, others])


@ALIGNPROP
@VADER
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


@VADER
@pytest.mark.parametrize("reward_fn", ["aesthetic", "pick_score"])
def test_vader_logs_and_follows_the_reward(reward_fn) -> None:
    """Frames in [-1, 1] and half precision are scored as images in [0, 1], and the step makes them brighter."""
    frames = nn.Parameter(2 * FRAMES - 1)
    logs = vader_step(vader_loss(REWARD), frames, TEXTS, reward_fn=reward_fn)
    assert logs["step_reward"] == pytest.approx(brightness(FRAMES).mean().item(), rel=HALF_NETWORK["rtol"])
    assert logs["step_loss"] == logs["avg_loss"] == -logs["step_reward"]
    assert frames.detach().gt(2 * FRAMES - 1).all()


@VADER
def test_vader_takes_a_weight_per_frame() -> None:
    """Its loss is a scalar, so the weights enter where that is made, from one score per frame."""
    frames, weights = nn.Parameter(2 * FRAMES - 1), torch.tensor([1.0, 0.0])
    model = ImscoreModel(REWARD)

    def weighted(frames, prompts=None):
        scores = model.score(frames.float() / 2 + 0.5, prompts)
        return -(weights * scores).mean(), scores.detach().mean()

    logs = vader_step(weighted, frames, TEXTS, reward_fn="aesthetic")
    assert logs["step_reward"] == pytest.approx(brightness(FRAMES).mean().item(), rel=HALF_NETWORK["rtol"])
    moved = frames.detach().sub(2 * FRAMES - 1).flatten(1).abs().amax(1)
    assert moved[0] > 0
    assert moved[1] == 0


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
