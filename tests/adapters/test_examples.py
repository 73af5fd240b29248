"""The examples for rare trainers, inside mocks of their loops: miles_diffusion, MixGRPO, SRPO, ReNO."""

import asyncio
import math
import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import iqareward
from examples.adapters import miles_diffusion
from examples.adapters.mixgrpo import PickScoreRewardModel
from examples.adapters.reno import ReNOLoss
from examples.adapters.srpo import SRPOModel
from examples.adapters.videox_fun import IQAReward
from iqareward import AdaptiveWeighter, FullReference, NoReference
from iqareward.difficulty import reference_distance
from iqareward.rewards.catalog import CATALOG
from iqareward.rewards.core import ImageReward
from iqareward.weighting import LossWeights, weighted_advantages
from tests.adapters.doubles import miles as double
from tests.adapters.doubles.gradient_loops import LatentNoiseTrainer
from tests.adapters.doubles.reward_models import group_advantages, mixgrpo, srpo_step, videox_grpo, videox_reward_lora
from tests.adapters.restoration_agent import as_pil, photographs
from tests.tolerances import EXACT, HALF_NETWORK, NETWORK_BATCH, OTHER_PACKAGE

IMAGES = photographs(4, side=32)
PROMPTS = ["a", "b", "c", "d"]
PICTURES = [as_pil(image) for image in IMAGES]
STORED = (255 * IMAGES).round() / 255
NOISY = photographs(4, side=64) + 0.02 * torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(1))
CUSTOM_RM, POST_PROCESS = (f"examples.adapters.miles_diffusion.{name}" for name in ("custom_rm", "post_process"))


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def contrast(images: Tensor) -> Tensor:
    return images.std(dim=(1, 2, 3))


BRIGHTNESS, CONTRAST = (
    NoReference(formula, higher_is_better=True, differentiable=True) for formula in (brightness, contrast)
)


class LooksLike(ImageReward):
    """A text-conditioned reward: how bright the image is if the text says "bright", else how dark."""

    name, needs_prompts, bounds = "looks_like", True, (0.0, 1.0)

    def __init__(self, differentiable: bool = True) -> None:
        self.differentiable = differentiable

    def score_batch(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        sign = torch.tensor([1.0 if "bright" in prompt else -1.0 for prompt in prompts])
        return 0.5 + sign * (images.mean((1, 2, 3)) - 0.5)


def samples(count: int = 4, side: int = 32, rollouts: int = 2) -> list[double.Sample]:
    images = torch.rand(count, 3, 1, side, side, generator=torch.Generator().manual_seed(0))
    clean = torch.rand(count // rollouts, 3, side, side, generator=torch.Generator().manual_seed(1))
    return [
        double.Sample(row // rollouts, "restore", image, metadata={"gt_path": clean[row // rollouts]})
        for row, image in enumerate(images)
    ]


def stacked(rows: list[double.Sample]) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.stack([row.generated_output[:, 0] for row in rows])
    return images, torch.stack([row.metadata["gt_path"] for row in rows]), torch.tensor([r.group_index for r in rows])


MILES = pytest.mark.trainer("miles_diffusion", "153b243", "caller", "reader", "configuration", "async", "gradients")


@MILES
def test_miles_scores_micro_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of one frame are scored against the metadata, as floats in the order of the samples."""
    monkeypatch.setattr(miles_diffusion, "REWARD", iqareward.load("ssim"))
    rows = samples()
    rows[3].generated_output = rows[3].generated_output[:, 0]  # [C, H, W] occurs too
    asyncio.run(double.rollout(CUSTOM_RM, rows))
    rows[3].generated_output = rows[3].generated_output[:, None]
    images, clean, _ = stacked(rows)
    expected = iqareward.load("ssim")(images, references=clean)
    torch.testing.assert_close(torch.tensor([row.reward for row in rows]), expected, **NETWORK_BATCH)
    centred = expected.view(2, 2) - expected.view(2, 2).mean(1, keepdim=True)
    gradients = double.policy_gradients(rows, globalize_reward_std=True)
    torch.testing.assert_close(gradients, -2 * centred.flatten() / (expected.std() + 1e-4), rtol=1e-3, atol=1e-5)
    rows[2].generated_output = torch.full_like(rows[2].generated_output, torch.nan)
    with pytest.raises(ValueError, match="ssim could not score every image"):
        asyncio.run(double.rollout(CUSTOM_RM, rows))
    with pytest.raises(ValueError, match="expected"):
        asyncio.run(double.rollout(CUSTOM_RM, [double.Sample(0, "", torch.zeros(3, 5, 32, 32))]))


@MILES
def test_miles_refuses_a_reward_key() -> None:
    """The trainer would look it up in our number, after the rollouts."""
    rows = samples()
    with pytest.raises(ValueError, match="start without --reward-key, got 'quality'"):
        asyncio.run(double.rollout(CUSTOM_RM, rows, reward_key="quality"))
    rows[0].reward = 0.5
    with pytest.raises(TypeError):
        double.post_process(rows, reward_key="quality")


@MILES
def test_miles_keeps_its_loop_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The function scores in a thread, so that the event loop goes on."""

    def slow(images: Tensor, references: Tensor) -> Tensor:
        time.sleep(0.5)  # for eleven turns of the loop, on a busy machine too
        return images.mean(dim=(1, 2, 3))

    monkeypatch.setattr(miles_diffusion, "REWARD", FullReference(slow, higher_is_better=True))
    assert asyncio.run(double.rollout(CUSTOM_RM, samples())) > 10


@MILES
@pytest.mark.trainer("miles_diffusion", "153b243", "weights")
def test_miles_weights_advantages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row's policy gradient is that of the trainer's own advantages, times its RL weight."""
    rows = samples(8)
    for index, row in enumerate(rows):
        row.reward = float(index % 3)
        if index < 4:  # two inputs that are nearly solved
            row.generated_output = row.metadata["gt_path"][:, None] + 0.01
    images, clean, groups = stacked(rows)
    weighter = AdaptiveWeighter(mode="convex")
    weighter.calibrate(torch.tensor([0.02, 0.1, 0.5]))
    monkeypatch.setattr(miles_diffusion, "weighter", weighter)
    raw, _ = double.post_process(rows, POST_PROCESS)
    assert raw == [row.reward for row in rows]
    share = weighter(reference_distance(images, clean, groups=groups)).rl
    assert share[:4].max() < share[4:].min()
    plain = double.policy_gradients(rows, globalize_reward_std=True)
    weighted = double.policy_gradients(rows, POST_PROCESS)
    torch.testing.assert_close(weighted, share * plain, rtol=1e-3, atol=1e-5)
    rows[0].group_index = None
    with pytest.raises(ValueError, match="expected a `group_index` in every sample"):
        double.post_process(rows, POST_PROCESS)


@MILES
def test_miles_leaves_unscored_samples_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One NaN costs a whole group in the trainer's own normalisation; in the example it costs its own row."""
    monkeypatch.setattr(miles_diffusion, "weighter", AdaptiveWeighter(calibrate_on_first=True))
    rows = samples(4)
    for row, reward in zip(rows, (1.0, math.nan, 1.0, 3.0)):
        row.reward = reward
    _, plain = double.post_process(rows)
    assert [math.isnan(value) for value in plain] == [True, True, False, False]
    _, rewards = double.post_process(rows, POST_PROCESS)
    assert rewards[:2] == [0.0, 0.0]
    assert rewards[2] < 0 < rewards[3]


MIXGRPO = pytest.mark.trainer("MixGRPO", "e5cdd6a", "caller", "reader", "configuration", "threads", "weights")
VIDEOX = pytest.mark.trainer("VideoX-Fun", "2352d63", "caller", "reader", "configuration", "gradients", "weights")
SRPO = pytest.mark.trainer("SRPO", "81e5898", "caller", "reader", "gradients")
RENO = pytest.mark.trainer("ReNO", "bd6f6ac", "caller", "reader", "gradients")


class HPSClipRewardModel:
    """A model of MixGRPO's own beside ours."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return [0.25 * len(prompt) for prompt in prompts]


@MIXGRPO
def test_mixgrpo_learns_from_the_scores() -> None:
    """A model of a known name makes the advantages, whatever its weight; the reward itself gives zeros."""
    expected = contrast(STORED)
    for flags in ({}, {"pick_score_weight": 0.1}):
        model = PickScoreRewardModel(CONTRAST, device="cpu")
        rewards, gradient = mixgrpo([model], flags, PICTURES, PROMPTS, generations=2)
        torch.testing.assert_close(rewards["PickScoreRewardModel"], expected, **OTHER_PACKAGE)
        torch.testing.assert_close(gradient, -group_advantages(expected, 2), rtol=1e-3, atol=1e-3)
        del model
    naive, gradient = mixgrpo([CONTRAST], {}, PICTURES, PROMPTS, generations=2)
    assert not any(rewards.any() for rewards in naive.values())
    assert not gradient.any()
    with pytest.raises(ValueError, match="needs references"):
        PickScoreRewardModel("ssim", device="cpu")


@MIXGRPO
@pytest.mark.parametrize("mix", ["reward_aggr", "advantage_aggr"])
def test_mixgrpo_weighs_its_own_models_beside_ours(mix) -> None:
    """With `--reward_model multi_reward`, the share of ours is its weight over the sum of all."""
    models = [HPSClipRewardModel(), PickScoreRewardModel(CONTRAST, device="cpu")]
    flags, texts = {"hps_weight": 3.0, "pick_score_weight": 1.0}, ["a", "bb", "c", "dd"]
    rewards, gradient = mixgrpo(models, flags, PICTURES, texts, generations=2, mix=mix)
    theirs, ours = torch.tensor([0.25, 0.5, 0.25, 0.5]), contrast(STORED)
    if mix == "reward_aggr":
        torch.testing.assert_close(rewards, 0.75 * theirs + 0.25 * ours, **OTHER_PACKAGE)
    else:
        torch.testing.assert_close(rewards["PickScoreRewardModel"], ours, **OTHER_PACKAGE)
        expected = 0.75 * group_advantages(theirs, 2) + 0.25 * group_advantages(ours, 2)
        torch.testing.assert_close(gradient, -expected, rtol=1e-3, atol=1e-3)


@MIXGRPO
def test_mixgrpo_weights_its_advantages() -> None:
    """A weight per sample changes that sample's gradient only."""
    weights = LossWeights(rl=torch.tensor([1.0, 1.0, 0.5, 0.0]), sft=torch.zeros(4))

    def weigh(samples: dict[str, Tensor]) -> None:
        samples["advantages"] = weighted_advantages(samples["advantages"], weights)

    models = [PickScoreRewardModel(CONTRAST, device="cpu")]
    _, plain = mixgrpo(models, {}, PICTURES, PROMPTS, generations=2)
    _, weighted = mixgrpo(models, {}, PICTURES, PROMPTS, generations=2, weigh=weigh)
    torch.testing.assert_close(weighted, weights.rl * plain, **OTHER_PACKAGE)


@MIXGRPO
def test_mixgrpo_takes_one_of_our_models() -> None:
    """Of two models of one name only one would count, so the second is refused while the first lives."""
    first = PickScoreRewardModel(CONTRAST, device="cpu")
    with pytest.raises(ValueError, match="Combine the rewards in one sum"):
        PickScoreRewardModel(BRIGHTNESS, device="cpu")
    with pytest.raises(ValueError, match="needs references"):
        PickScoreRewardModel("ssim", device="cpu")
    del first
    assert PickScoreRewardModel("0.7*piqe[-100, 0] + 0.3*niqe[-12, 0]", device="cpu").reward.bounds == (0.0, 1.0)


@MIXGRPO
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_mixgrpo_stops_where_it_would_go_on_with_zeros() -> None:
    """An image that cannot be scored ends the process, through two handlers that swallow every exception."""
    tiny = [as_pil(image[:, :8, :8]) for image in IMAGES]
    with pytest.raises(SystemExit, match="could not score every image"):
        mixgrpo([PickScoreRewardModel("piqe", device="cpu")], {}, tiny, PROMPTS, generations=2)


QUALITY = SimpleNamespace(IQAReward=IQAReward)


@VIDEOX
def test_videox_fun_learns_from_the_scores() -> None:
    """GRPO logs and follows the reward that its two flags name; a weight per sample changes that sample's gradient."""
    texts, expected = ["a", "a", "b", "b"], iqareward.load("piqe")(NOISY)
    logs, gradient = videox_grpo(QUALITY, "IQAReward", '{"reward": "piqe"}', NOISY, texts)
    assert logs == {"IQAReward_reward_mean": pytest.approx(expected.mean().item(), rel=1e-4)}
    centred = expected.view(2, 2) - expected.view(2, 2).mean(1, keepdim=True)
    advantages = (centred / expected.std(correction=0)).flatten()
    assert advantages.abs().min() > 0.1
    torch.testing.assert_close(gradient, -advantages, **HALF_NETWORK)
    weights = LossWeights(rl=torch.tensor([1.0, 1.0, 0.5, 0.0]), sft=torch.zeros(4))
    _, weighted = videox_grpo(
        QUALITY, "IQAReward", '{"IQAReward": {"reward": "piqe"}}', NOISY, texts,
        weigh=lambda rows: weighted_advantages(rows, weights),
    )  # fmt: skip
    torch.testing.assert_close(weighted, weights.rl * gradient, **HALF_NETWORK)


@VIDEOX
def test_videox_fun_backpropagates_through_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward LoRA logs the mean over frames and videos, and every frame becomes brighter."""
    entry = CATALOG["haarpsi"]._replace(build=lambda differentiable=False: BRIGHTNESS, needs_references=False)
    monkeypatch.setitem(CATALOG, "brightness", entry)
    decoded = nn.Parameter(2 * IMAGES.view(2, 2, 3, 32, 32).transpose(1, 2) - 1)
    before = decoded.detach().clone()
    kwargs = '{"reward": "brightness", "differentiable": true}'
    logs = videox_reward_lora(QUALITY, "IQAReward", kwargs, decoded, ["a", "b"])
    assert logs["step_reward"] == pytest.approx(IMAGES.mean().item(), rel=HALF_NETWORK["rtol"])
    assert logs["train_reward"] == pytest.approx(logs["step_reward"]) == pytest.approx(-logs["train_loss"])
    assert decoded.detach().gt(before).all()


@VIDEOX
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_videox_fun_stops_at_an_image_without_a_score() -> None:
    """One NaN would make the advantages of all rows NaN, through the standard deviation of the batch."""
    with pytest.raises(ValueError, match="piqe could not score every frame"):
        videox_grpo(QUALITY, "IQAReward", '{"reward": "piqe"}', IMAGES[:, :, :8, :8], PROMPTS)
    with pytest.raises(ValueError, match="needs references"):
        videox_grpo(QUALITY, "IQAReward", '{"reward": "ssim"}', IMAGES, PROMPTS)


@SRPO
def test_srpo_learns_from_the_difference_of_two_texts() -> None:
    """A text-conditioned reward pulls the two branches apart; its formula is (1 + k) r(positive) - r(negative)."""
    decoded = nn.Parameter(2 * IMAGES[:1] - 1)
    losses, pulls = srpo_step(SRPOModel(LooksLike()), decoded, "bright photo", "photo", script="flux")
    bright = IMAGES[:1].mean().item()
    expected = [0.7 - (1.1 * bright - (1 - bright)), 0.7 - (1.1 * (1 - bright) - bright)]
    assert losses == pytest.approx(expected, abs=HALF_NETWORK["atol"])
    assert pulls[0].sum() < 0 < pulls[1].sum()  # descending makes the image brighter in one branch, darker in the other
    _, pulls = srpo_step(SRPOModel(LooksLike()), decoded, "bright photo", "photo", script="flux", k=10.0)
    assert pulls[0].abs().max() == 0  # a relative score beyond 0.7


@SRPO
def test_srpo_for_qwen_stretches_the_image() -> None:
    """SRPO_Qwen.py scores the image stretched to [0, 1], and has no inversion branch and no threshold."""
    decoded = nn.Parameter(2 * IMAGES[:1] - 1)
    (loss,), (pull,) = srpo_step(SRPOModel(LooksLike()), decoded, "bright photo", "photo", script="qwen")
    image = (IMAGES[:1] - IMAGES[:1].min()) / (IMAGES[:1].max() - IMAGES[:1].min())
    assert loss == pytest.approx(-0.5 * (2 * image.mean().item() - 1), abs=HALF_NETWORK["atol"])
    assert pull.flatten().median() < 0


@SRPO
def test_srpo_refuses_a_reward_without_text() -> None:
    """Why: both texts get one score, and both branches would pull the same way."""

    class Naive(nn.Module):
        def SRP_cfg(self, prompts, negative, images, k):
            return (1 + k) * CONTRAST(images) - CONTRAST(images)

    _, pulls = srpo_step(Naive(), nn.Parameter(2 * IMAGES[:1] - 1), "bright photo", "photo", script="flux")
    torch.testing.assert_close(pulls[0], pulls[1], **EXACT)
    with pytest.raises(ValueError, match="reads the prompt"):
        SRPOModel(CONTRAST)
    with pytest.raises(ValueError, match="SRPOModel expected a differentiable"):
        SRPOModel(LooksLike(differentiable=False))


@RENO
def test_reno_needs_its_preprocessing_taken_out() -> None:
    """At native resolution the noise follows the reward; CLIP's crop is refused, however harmless its values look."""
    latents = nn.Parameter(2 * IMAGES[:1] - 1)
    optimizer = torch.optim.SGD([latents], 5.0)
    trainer = LatentNoiseTrainer([ReNOLoss(BRIGHTNESS, 500.0)], n_iters=4)
    with pytest.raises(ValueError, match=r"preprocess_fn = torch\.nn\.Identity"):
        trainer.train(latents, "a cat", optimizer)
    trainer.preprocess_fn = nn.Identity()
    image, first, best = trainer.train(latents, "a cat", optimizer)
    assert first["brightness"] == pytest.approx(-brightness(IMAGES[:1]).item(), rel=HALF_NETWORK["rtol"])
    assert first["total"] == pytest.approx(500 * first["brightness"])
    assert best["total"] < first["total"]
    assert best["brightness"] == pytest.approx(-brightness(image).item(), rel=HALF_NETWORK["rtol"])
    with pytest.raises(ValueError, match="ReNOLoss expected a differentiable no-reference reward"):
        ReNOLoss(iqareward.load("ssim", differentiable=True))


@RENO
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_reno_stops_at_an_image_without_a_score() -> None:
    """Its best image is the one of the lowest loss, and NaN is never lower: without a stop it would return none."""
    trainer = LatentNoiseTrainer([ReNOLoss(BRIGHTNESS)], n_iters=2)
    trainer.preprocess_fn = nn.Identity()
    latents = nn.Parameter(torch.full((1, 3, 32, 32), torch.nan))
    with pytest.raises(ValueError, match="brightness could not score the image"):
        trainer.train(latents, "a cat", torch.optim.SGD([latents], 5.0))
