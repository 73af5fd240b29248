"""The `fn(images, prompts, metadata)` family: what its trainers do to rewards; ours pass, the obvious ones fail."""

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import Tensor

import iqareward
from examples.adapters import genrl as genrl_example
from iqareward import AdaptiveWeighter, FullReference, NoReference
from iqareward.adapters.flow_grpo import install, reward_function
from iqareward.groups import group_statistics
from iqareward.types import Reward
from iqareward.weighting import LossWeights
from tests.adapters.doubles import bfr_rl, genrl
from tests.adapters.doubles import flow_grpo as double
from tests.adapters.doubles.pages import blocks, changed, execute, package
from tests.tolerances import FORMULA_FP32, OTHER_PACKAGE

PAGE, RECIPES = "how-to/flow-grpo.md", "how-to/adaptive-in-your-trainer.md"
FLOW_GRPO = pytest.mark.trainer("Flow-GRPO", "74db691, 94e23ee", "caller", "reader", "threads")


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


@FLOW_GRPO
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


@FLOW_GRPO
@pytest.mark.parametrize(
    "factory", [BRIGHTNESS, functools.partial(reward_function, BRIGHTNESS)], ids=["object", "partial"]
)
def test_objects_and_partials_are_no_factories(factory) -> None:
    """The table looks into the code of its factories, which objects and partials do not have."""
    module = double.rewards_module()
    module.pickscore_score = factory
    with pytest.raises(AttributeError, match="__code__"):
        module.multi_score("cpu", {"pickscore": 1.0})


@FLOW_GRPO
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


@FLOW_GRPO
def test_installed_names_share_a_scale() -> None:
    """A named reward that leaves [-1, 1] is raw alone; added to others it is calibrated, or needs the range printed."""
    module = double.rewards_module()
    install(module, {"piqe": 0.5})
    images, prompts, metadata = batch(2)
    for theirs, name in (({}, "piqe"), ({"pickscore": 1.0}, "piqe[calibrated]")):
        details, _ = module.multi_score("cpu", theirs)(images, prompts, metadata)
        torch.testing.assert_close(torch.from_numpy(details[name]), iqareward.load(name)(images), **OTHER_PACKAGE)
    module = double.rewards_module()
    install(module, {"lpips": 0.5}, references="gt_path")
    with pytest.raises(ValueError, match=r"lpips may leave \[-1, 1\], .* Write 'lpips\[-1, 0\]'"):
        module.multi_score("cpu", {"pickscore": 1.0})
    module = double.rewards_module()
    install(module, {"psnr[10, 50]": 0.5, "0.2*ssim": 1.0, "3*haarpsi + 2*ssim": 0.1}, references="gt_path")
    module.multi_score("cpu", {"pickscore": 1.0})


@FLOW_GRPO
def test_options_of_installed_rewards() -> None:
    """A mapping may give options and a range beside the weight; two options make two components."""
    module = double.rewards_module()
    options = {"psnr": {"weight": 0.5, "range": [10, 50], "color": "y"}, "haarpsi": {}}
    install(module, options, references="clean")
    images = torch.full((2, 3, 32, 32), 0.5)
    details, _ = module.multi_score("cpu", {})(images, ["", ""], [{"clean": image} for image in images])
    assert details["psnr(color=y)[10, 50]"].tolist() == details["haarpsi"].tolist() == [1.0, 1.0]
    assert details["avg"].tolist() == [1.5, 1.5]


@FLOW_GRPO
def test_install_alone() -> None:
    """With an empty `config.reward_fn` only our rewards count."""
    module = double.rewards_module()
    install(module, [(3.0, NoReference(brightness, higher_is_better=True, differentiable=True))])
    images, prompts, metadata = batch(4)
    call = (images.requires_grad_(), prompts, metadata)  # a graph would not survive the gathering as an array
    gathered = double.sampling_phase(module.multi_score("cpu", {}), [call])
    torch.testing.assert_close(torch.from_numpy(gathered["avg"]), 3 * brightness(photos(4)), **OTHER_PACKAGE)


@FLOW_GRPO
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


@FLOW_GRPO
def test_a_missing_score_of_theirs_stops_too() -> None:
    """`avg` is checked as a whole: NaN from the trainer's own rewards does not get through either."""
    module = double.rewards_module()
    install(module, [(1.0, BRIGHTNESS)])
    module.pickscore_score = lambda device: lambda images, prompts, metadata: ([float("nan"), 1.0], {})
    with pytest.raises(ValueError, match=r"avg could not score images \[0\] of 2"):
        double.sampling_phase(module.multi_score("cpu", {"pickscore": 1.0}), [batch(2)])


@FLOW_GRPO
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


@FLOW_GRPO
def test_gardo_trains_on_one_component() -> None:
    """Its script drops `avg`: ours counts where `config.main_reward` names it, beside rewards of its own."""
    module, images = double.rewards_module(), photos(4) * torch.tensor([0.2, 0.8, 0.9, 0.5]).view(-1, 1, 1, 1)
    install(module, [(1.0, BRIGHTNESS)])
    fn, batches = (
        module.multi_score("cpu", {"jpeg_compressibility": 1.0}),
        [(torch.arange(4), images, ["a"] * 4, [{}] * 4)],
    )
    for name, learns in (("jpeg_compressibility", False), ("brightness", True)):
        place = double.Pipeline(4), double.Accelerator(), double.PerPromptStatTracker()
        found = double.flow_grpo_epoch(fn, batches, *place, main_reward=name)["advantages"][:, 0].float()
        scores = brightness(images)
        expected = (scores - scores.mean()) / (scores.std(correction=0) + 1e-4) if learns else torch.zeros(4)
        torch.testing.assert_close(found, expected, **FORMULA_FP32)


@FLOW_GRPO
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


@FLOW_GRPO
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
    for wrong in ("ssim", torch.mean, [BRIGHTNESS], [(BRIGHTNESS, 1.0)]):
        with pytest.raises(TypeError, match="install expected `rewards` as a mapping of names to weights"):
            install(double.rewards_module(), wrong)
    with pytest.raises(ValueError, match="found none"):
        install(ModuleType("empty"), {"niqe": 1.0})
    module = double.rewards_module()
    install(module, [(1.0, "qalign"), (2.0, "qalign")])
    with pytest.raises(ValueError, match="'qalign' twice"):
        module.multi_score("cpu", {})
    with pytest.raises(ValueError, match="ours, from an earlier call"):
        install(module, {"piqe": 1.0})


@pytest.mark.trainer("ddpo-pytorch", "18294d8", "caller", "reader", "configuration", "threads", "gradients")
def test_ddpo() -> None:
    """ddpo-pytorch takes a name of its module, dicts as a tuple, uint8 arrays; integers would lose their advantages."""
    scope: dict = {}
    execute(blocks(PAGE, section="ddpo-pytorch and TRL up to 0.23")[0], scope)
    rewards = ModuleType("ddpo_pytorch.rewards")
    rewards.named = scope["iqa"]  # builds, and would load its model when it is called
    rewards.iqa = lambda: reward_function(BRIGHTNESS)
    rewards.integers = lambda: lambda images, prompts, metadata: (np.arange(len(prompts)), {})
    pixels = (photos(4).movedim(1, -1).numpy() * 255).astype(np.uint8)
    batches = [(pixels[:2], ("a", "a"), ({}, {})), (pixels[2:], ("b", "b"), ({}, {}))]
    scores, gradient = double.ddpo_epoch(rewards, "iqa", batches)
    expected = torch.from_numpy(pixels / 255).float().mean((1, 2, 3))
    torch.testing.assert_close(torch.from_numpy(scores), expected, **OTHER_PACKAGE)
    standard = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(gradient, -standard / 4, rtol=1e-3, atol=1e-4)  # its statistics add 1e-6
    _, truncated = double.ddpo_epoch(rewards, "integers", batches)
    assert (truncated[1:3] == 0).all()
    with pytest.raises(AttributeError, match="iqaa"):
        double.ddpo_epoch(rewards, "iqaa", batches)


@pytest.mark.trainer("TRL DDPO, AlignProp", "0.23", "caller", "reader", "gradients")
def test_old_trl() -> None:
    """TRL's DDPOTrainer trains on the scores, its AlignPropTrainer through the graph."""
    images = photos(4)
    gradient = double.trl_ddpo_step(reward_function(BRIGHTNESS), images, ("a", "b", "c", "d"))
    expected = brightness(images)
    standard = (expected - expected.mean()) / expected.std(correction=0)
    torch.testing.assert_close(gradient, -standard / 4, **OTHER_PACKAGE)
    with pytest.raises(AttributeError, match="result"):
        double.trl_ddpo_step(reward_function(BRIGHTNESS), images[:1], ("a",), async_reward_computation=True)
    images = photos(2).requires_grad_()
    reward = NoReference(brightness, higher_is_better=True, differentiable=True)
    double.trl_alignprop_step(reward_function(reward), images, ("a", "b"))
    torch.testing.assert_close(images.grad, torch.full_like(images, -1 / images.numel()), **OTHER_PACKAGE)


@FLOW_GRPO
def test_evaluation_needs_the_columns_but_no_groups() -> None:
    """Evaluation logs our rewards too, and asks its metadata for references, but not for ids."""
    module = double.rewards_module(takes_ref_images=True)
    install(module, [(1.0, CLOSENESS)], references="gt_path", groups="input_id")
    fn, images = module.multi_score("cpu", {}), photos(3)
    curves = double.evaluation(fn, [(images, [""] * 3, [{"gt_path": image} for image in images])], double.Accelerator())
    assert curves == {"eval_reward_closeness": pytest.approx(1), "eval_reward_avg": pytest.approx(1)}
    with pytest.raises(ValueError, match="to_images expected `images` as a tensor"):  # videos
        fn(images[:, None], [""] * 3, [{"gt_path": image} for image in images])
    with pytest.raises(ValueError, match="expected 'gt_path' in the metadata of every sample"):
        double.evaluation(fn, [(images, [""] * 3, [{}] * 3)], double.Accelerator())


@pytest.mark.trainer("Flow-GRPO", "74db691, 94e23ee", "configuration")
@pytest.mark.parametrize("only_strict", [True, False])
def test_page_in_flow_grpo(monkeypatch: pytest.MonkeyPatch, qalign: Reward, only_strict: bool) -> None:
    """With the page's lines the script's advantages are those of the weighted sum within each input."""
    module, images, scope = double.rewards_module(), images_near(REFERENCES), {}
    package(monkeypatch, flow_grpo__rewards=module)
    for section in ("Add rewards", "Group by input"):
        for code in blocks(PAGE, section=section):
            execute(code, scope)
    lines = blocks(PAGE, "diff", section="Add rewards") + blocks(PAGE, "diff", section="Group by input")
    epoch = changed(double.flow_grpo_epoch, lines, scope)
    fn = module.multi_score("cpu", {})  # config.reward_fn = {}
    place = double.Pipeline(6), double.Accelerator(), double.PerPromptStatTracker()
    found = epoch(fn, flow_grpo_batches(images), *place, only_strict=only_strict)
    expected = 0.7 * brightness(images) + 0.3 * iqareward.load("ssim")(images, references=REFERENCES[INPUTS])
    statistics = group_statistics(expected, INPUTS)
    standard = (expected - statistics.mean) / (statistics.std / 2**0.5 + 1e-4)
    torch.testing.assert_close(found["advantages"][:, 0].float(), standard, rtol=1e-3, atol=1e-3)
    assert {"reward_qalign", "reward_ssim", "reward_avg", "reward_groups"} <= set(found["curves"])
    slot = double.rewards_module()
    execute(blocks(PAGE, section="ddpo-pytorch and TRL up to 0.23")[0], scope)
    slot.pickscore_score = scope["pickscore_score"]
    batch_of_two = (images[:2], ["", ""], [{}, {}])
    scored = double.sampling_phase(slot.multi_score("cpu", {"pickscore": 1.0}), [batch_of_two])
    np.testing.assert_allclose(scored["pickscore"], brightness(images[:2]).numpy(), rtol=1e-4)


# Three inputs of two rollouts each: near its ground truth, far from it, and far with two rollouts alike.
INPUTS = torch.tensor([0, 0, 1, 1, 2, 2])
REFERENCES = 0.2 + 0.6 * torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def images_near(references: Tensor) -> Tensor:
    noise = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    noise[5] = noise[4]
    amount = torch.tensor([0.02, 0.02, 0.15, 0.15, 0.15, 0.15]).view(-1, 1, 1, 1)
    return (references[INPUTS] + amount * noise).clamp(0, 1)


def flow_grpo_batches(images: Tensor, rows: Sequence[int] = range(6)) -> list[tuple]:
    metadata = [{"gt_path": REFERENCES[INPUTS[row]], "input_id": INPUTS[row].item()} for row in range(6)]
    batches = [list(rows[start : start + 2]) for start in range(0, len(rows), 2)]
    return [
        (torch.tensor(some), images[some], ["restore"] * len(some), [metadata[row] for row in some]) for some in batches
    ]


def weights_by_distance(images: Tensor, references: Tensor) -> LossWeights:
    distance = 1 - iqareward.load("ssim")(images, references=references)
    weighter = AdaptiveWeighter(mode="convex", calibrate_on_first=True)
    weights = weighter(group_statistics(distance, INPUTS).mean)
    assert weights.rl[2] > weights.rl[0] + 0.3  # hard inputs get RL
    assert weights.sft[0] > weights.sft[2] + 0.3  # near ones get SFT
    return weights


def sft_gradients() -> Tensor:
    """Of each row's flow-matching loss without noise, over both steps, after the output of the policy."""
    clean = ((2 * REFERENCES.mean((1, 2, 3)) - 1) - 0.1) * 2
    return 2 * 2 * clean[INPUTS]


def recipe(monkeypatch: pytest.MonkeyPatch, section: str, **modules: ModuleType) -> dict[str, Any]:
    """What the Python of a section of the recipes defines, with noise that is 0."""
    scope: dict[str, Any] = {}
    package(monkeypatch, **modules)
    for code in blocks(RECIPES, section=section):
        execute(code, scope)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    return scope


@pytest.mark.trainer("Flow-GRPO", "74db691, 94e23ee", "caller", "reader", "weights")
def test_weights_in_flow_grpo(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """Each row's gradient is its RL weight times the policy's plus its SFT weight times that of its ground truth."""
    module, images = double.rewards_module(), images_near(REFERENCES)
    scope = recipe(monkeypatch, "Flow-GRPO", flow_grpo__rewards=module)
    fn, batches = module.multi_score("cpu", {}), flow_grpo_batches(images)
    tracker, plain, weighted = double.PerPromptStatTracker(), double.Pipeline(6), double.Pipeline(6)
    (group_line,) = blocks(PAGE, "diff", section="Group by input")
    without = changed(double.flow_grpo_epoch, [group_line], scope)(fn, batches, plain, double.Accelerator(), tracker)
    assert without["kept"] == 4  # the script drops the input whose rollouts are alike
    epoch = changed(double.flow_grpo_epoch, blocks(RECIPES, "diff", section="Flow-GRPO"), scope)
    found = epoch(fn, batches, weighted, double.Accelerator(), tracker)
    assert found["kept"] == 6
    weights = weights_by_distance(images, REFERENCES[INPUTS])
    policy = plain.transformer.shift.grad * 4 / 6  # means over 4 and over 6 rows
    expected = weights.rl * policy + scope["SFT_SCALE"] * weights.sft * sft_gradients() / 6
    torch.testing.assert_close(weighted.transformer.shift.grad, expected, **FORMULA_FP32)
    assert policy[:4].abs().min() > 0.1
    assert policy[4:].abs().max() == 0


@pytest.mark.trainer("DiffusionNFT", "24af555", "caller", "reader", "threads", "weights")
def test_weights_in_diffusion_nft(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """The RL weight moves r towards 0.5, and the ground truth takes part by the SFT weight."""
    module, images = double.rewards_module(), images_near(REFERENCES)
    scope = recipe(monkeypatch, "Flow-GRPO", flow_grpo__rewards=module)
    fn, batches = module.multi_score("cpu", {}), flow_grpo_batches(images)
    tracker, plain, weighted = double.PerPromptStatTracker(), double.Pipeline(6), double.Pipeline(6)
    loop = blocks(RECIPES, "diff", section="DiffusionNFT")
    (line,) = (hunk for hunk in loop[0].split("\n\n") if "stat_tracker" in hunk)
    changed(double.nft_epoch, [line], scope)(fn, batches, plain, double.Accelerator(), tracker)
    changed(double.nft_epoch, loop, scope)(fn, batches, weighted, double.Accelerator(), tracker)
    weights = weights_by_distance(images, REFERENCES[INPUTS])
    policy = plain.transformer.shift.grad
    assert (policy[:4].abs() > 0.1).all()
    expected = weights.rl * policy + scope["SFT_SCALE"] * weights.sft * sft_gradients() / 6
    torch.testing.assert_close(weighted.transformer.shift.grad, expected, **FORMULA_FP32)


@pytest.mark.trainer("Edit-R1", "244883c", "caller", "reader", "configuration", "threads")
def test_edit_r1(monkeypatch: pytest.MonkeyPatch) -> None:
    """`references="ref_images"` compares with the source images; half images; advantages and bounds are ours."""
    module, scope = double.rewards_module(takes_ref_images=True), {}
    package(monkeypatch, flow_grpo__rewards=module)
    for code in blocks(PAGE, section="DiffusionNFT and Edit-R1"):
        execute(code, scope)
    epoch = changed(double.nft_epoch, blocks(PAGE, "diff", section="DiffusionNFT and Edit-R1"), scope)
    images, pipeline = images_near(REFERENCES).half(), double.Pipeline(6)
    sources = [Image.fromarray((255 * row.movedim(0, -1)).byte().numpy()) for row in REFERENCES[INPUTS]]
    prompts = [f"edit {row}" for row in INPUTS.tolist()]
    batches = [(torch.arange(6), images, prompts, [{}] * 6, sources)]
    fn = module.multi_score("cpu", {})  # config.reward_fn = {}
    found = epoch(fn, batches, pipeline, double.Accelerator(), double.EditStatTracker())
    expected = iqareward.load("ssim")(images.float(), references=iqareward.to_images(sources))
    torch.testing.assert_close(torch.from_numpy(found["rewards"]["ssim"]), expected, **OTHER_PACKAGE)
    better = expected > group_statistics(expected, INPUTS).mean
    assert torch.equal(found["advantages"][:4, 0] > 0, better[:4])
    curves = double.evaluation(fn, [(images, prompts, [{}] * 6, sources)], double.Accelerator())
    assert curves["eval_reward_ssim"] == pytest.approx(expected.mean().item(), abs=1e-4)


@pytest.mark.trainer("Edit-R1", "244883c", "caller", "reader")
def test_edit_r1_with_one_prompt_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its statistics by prompt would compare inputs with each other; by `groups`, each with its own rollouts."""
    module, images = double.rewards_module(takes_ref_images=True), images_near(REFERENCES)
    install(module, {"ssim": 1.0}, references="ref_images", groups="input_id")
    batches = [(torch.arange(6), images, ["restore"] * 6, [{"input_id": row} for row in INPUTS.tolist()])]
    batches = [(*batch, list(REFERENCES[INPUTS])) for batch in batches]
    (line,) = (hunk for hunk in blocks(RECIPES, "diff", section="DiffusionNFT")[0].split("\n\n") if "tracker" in hunk)
    fn = module.multi_score("cpu", {})
    for loop, per_input in ((double.nft_epoch, False), (changed(double.nft_epoch, [line], {}), True)):
        found = loop(fn, batches, double.Pipeline(6), double.Accelerator(), double.EditStatTracker())
        means = found["advantages"][:, 0].view(3, 2).mean(1)
        assert (means.abs().max() < 1e-6) == per_input


@pytest.mark.trainer("DiffusionOPSD", "2166584", "caller", "reader", "configuration")
def test_diffusion_opsd(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """Ours joins the reward that makes the targets, and weighs them; without that one its main script stops."""
    module, images = double.rewards_module(refuses_none=True), photos(4)
    package(monkeypatch, diffusionopsd__rewards=module)
    for code in blocks(PAGE, section="DiffusionOPSD"):
        execute(code, {})
    module.pickscore_score = lambda device: lambda images, prompts, metadata: (images[:, 0].mean((1, 2)), {})
    batches, pipeline = [(torch.arange(4), images, ["a"] * 4, [{}] * 4)], double.Pipeline(4)
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    found = double.opsd_epoch(module, {"pickscore": 0.5}, batches, pipeline)
    expected = 0.5 * images[:, 0].mean((1, 2)) + brightness(images)
    np.testing.assert_allclose(found["rewards"]["avg"][:, 0], expected.numpy(), rtol=1e-5)
    assert "reward_qalign" in found["curves"]
    advantages = (expected - expected.mean()) / (expected.std(correction=0) + 1e-4)
    r = advantages / double.ADV_CLIP_MAX / 2 + 0.5
    per_step = []
    for t in (1.0, 0.5):  # latents of 1 and no noise: the estimate of the clean latents is 1 - t
        towards, away = -2 * t * (1 - t - 1.5), 2 * t * (1 - t - 0.5)
        per_step.append(r * towards + (1 - r) * away)
    torch.testing.assert_close(
        pipeline.transformer.shift.grad, double.ADV_CLIP_MAX * sum(per_step) / 4, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(IndexError):
        double.opsd_epoch(module, {}, batches, pipeline)


# Two inputs of four rollouts; their distances give the first the advantages 0.67, 0.21, -0.20, -0.68 under the
# standard deviation of all rollouts, as in a check inside BFR_RL's own file.
ADVANTAGES = torch.tensor([0.67, 0.21, -0.20, -0.68])
SPREAD = 0.1
DISTANCES = 0.3 + SPREAD * torch.cat([0.8667 - ADVANTAGES, -0.8667 + ADVANTAGES])
TRUTH = 0.4 * torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(5)).repeat_interleave(4, dim=0)


def bfr_batches(images: Tensor, truth: Tensor) -> list[tuple]:
    """Four rollouts a batch, of which each input has a caption of its own."""
    return [
        (rows, 2 * images[rows] - 1, [caption] * 4, 2 * truth[rows] - 1)
        for rows, caption in ((torch.arange(4), "a face"), (torch.arange(4, 8), "another face"))
    ]


BFR_RL = pytest.mark.trainer("BFR_RL", "ee5a624, 5a5f7a1", "caller", "reader", "threads")


def diffbir(server: Callable[[Tensor, Tensor], list[float]]) -> SimpleNamespace:
    return SimpleNamespace(rewards=bfr_rl.rewards_module(server))


def silent(images: Tensor, references: Tensor) -> list[float]:
    """A face server that answers 0 for every face."""
    return [0.0] * len(images)


def without_server() -> Callable[..., dict[str, Any]]:
    """BFR_RL's loop after the page's change of the mapping."""
    return changed(bfr_rl.epoch, blocks(PAGE, "diff", section="BFR_RL")[:1], {})


@BFR_RL
@pytest.mark.parametrize("total", ["avg", "total_scores"])  # its loop has read one and the other
@pytest.mark.parametrize("server", [True, False], ids=["with its server", "without"])
def test_bfr_rl_trains_on_our_reward(total: str, server: bool) -> None:
    """With a face server that answers 0, or none, the advantages of its loop and their gradients are ours."""
    found_package, policy = diffbir(silent), bfr_rl.Policy(8)
    install(found_package.rewards, [(1.0, CLOSENESS)], references="gt_images", value_range=(-1, 1))
    batches = bfr_batches(TRUTH + DISTANCES.view(-1, 1, 1, 1), TRUTH)
    loop = bfr_rl.epoch if server else without_server()
    found = loop(found_package, batches, policy, double.Accelerator(), total=total)
    advantages = found["advantages"].float()
    expected = torch.cat([ADVANTAGES, -ADVANTAGES])[:, None].expand(-1, double.STEPS)
    torch.testing.assert_close(advantages, expected, rtol=0.0, atol=2e-3)  # its statistics add 1e-4
    steps = torch.tensor([1.0, 2.0])  # derivative of the log-probabilities
    torch.testing.assert_close(policy.shift.grad, -(advantages * steps).sum(1) / 8, rtol=0.0, atol=2e-3)


@BFR_RL
@pytest.mark.parametrize("total", ["avg", "total_scores"])
def test_bfr_rl_adds_its_server(total: str) -> None:
    """Its server's scores count beside ours."""
    found_package, images = diffbir(lambda images, references: brightness(images).tolist()), photos(8)
    install(found_package.rewards, [(0.5, CLOSENESS)], references="gt_images", value_range=(-1, 1))
    found = bfr_rl.epoch(found_package, bfr_batches(images, TRUTH), bfr_rl.Policy(8), double.Accelerator(), total=total)
    expected = brightness(2 * images - 1) + 0.5 * closeness(images, TRUTH)
    np.testing.assert_allclose(found["rewards"][total][:, 0], expected.numpy(), rtol=1e-4, atol=1e-5)


@BFR_RL
def test_bfr_rl_takes_what_its_decoder_overshoots() -> None:
    """Beyond [-1, 1] pixels are clamped, and beyond [-1.5, 1.5] an image has no score, which can count as the worst."""
    images = (0.9 * TRUTH).clone()
    images[0, 0, 0, 0], images[1, 0, 0, 0] = 1.2, 1.3  # 1.4 and 1.6 in its range
    expected = closeness(images.clamp(0, 1), TRUTH)
    expected[1] = expected[[0, 2, 3]].min()
    reward = iqareward.FullReference(closeness, higher_is_better=True, name="near")
    for on_nan in ("raise", "worst"):
        found_package = diffbir(silent)
        columns = {"references": "gt_images", "value_range": (-1, 1)}
        install(found_package.rewards, [(1.0, reward)], on_nan=on_nan, **columns)
        place = bfr_batches(images, TRUTH), bfr_rl.Policy(8), double.Accelerator()
        if on_nan == "raise":
            with pytest.raises(ValueError, match=r"could not score images \[1\] of 4"):
                without_server()(found_package, *place, total="avg")
        else:
            found = without_server()(found_package, *place, total="avg")
            np.testing.assert_allclose(found["rewards"]["near"], expected.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.trainer("BFR_RL", "ee5a624, 5a5f7a1", "configuration")
def test_page_in_bfr_rl(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the page's lines its loop trains on SSIM alone, and the page's check passes."""
    found_package, scope = diffbir(silent), {}
    package(monkeypatch, diffbir__rewards=found_package.rewards)
    for code in blocks(PAGE, section="BFR_RL"):
        execute(code, scope)
    loop = changed(bfr_rl.epoch, blocks(PAGE, "diff", section="BFR_RL"), {})
    images = (TRUTH + 0.1 * photos(8)).clamp(0, 1)
    found = loop(found_package, bfr_batches(images, TRUTH), bfr_rl.Policy(8), double.Accelerator(), total="avg")
    scores = iqareward.load("ssim")(images, references=TRUTH)
    np.testing.assert_allclose(found["rewards"]["ssim"], scores.numpy(), rtol=1e-4, atol=1e-5)
    above = scores.view(2, 4) > scores.view(2, 4).mean(1, keepdim=True)
    assert torch.equal(found["advantages"][:, 0].view(2, 4) > 0, above)
    assert "face_reward_remote" not in found["rewards"]


@pytest.mark.trainer("BFR_RL", "ee5a624, 5a5f7a1", "weights")
def test_weights_in_bfr_rl(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """The likelihood of the ground truth counts by the SFT weight, the policy by the RL weight, and no row is lost."""
    scope, found_package = recipe(monkeypatch, "Flow-GRPO", flow_grpo__rewards=double.rewards_module()), diffbir(silent)
    recipe(monkeypatch, "BFR_RL", diffbir__rewards=found_package.rewards)
    images = images_near(REFERENCES)
    batches = [
        (torch.arange(start, start + 2), 2 * images[start : start + 2] - 1, [caption] * 2, truth.expand(2, -1, -1, -1))
        for start, caption, truth in zip((0, 2, 4), ("near", "far", "alike"), 2 * REFERENCES - 1, strict=True)
    ]
    plain, weighted = bfr_rl.Policy(6), bfr_rl.Policy(6)
    without = bfr_rl.epoch(found_package, batches, plain, double.Accelerator(), total="avg")
    assert without["kept"] == 4
    loop = changed(bfr_rl.epoch, blocks(RECIPES, "diff", section="BFR_RL"), scope)
    found = loop(found_package, batches, weighted, double.Accelerator(), total="avg")
    assert found["kept"] == 6
    weights = weights_by_distance(images, REFERENCES[INPUTS])
    policy = torch.zeros(6)
    policy[:4] = -(without["advantages"][:4].float() * torch.tensor([1.0, 2.0])).sum(1)
    log_density = (-0.5 - 0.5 * torch.log(torch.tensor(2 * torch.pi))) / 40  # of a ground truth one deviation away
    likelihood = -torch.exp(log_density) / 40
    expected = (weights.rl * policy + 0.001 * weights.sft * likelihood) / 6
    torch.testing.assert_close(weighted.shift.grad, expected, **FORMULA_FP32)
    torch.testing.assert_close(plain.shift.grad[:4], (policy[:4] + 0.001 * likelihood) / 4, **FORMULA_FP32)


@pytest.mark.trainer("GenRL", "0956cd0", "caller", "reader", "configuration", "threads")
@pytest.mark.parametrize("weight_advantages", [False, True])
def test_genrl(weight_advantages: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example scores videos by their frames; without its module GenRL trains on 0, which its curve shows."""
    monkeypatch.setattr(genrl_example, "REWARD", BRIGHTNESS)
    videos = torch.rand(4, 9, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    batches = [(videos[:2], ["a", "a"]), (videos[2:], ["b", "b"])]
    config = {
        "reward_fn": {"iqa": 2.0},
        "reward_module": genrl_example.__name__,
        "weight_advantages": weight_advantages,
    }
    advantages, logged = genrl.epoch(config, batches)
    expected = videos[:, ::4].mean((1, 2, 3, 4))
    assert logged == {"reward_iqa_raw": pytest.approx(expected.mean().item(), rel=1e-5)}
    better = expected.view(2, 2) > expected.view(2, 2).mean(1, keepdim=True)
    assert torch.equal(advantages[:, 0].view(2, 2) > 0, better)
    advantages, logged = genrl.epoch({**config, "reward_module": None}, batches)
    assert logged == {"reward_iqa_raw": 0.0}
    assert not advantages.any()
    with pytest.raises(ValueError, match="no other_score"):
        genrl.epoch({**config, "reward_fn": {"other": 1.0}}, batches)


def gradients(rank: int, folder: str) -> None:
    """One of two processes with one rollout of each input: what the weighted loop gives its rows."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        shift = weighted_epoch(range(rank, 6, 2))
        torch.save(shift, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def weighted_epoch(rows: Sequence[int]) -> Tensor:
    """The gradient of Flow-GRPO's loop with the recipe, for the rows of this process."""
    with pytest.MonkeyPatch.context() as patch:
        module, code = double.rewards_module(), blocks(RECIPES, section="Flow-GRPO")
        install(module, [(1.0, BRIGHTNESS), (0.0, "ssim")], references="gt_path", groups="input_id")
        scope: dict[str, Any] = {}
        execute(code[1], scope)
        patch.setattr(torch, "randn_like", torch.zeros_like)
        epoch = changed(double.flow_grpo_epoch, blocks(RECIPES, "diff", section="Flow-GRPO"), scope)
        pipeline, tracker = double.Pipeline(6), double.PerPromptStatTracker()
        batches = flow_grpo_batches(images_near(REFERENCES), rows)
        epoch(module.multi_score("cpu", {}), batches, pipeline, double.Accelerator(), tracker)
    return pipeline.transformer.shift.grad


@pytest.mark.trainer("Flow-GRPO", "74db691, 94e23ee", "processes")
def test_two_processes(tmp_path) -> None:
    """Rollouts of one input on two processes are normalised, weighed and calibrated together, as on one."""
    mp.start_processes(gradients, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    found = sum(torch.load(tmp_path / f"{rank}.pt") for rank in range(2)) / 2  # as DDP averages
    torch.testing.assert_close(found, weighted_epoch(range(6)), **FORMULA_FP32)
