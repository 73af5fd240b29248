"""Rewards in the object shapes of imscore, HPSv3 (DanceGRPO), MixGRPO and SRPO, inside doubles of those loops."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import iqareward
from iqareward.adapters.scorers import HPSv3Model, ImscoreModel, SRPOModel, mixgrpo_model
from iqareward.rewards.core import ImageReward
from iqareward.rewards.metric import NoReference
from tests.adapters.doubles.reward_models import dancegrpo_advantages, imscore_step, mixgrpo_rewards, srpo_losses
from tests.adapters.restoration_agent import as_pil, photographs
from tests.tolerances import EXACT

IMAGES = photographs(4, side=32)
PROMPTS = ["a", "b", "c", "d"]
PICTURES = [as_pil(image) for image in IMAGES]
STORED = (255 * IMAGES).round() / 255


def contrast(images: Tensor) -> Tensor:
    """A stand-in for a judge: spread of the pixels of each image."""
    return images.std(dim=(1, 2, 3))


CONTRAST = NoReference(contrast, higher_is_better=True, differentiable=True)


class LooksLike(ImageReward):
    """A text-conditioned reward: how bright the image is if the text says "bright", else how dark."""

    name, needs_prompts, bounds = "looks_like", True, (0.0, 1.0)

    def __init__(self, differentiable: bool = True) -> None:
        self.differentiable = differentiable

    def score_batch(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        sign = torch.tensor([1.0 if "bright" in prompt else -1.0 for prompt in prompts])
        return 0.5 + sign * (images.mean((1, 2, 3)) - 0.5)


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


def test_mixgrpo_knows_models_by_their_class_name() -> None:
    """A model of a known name is called and weighed; the reward itself would train on zeros without a word."""
    weights = {"PickScoreRewardModel": 1.0}
    merged, successes, _ = mixgrpo_rewards(PICTURES, PROMPTS, [mixgrpo_model(CONTRAST)], weights)
    assert merged == pytest.approx(contrast(STORED).tolist())
    assert successes == [1] * 4
    assert all(type(reward) is float for reward in merged)
    naive, successes, _ = mixgrpo_rewards(PICTURES, PROMPTS, [CONTRAST], {"NoReference": 1.0})
    assert naive == [0.0] * 4
    assert successes == [0] * 4


def test_mixgrpo_takes_two_models_side_by_side() -> None:
    """Two slots, two rewards, in threads of their own."""
    models = [mixgrpo_model(CONTRAST), mixgrpo_model("piqe", "HPSClipRewardModel")]
    weights = {"PickScoreRewardModel": 0.5, "HPSClipRewardModel": 0.01}
    merged, _, parts = mixgrpo_rewards(PICTURES, PROMPTS, models, weights)
    torch.testing.assert_close(torch.tensor(parts["HPSClipRewardModel"]), iqareward.load("piqe")(STORED))
    expected = 0.5 * contrast(STORED) + 0.01 * iqareward.load("piqe")(STORED)
    assert merged == pytest.approx(expected.tolist(), rel=1e-4)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.scoring.UnscoredWarning")
def test_mixgrpo_stops_where_it_would_go_on_with_zeros() -> None:
    """An image that cannot be scored ends the process, through two handlers that swallow every exception."""
    tiny = [as_pil(image[:, :8, :8]) for image in IMAGES]
    weights = {"PickScoreRewardModel": 1.0}
    with pytest.raises(SystemExit, match=r"could not score images \[0, 1, 2, 3\]"):
        mixgrpo_rewards(tiny, PROMPTS, [mixgrpo_model("piqe")], weights)
    merged, _, _ = mixgrpo_rewards(tiny, PROMPTS, [mixgrpo_model("piqe", on_nan=-100.0)], weights)
    assert merged == [-100.0] * 4


def test_srpo_learns_from_the_difference_of_two_texts() -> None:
    """A text-conditioned reward pulls the two branches apart; its formula is (1 + k) r(positive) - r(negative)."""
    image = IMAGES[:1].clone().requires_grad_()
    forward, inverse = srpo_losses(SRPOModel(LooksLike()), image, "bright photo", "photo", k=0.1)
    brightness = IMAGES[:1].mean()
    dark = 1 - brightness
    torch.testing.assert_close(forward.detach(), torch.relu(0.7 - (1.1 * brightness - dark)))
    torch.testing.assert_close(inverse.detach(), torch.relu(0.7 - (1.1 * dark - brightness)))
    pulls = [torch.autograd.grad(loss, image, retain_graph=True)[0].sum() for loss in (forward, inverse)]
    assert pulls[0] < 0 < pulls[1]  # descending makes the image brighter in one branch and darker in the other


def test_srpo_refuses_a_reward_without_text() -> None:
    """Why: both texts get one score, and both branches would pull the same way."""

    class Naive(torch.nn.Module):
        def SRP_cfg(self, prompts, negative, images, k):
            return (1 + k) * CONTRAST(images) - CONTRAST(images)

    image = IMAGES[:1].clone().requires_grad_()
    losses = srpo_losses(Naive(), image, "bright photo", "photo", k=0.1)
    pulls = [torch.autograd.grad(loss, image, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(pulls[0], pulls[1], **EXACT)
    with pytest.raises(ValueError, match="without a text there is none"):
        SRPOModel(CONTRAST)
    with pytest.raises(ValueError, match="differentiable reward"):
        SRPOModel(LooksLike(differentiable=False))


@pytest.mark.parametrize(
    "build",
    [ImscoreModel, mixgrpo_model, lambda reward: HPSv3Model(reward, device="cpu"), lambda reward: SRPOModel(CLEAN)],
)
def test_rewards_with_references_are_refused(build) -> None:
    """None of these loops passes a ground truth, so that such a reward is refused before training."""
    with pytest.raises(ValueError, match="no-reference reward, got 'ssim'"):
        build("ssim")


CLEAN = iqareward.load("ssim")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: mixgrpo_model(CONTRAST, "CLIPScoreRewardModel"), "expected slot"),
        (lambda: mixgrpo_model(CONTRAST, on_nan="mean"), "expected on_nan 'raise'"),
        (lambda: ImscoreModel(CONTRAST, on_nan="nan"), "expected on_nan"),
        (lambda: HPSv3Model(CONTRAST, device="cpu", on_nan="skip"), "expected on_nan"),
    ],
)
def test_unknown_options_are_refused(build, message) -> None:
    """A policy or slot that a loop cannot honour is refused when the model is built."""
    with pytest.raises(ValueError, match=message):
        build()
