"""The `fn(images, prompts, metadata)` family: what its trainers do to rewards; ours pass, the obvious ones fail."""

import functools
import logging
import threading
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import iqareward
from iqareward import FullReference, NoReference
from iqareward.adapters.flow_grpo import install, reward_function
from iqareward.types import Reward
from iqareward.weighting import LossWeights, weighted_advantages
from tests.adapters.doubles import flow_grpo as double
from tests.adapters.doubles.pages import blocks, execute, package
from tests.tolerances import EXACT, OTHER_PACKAGE


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def closeness(images: Tensor, references: Tensor) -> Tensor:
    return 1 - (images - references).abs().mean(dim=(1, 2, 3))


BRIGHTNESS = NoReference(brightness, higher_is_better=True)
CLOSENESS = FullReference(closeness, higher_is_better=True)


def photos(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def batch(count: int, seed: int = 0) -> tuple:
    return photos(count, seed), ["restore"] * count, [{"input_id": row // 2} for row in range(count)]


def test_reward_in_a_slot_of_the_table() -> None:
    """A plain factory with a `device` argument takes the place of a built-in reward; list and array results mix."""
    module = double.rewards_module()

    def pickscore_score(device):
        return reward_function(BRIGHTNESS, device=device)

    module.pickscore_score = pickscore_score
    batches = [batch(3, seed) for seed in range(4)]
    fn = module.multi_score("cpu", {"pickscore": 1.0, "jpeg_compressibility": 0.1})
    gathered = double.sampling_phase(fn, batches)
    expected = torch.cat([brightness(images) for images, _, _ in batches])
    torch.testing.assert_close(torch.from_numpy(gathered["pickscore"]), expected, **OTHER_PACKAGE)
    torch.testing.assert_close(torch.from_numpy(gathered["avg"]), expected + 0.1 * len("restore"), **OTHER_PACKAGE)


@pytest.mark.parametrize(
    "factory", [BRIGHTNESS, functools.partial(reward_function, BRIGHTNESS)], ids=["object", "partial"]
)
def test_objects_and_partials_are_no_factories(factory) -> None:
    """The table looks into the code of its factories, which objects and partials do not have."""
    module = double.rewards_module()
    module.pickscore_score = factory
    with pytest.raises(AttributeError, match="__code__"):
        module.multi_score("cpu", {"pickscore": 1.0})


@pytest.mark.parametrize("takes_ref_images", [False, True])
def test_install_adds_to_the_trainers_own_rewards(takes_ref_images: bool) -> None:
    """After `install` the script's own line gives their components, ours and the weighted sum of all."""
    module = double.rewards_module(takes_ref_images=takes_ref_images)
    install(module, [(0.1, "piqe[-100, 0]"), (2.0, BRIGHTNESS)])
    batches = [batch(3, seed) for seed in range(12)]
    if takes_ref_images:
        batches = [(*one, [Image.new("RGB", (16, 16))] * 3) for one in batches]
    gathered = double.sampling_phase(module.multi_score("cpu", {"pickscore": 0.5}), batches)
    assert set(gathered) == {"pickscore", "piqe[-100, 0]", "brightness", "avg"}
    images = torch.cat([one[0] for one in batches])
    expected = 0.5 * brightness(images) + 0.1 * iqareward.load("piqe[-100, 0]")(images) + 2 * brightness(images)
    torch.testing.assert_close(torch.from_numpy(gathered["avg"]), expected, **OTHER_PACKAGE)
    torch.testing.assert_close(torch.from_numpy(gathered["brightness"]), brightness(images), **OTHER_PACKAGE)


def test_installed_names_share_a_scale() -> None:
    """A named reward that leaves [-1, 1] may be trained on alone; added to others, it needs the range printed."""
    module = double.rewards_module()
    install(module, {"psnr": 0.5}, references="gt_path")
    module.multi_score("cpu", {})
    with pytest.raises(ValueError, match=r"'psnr' may leave \[-1, 1\]. Write 'psnr\[10, 50\]'"):
        module.multi_score("cpu", {"pickscore": 1.0})
    module = double.rewards_module()
    install(module, {"psnr[10, 50]": 0.5, "0.2*ssim": 1.0, "3*haarpsi + 2*ssim": 0.1}, references="gt_path")
    module.multi_score("cpu", {"pickscore": 1.0})


def test_install_alone() -> None:
    """With an empty `config.reward_fn` only our rewards count."""
    module = double.rewards_module()
    install(module, [(3.0, NoReference(brightness, higher_is_better=True, differentiable=True))])
    images, prompts, metadata = batch(4)
    call = (images.requires_grad_(), prompts, metadata)  # a graph would not survive the gathering as an array
    gathered = double.sampling_phase(module.multi_score("cpu", {}), [call])
    torch.testing.assert_close(torch.from_numpy(gathered["avg"]), 3 * brightness(photos(4)), **OTHER_PACKAGE)


def test_one_missing_score_would_destroy_every_advantage(caplog: pytest.LogCaptureFixture) -> None:
    """A NaN makes all advantages NaN under a global standard deviation; ours stops, or counts it as it is told to."""
    images, prompts, metadata = batch(4)
    images[1, 0, 0, 0] = torch.nan
    prompts = ["a", "a", "b", "b"]
    naive = BRIGHTNESS(images).numpy()
    assert np.isnan(double.PerPromptStatTracker(global_std=True).update(prompts, naive)).all()
    module = double.rewards_module()
    install(module, [(1.0, BRIGHTNESS)])
    with pytest.raises(ValueError, match=r"brightness could not score images \[1\] of 4"):
        double.sampling_phase(module.multi_score("cpu", {}), [(images, prompts, metadata)])
    expected = {"mean": naive[[0, 2, 3]].mean().item(), "worst": naive[[0, 2, 3]].min().item(), -3.0: -3.0}
    for on_nan, value in expected.items():
        with caplog.at_level(logging.WARNING):
            scores, _ = reward_function(BRIGHTNESS, on_nan=on_nan)(images, prompts, metadata)
        assert scores[1] == pytest.approx(value)
        assert np.isfinite(double.PerPromptStatTracker(global_std=True).update(prompts, scores)).all()
        assert "could not score images [1] of 4" in caplog.text
        caplog.clear()


def test_a_missing_score_of_theirs_stops_too() -> None:
    """`avg` is checked as a whole: NaN from the trainer's own rewards does not get through either."""
    module = double.rewards_module()
    install(module, [(1.0, BRIGHTNESS)])
    module.pickscore_score = lambda device: lambda images, prompts, metadata: ([float("nan"), 1.0], {})
    with pytest.raises(ValueError, match=r"avg could not score images \[0\] of 2"):
        double.sampling_phase(module.multi_score("cpu", {"pickscore": 1.0}), [batch(2)])


def test_groups_by_input_id() -> None:
    """With one prompt for all, the trainer's key merges all inputs; component `groups` tells them apart."""
    images, prompts, metadata = batch(8)
    images = images * torch.linspace(0.1, 1, 8)[:, None, None, None]
    module = double.rewards_module()
    install(module, [(1.0, BRIGHTNESS)], groups="input_id")
    gathered = double.sampling_phase(
        module.multi_score("cpu", {}),
        [(images[:4], prompts[:4], metadata[:4]), (images[4:], prompts[4:], metadata[4:])],
    )
    assert gathered["groups"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    tracker = double.PerPromptStatTracker(global_std=True)
    merged = tracker.update(prompts, gathered["avg"]).reshape(4, 2).mean(1)
    apart = tracker.update(gathered["groups"], gathered["avg"]).reshape(4, 2).mean(1)
    assert abs(merged).max() > 1  # hard inputs are punished for being hard
    np.testing.assert_allclose(apart, 0, atol=1e-6)
    with pytest.raises(ValueError, match=r"input ids in \[0, 2\*\*24\)"):
        module.multi_score("cpu", {})(images[:1], prompts[:1], [{"input_id": 2**24}])


def test_no_graph_in_their_threads() -> None:
    """Grad mode does not reach pool threads: a bare network builds a graph there, our function does not."""
    network = torch.nn.Conv2d(3, 1, 3)
    graphs = []

    def naive(images, prompts, metadata, only_strict=True):
        scores = network(images).mean(dim=(1, 2, 3))
        graphs.append(scores.requires_grad)
        return {"avg": scores.detach()}, {}

    double.sampling_phase(naive, [batch(2)])
    assert graphs == [True]

    def judged(images: Tensor) -> Tensor:
        scores = network(images).mean(dim=(1, 2, 3))
        graphs.append(scores.requires_grad or scores.dtype != torch.float32)
        return scores

    module = double.rewards_module()
    install(module, [(1.0, NoReference(judged, higher_is_better=True))])
    double.sampling_phase(module.multi_score("cpu", {}), [batch(2)])
    assert graphs == [True, False]


def test_threads_take_turns() -> None:
    """Eight threads never hold two batches in one reward."""
    inside, most, gate = 0, 0, threading.Lock()

    def counted(images: Tensor) -> Tensor:
        nonlocal inside, most
        with gate:
            inside += 1
            most = max(most, inside)
        threading.Event().wait(0.002)
        with gate:
            inside -= 1
        return brightness(images)

    module = double.rewards_module()
    install(module, [(1.0, NoReference(counted, higher_is_better=True))])
    double.sampling_phase(module.multi_score("cpu", {}), [batch(1, seed) for seed in range(16)])
    assert most == 1


def test_ddpo() -> None:
    """ddpo-pytorch takes a name of its module, dicts as a tuple, uint8 arrays; integers would lose their advantages."""
    rewards = ModuleType("ddpo_pytorch.rewards")
    rewards.iqa = lambda: reward_function(BRIGHTNESS)
    rewards.integers = lambda: lambda images, prompts, metadata: (np.arange(len(prompts)), {})
    pixels = (photos(4).movedim(1, -1).numpy() * 255).astype(np.uint8)
    batches = [(pixels, ("a", "a", "b", "b"), ({}, {}, {}, {}))]
    scores = double.ddpo_sampling(rewards, "iqa", batches)
    torch.testing.assert_close(torch.from_numpy(scores), torch.from_numpy(pixels / 255).float().mean((1, 2, 3)))
    assert np.abs(double.DDPOStatTracker().update(batches[0][1], scores)).min() > 0.1
    integers = double.ddpo_sampling(rewards, "integers", batches)
    assert np.abs(double.DDPOStatTracker().update(batches[0][1], integers)).max() <= 1  # truncated
    assert (double.DDPOStatTracker().update(batches[0][1], integers)[1:3] == 0).all()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_bfr() -> None:
    """BFR_RL hands over [-1, 1] and one mapping with the ground truth; taken for [0, 1] nothing can be scored."""
    images, truth = photos(3), photos(3, seed=1)
    call = double.bfr_batch(images, ["face"] * 3, truth)
    module = double.rewards_module()
    install(module, [(1.0, CLOSENESS)], references="gt_images", value_range=(-1.0, 1.0), groups=None)
    gathered = double.sampling_phase(module.multi_score("cpu", {}), [call])
    torch.testing.assert_close(torch.from_numpy(gathered["avg"]), closeness(images, truth), **OTHER_PACKAGE)
    assert CLOSENESS(call[0], references=call[2]["gt_images"]).isnan().all()


def test_references(tmp_path) -> None:
    """References come from the metadata, as paths too, or from the source images of the edit scripts."""
    images = photos(2)
    sources = [Image.new("RGB", (16, 16), (255 * row, 0, 0)) for row in range(2)]
    expected = closeness(images, iqareward.to_images(sources))
    fn = reward_function(CLOSENESS, references="ref_images")
    np.testing.assert_allclose(fn(images, ["", ""], [{}, {}], sources)[0], expected.numpy(), rtol=1e-5)
    for row, source in enumerate(sources):
        source.save(tmp_path / f"{row}.png")
    metadata = [{"gt_path": str(tmp_path / f"{row}.png")} for row in range(2)]
    fn = reward_function(CLOSENESS, references="gt_path")
    np.testing.assert_allclose(fn(images, ["", ""], metadata)[0], expected.numpy(), rtol=1e-5)
    with pytest.raises(ValueError, match=r"expected 'gt_path' in the metadata of every sample, got keys \['other'\]"):
        fn(images, ["", ""], [{"other": 1}, {"other": 2}])
    with pytest.raises(ValueError, match="expected `ref_images` for every sample"):
        reward_function(CLOSENESS, references="ref_images")(images, ["", ""], [{}, {}])


def test_old_trl() -> None:
    """TRL's DDPOTrainer gets tensors of scores, its AlignPropTrainer a graph."""
    images = photos(2)
    scores = double.trl_ddpo_scores(reward_function(BRIGHTNESS), images, ("a", "b"))
    torch.testing.assert_close(scores, brightness(images), **OTHER_PACKAGE)
    images = photos(2).requires_grad_()
    reward = NoReference(brightness, higher_is_better=True, differentiable=True)
    double.trl_alignprop_step(reward_function(reward), images, ("a", "b"))
    torch.testing.assert_close(images.grad, torch.full_like(images, -1 / images.numel()), **OTHER_PACKAGE)


def test_weights() -> None:
    """Weighted advantages and the SFT weight go through the script's filter, which drops rows without RL."""
    advantages = torch.tensor([[1.0, 1.0], [-2.0, -2.0], [3.0, 3.0]])
    weights = LossWeights(rl=torch.tensor([1.0, 0.5, 0.0]), sft=torch.tensor([0.0, 0.5, 1.0]))
    samples = {"advantages": advantages, "latents": torch.arange(3)}
    samples["advantages"] = weighted_advantages(samples["advantages"], weights)
    samples["sft_weight"] = weights.sft
    torch.testing.assert_close(samples["advantages"], torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]), **EXACT)
    assert double.samples_for_training(samples)["sft_weight"].tolist() == [0.0, 0.5]


def test_mistakes_before_training() -> None:
    """What cannot work is refused when the function is built."""
    with pytest.raises(ValueError, match="needs `references`, and has none"):
        reward_function("ssim")
    with pytest.raises(ValueError, match=r"expected on_nan 'raise', 'mean', 'worst' or a finite number, got 'nan'"):
        reward_function("niqe", on_nan="nan")
    with pytest.raises(ValueError, match="expected on_nan"):
        install(double.rewards_module(), {"niqe": 1.0}, on_nan=float("nan"))
    with pytest.raises(ValueError, match="got True"):
        reward_function("niqe", on_nan=True)
    with pytest.raises(ValueError, match="unknown reward 'nique'"):
        reward_function("nique")
    with pytest.raises(ValueError, match="found none"):
        install(ModuleType("empty"), {"niqe": 1.0})
    module = double.rewards_module()
    install(module, [(1.0, "qalign"), (2.0, "qalign")])
    with pytest.raises(ValueError, match="'qalign' twice"):
        module.multi_score("cpu", {})
    with pytest.raises(ValueError, match="ours, from an earlier call"):
        install(module, {"piqe": 1.0})


def test_page(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """The page's lines for flow_grpo, BFR_RL and the slot of the table work in scripts like theirs."""
    module, bfr = double.rewards_module(), double.rewards_module()
    package(monkeypatch, flow_grpo__rewards=module, diffbir__rewards=bfr)
    scope: dict = {}
    for code in blocks("how-to/flow-grpo.md"):
        execute(code, scope)
    images = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    metadata = [{"gt_path": images[row], "input_id": row} for row in range(2)]
    gathered = double.sampling_phase(module.multi_score("cpu", {"pickscore": 1.0}), [(images, ["", ""], metadata)])
    assert set(gathered) == {"pickscore", "qalign", "ssim", "groups", "avg"}
    gathered = double.sampling_phase(bfr.multi_score("cpu", {}), [double.bfr_batch(images, ["", ""], images)])
    np.testing.assert_allclose(gathered["avg"], 1, rtol=1e-5)
    slot = double.rewards_module()
    slot.pickscore_score = scope["pickscore_score"]
    scored = double.sampling_phase(slot.multi_score("cpu", {"pickscore": 1.0}), [(images, ["", ""], metadata)])
    np.testing.assert_allclose(scored["pickscore"], qalign(images).numpy(), rtol=1e-4)
