"""verl-omni (one image per call) and verl (one completion per call): our scores and weights reach the actor's loss."""

import asyncio
import functools
import inspect
import pickle
import shlex
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

import iqareward
from iqareward import AdaptiveWeighter, NoReference
from iqareward.adapters import verl
from iqareward.adapters.verl import compute_score
from iqareward.advantages import group_advantages
from iqareward.types import Reward
from iqareward.weighting import mixed_advantages, optimality_probability
from tests.adapters.doubles import verl as double
from tests.adapters.doubles.pages import blocks, execute, package
from tests.tolerances import EXACT, FORMULA_FP32, NETWORK_BATCH

OMNI, VERL = ("verl-omni", "8921e37"), ("verl", "302f740")
PAGE, ADAPTIVE = "how-to/verl-omni.md", "how-to/adaptive-in-your-trainer.md"
PATH = "pkg://iqareward.adapters.verl"
omni = functools.partial(pytest.mark.trainer, *OMNI)
text = functools.partial(pytest.mark.trainer, *VERL)


@pytest.fixture(autouse=True)
def no_workers_left():
    """Every test ends the workers that it started."""
    yield
    verl._batched.cache_clear()


def pixels(count: int, side: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)


def noisy(clean: Tensor, strengths: list[float]) -> Tensor:
    """Rollouts of one input: the clean image with more and more noise."""
    noise = torch.randn(len(strengths), *clean.shape, generator=torch.Generator().manual_seed(7))
    return (clean + 255 * torch.tensor(strengths)[:, None, None, None] * noise).round().clamp(0, 255).to(torch.uint8)


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def one(reward, **options) -> double.RewardLoop:
    """verl-omni with a single reward."""
    kwargs = {"reward": reward, **options}
    custom = {"path": PATH, "name": "compute_score", "reward_kwargs": kwargs}
    return double.RewardLoop(double.merged(double.OMNI, {"custom_reward_function": custom}))


def several(**entries: dict) -> double.RewardLoop:
    """verl-omni with a sum of rewards."""
    functions = {key: {"path": PATH, "name": "compute_score", **entry} for key, entry in entries.items()}
    settings = yaml.safe_load(blocks(PAGE, "yaml")[1])["reward"] | {"reward_functions": functions}
    return double.RewardLoop(double.merged(double.OMNI, settings))


def scores(batch: SimpleNamespace) -> Tensor:
    return batch.batch["rm_scores"][:, 0]


@omni("caller", "reader", "async", "threads")
def test_one_image_per_call_becomes_batches() -> None:
    """Sixteen concurrent calls get their own scores, the reward sees batches, and its name is in the log."""
    sizes = []

    def counted(images: Tensor) -> Tensor:
        sizes.append(len(images))
        threading.Event().wait(0.01)
        return brightness(images)

    reward = NoReference(counted, higher_is_better=True, name="brightness")
    images = pixels(16)
    batch = one(reward, max_batch=8, max_wait_ms=50.0)(images)
    torch.testing.assert_close(scores(batch), brightness(images / 255), **NETWORK_BATCH)
    log = double.logged(batch)
    assert log["critic/brightness/mean"] == pytest.approx(log["critic/rewards/mean"])
    assert sum(sizes) == 16
    assert len(sizes) < 16
    assert max(sizes) <= 8


@omni("caller", "processes")
def test_ray_gets_a_coroutine_function() -> None:
    """verl awaits functions only, through its `partial` and after pickling; an async object is never awaited."""

    class Naive:
        async def __call__(self, **call):
            return {"score": 1.0}

    assert not inspect.iscoroutinefunction(Naive())
    bound = pickle.loads(pickle.dumps(functools.partial(compute_score, reward="piqe")))
    assert inspect.iscoroutinefunction(bound)
    image = pixels(1, side=48)
    found = asyncio.run(bound(solution_image=image[0], data_source="photos"))["score"]
    assert found == pytest.approx(iqareward.load("piqe")(image / 255).item(), abs=1e-3)


@omni("caller")
def test_sizes_and_other_keywords() -> None:
    """Images of different sizes share a queue, and what the router adds is ignored."""
    images = [*pixels(2), *pixels(2, side=48)]
    batch = one("piqe", reward_router_address="host:1", model_name="x", sampling_params={})(images)
    expected = torch.stack([iqareward.load("piqe")(image[None] / 255)[0] for image in images])
    torch.testing.assert_close(scores(batch), expected, **NETWORK_BATCH)


@omni("caller")
def test_references_from_paths(tmp_path) -> None:
    """The ground truth is a path in `ground_truth` or in `extra_info`."""
    images, clean = pixels(3), pixels(3, seed=1)
    paths = []
    for row, image in enumerate(clean):
        paths.append(str(tmp_path / f"{row}.png"))
        Image.fromarray(image.movedim(0, -1).numpy()).save(paths[-1])
    expected = iqareward.load("ssim")(images / 255, references=clean / 255)
    batch = one("ssim", references="ground_truth")(images, ground_truths=paths)
    torch.testing.assert_close(scores(batch), expected, **NETWORK_BATCH)
    loop = one("ssim", references="gt_path")
    batch = loop(images, [{"gt_path": path} for path in paths])
    torch.testing.assert_close(scores(batch), expected, **NETWORK_BATCH)
    with pytest.raises(ValueError, match=r"expected 'gt_path' in the metadata of every sample, got keys \['num_turns'"):
        loop(images)
    with pytest.raises(ValueError, match="needs `references`, and has none"):
        asyncio.run(compute_score(solution_image=images[0], reward="ssim"))


@omni("reader", "configuration")
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_unscored_images() -> None:
    """One NaN makes every advantage NaN; ours stops, which a sum turns into 0 unless the reward is required."""
    images = [*pixels(3), pixels(1, side=8)[0]]

    def naive(**call):
        return {"score": iqareward.load("piqe")(call["solution_image"][None] / 255).item()}

    loop = one("piqe")
    loop.manager.function = naive
    assert double.flow_grpo_advantages(loop(images, n=2), 3).isnan().all()
    with pytest.raises(ValueError, match=r"piqe could not score images \[0\] of 1"):
        one("piqe")(images)
    failed = several(quality={"reward": "piqe"})(images[3:])
    assert scores(failed) == 0.0  # the best piqe there is
    assert double.logged(failed)["critic/reward/quality/errors/mean"] == 1
    with pytest.raises(RuntimeError, match="'quality' failed: piqe could not score"):
        several(quality={"reward": "piqe", "required": True})(images)
    batch = several(quality={"reward": "piqe", "required": True, "on_nan": -100.0})(images, n=2)
    assert scores(batch)[3] == -100.0
    advantages = double.flow_grpo_advantages(batch, 3)
    assert advantages.isfinite().all()
    assert (advantages[3] < 0).all()
    with pytest.raises(ValueError, match="expected on_nan 'raise' or a finite number, got 'mean'"):
        asyncio.run(compute_score(solution_image=images[0], reward="piqe", on_nan="mean"))


@omni("caller")
def test_what_is_no_image() -> None:
    """Latents and videos are refused with what to set."""
    with pytest.raises(ValueError, match=r"one uint8 image \[3, H, W\], got torch.float32 \[16, 8, 8\]"):
        asyncio.run(compute_score(solution_image=torch.zeros(16, 8, 8), reward="piqe"))
    with pytest.raises(ValueError, match=r"got torch.uint8 \[5, 3, 32, 32\]"):
        one("piqe")([pixels(5)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a process without a GPU")
@omni("configuration")
def test_hidden_gpu() -> None:
    """A reward that was promised a GPU does not end on the CPU; the error says how workers get one."""
    for settings in ("reward.accelerator_workers.enabled=true", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=0"):
        with pytest.raises(RuntimeError, match=settings):
            asyncio.run(compute_score(solution_image=pixels(1)[0], reward="piqe", device="cuda"))
    assert asyncio.run(compute_score(solution_image=pixels(1)[0], reward="piqe", device="cpu"))["score"] < 0


@omni("configuration", "caller", "reader")
def test_page_for_one_reward() -> None:
    """The file and the command line give the same scores, and the log names the reward."""
    image = pixels(1, side=96)
    expected = iqareward.load("0.7*haarpsi + 0.3*ssim")(image / 255, references=image / 255).item()
    for reward in (settings(0), arguments(0)):
        log = double.logged(double.RewardLoop(reward)(image, [{"gt_path": image[0]}]))
        assert log["critic/0.7*haarpsi + 0.3*ssim/mean"] == pytest.approx(expected, abs=1e-4)
        assert log["critic/rewards/mean"] == pytest.approx(expected, abs=1e-4)


@omni("configuration", "caller", "reader")
def test_reference_page(qalign: Reward) -> None:
    """Its configuration gives the sum, under its name."""
    (block,) = (block for block in blocks("reference/adapters.md", "yaml") if "adapters.verl" in block)
    image = pixels(1, side=48)
    loop = double.RewardLoop(double.merged(double.OMNI, yaml.safe_load(block)["reward"]))
    log = double.logged(loop(image, [{"gt_path": image[0]}]))
    expected = 0.7 * qalign(image / 255).item() + 0.3
    assert log["critic/0.7*qalign + 0.3*ssim/mean"] == log["critic/rewards/mean"] == pytest.approx(expected, abs=1e-4)


@omni("configuration", "caller", "reader")
def test_page_for_several_rewards() -> None:
    """The weighted sum arrives, and each reward has its curve and no error."""
    image, clean = pixels(1, side=96), pixels(1, side=96, seed=1)
    piqe = iqareward.load("piqe")(image / 255).item()
    ssim = iqareward.load("ssim")(image / 255, references=clean / 255).item()
    log = double.logged(double.RewardLoop(settings(1))(image, [{"gt_path": clean[0]}]))
    assert log["critic/reward/quality/mean"] == pytest.approx(piqe, abs=1e-3)
    assert log["critic/reward/fidelity/mean"] == pytest.approx(ssim, abs=1e-4)
    assert log["critic/rewards/mean"] == pytest.approx(piqe + 0.5 * ssim, abs=1e-3)
    log = double.logged(double.RewardLoop(arguments(1))(image))
    assert log["critic/rewards/mean"] == log["critic/reward/quality/mean"] == pytest.approx(piqe, abs=1e-3)
    assert not any("errors" in name for name in log)


@omni("configuration")
def test_functions_without_their_manager_are_ignored() -> None:
    """With verl-omni's defaults something else is the reward; with the page's, even beside a reward model, ours is."""
    functions = {"quality": {"path": PATH, "name": "compute_score", "reward": "piqe"}}
    image = pixels(1, side=48)
    with pytest.raises(NotImplementedError, match="Reward function is not implemented for data_source='photos'"):
        double.RewardLoop(double.merged(double.OMNI, {"reward_functions": functions}))(image)
    model = {"reward_model": {"enable": True}}
    with pytest.raises(ValueError, match=r"requires reward.custom_reward_function.path"):
        double.RewardLoop(double.merged(double.OMNI, model))
    without_plus = [argument.removeprefix("+") for argument in words(1)]
    with pytest.raises(KeyError, match="Could not override"):
        double.command_line(double.OMNI, without_plus)
    for block in (0, 1):
        double.RewardLoop(double.merged(settings(block), model))


@omni("configuration", "processes")
def test_page_for_gpus() -> None:
    """Each worker gets a GPU of its own, which verl-omni refuses for more workers or beside a reward model."""
    workers = yaml.safe_load(blocks(PAGE, "yaml")[2])["reward"]
    assert workers.keys() <= double.OMNI.keys()
    assert double.RewardLoop(settings(0)).gpus == [[]] * 8
    assert double.RewardLoop(double.merged(settings(0), workers), num_gpus=4).gpus == [[0], [1], [2], [3]]
    with pytest.raises(ValueError, match="exceeds accelerator pool size"):
        double.RewardLoop(double.merged(settings(0), workers), num_gpus=2)
    with pytest.raises(ValueError, match="cannot be combined"):
        double.RewardLoop(double.merged(settings(0), workers | {"reward_model": {"enable": True}}))


def settings(block: int) -> dict:
    """A YAML block of the page in the trainer's configuration."""
    return double.merged(double.OMNI, yaml.safe_load(blocks(PAGE, "yaml")[block])["reward"])


def words(block: int) -> list[str]:
    return shlex.split(blocks(PAGE, "bash")[block].replace("\\\n", " "))[3:]


def arguments(block: int) -> dict:
    """The configuration that a command line of the page makes."""
    return double.command_line(double.OMNI, words(block))


PLANS = ["denoise", "nonsense", "denoise, then denoise"]


def plans(folder: Path, code: str, manager: str = "naive") -> double.RewardLoop:
    """verl with a file of the user's, which each of its workers loads by its path."""
    (folder / "plan_reward.py").write_text(code)
    (text_of_page,) = (block for block in blocks(PAGE, "yaml") if "plan_reward" in block)
    reward = double.merged(double.VERL, yaml.safe_load(text_of_page)["reward"])
    reward["custom_reward_function"]["path"] = str(folder / "plan_reward.py")
    reward["reward_manager"]["name"] = manager
    return double.RewardLoop(reward)


@text("configuration", "caller", "reader", "async", "processes")
@pytest.mark.parametrize("manager", ["naive", "dapo", "gdpo"])
def test_text_that_leads_to_images(manager: str, tmp_path) -> None:
    """The page's file scores completions, one that leads to no image earns what is said, and validation names it."""
    images = pixels(3)
    infos = [{"degraded": Image.fromarray(each.movedim(0, -1).numpy()), "clean": 255 - each} for each in images]
    batch = plans(tmp_path, blocks(PAGE)[0], manager)(PLANS, infos)
    expected = iqareward.load("ssim")(images / 255, references=1 - images / 255)
    torch.testing.assert_close(scores(batch)[[0, 2]], expected[[0, 2]], **NETWORK_BATCH)
    assert scores(batch)[1] == -1.0
    assert double.validated(batch)["val-aux/photos/ssim/mean@1"] == pytest.approx(scores(batch).mean().item())


@text("caller")
def test_decode() -> None:
    """It may be async; without it, and with two images, the error says what to do."""
    image = pixels(1)[0]

    async def tool(solution_str, extra_info):
        await asyncio.sleep(0)
        return image if solution_str == "keep" else None

    call = {"reward": "ssim", "references": "clean", "extra_info": {"clean": image}, "no_image": -1.0}
    assert asyncio.run(compute_score(solution_str="keep", decode=tool, **call))["score"] == 1.0
    assert asyncio.run(compute_score(solution_str="", decode=tool, **call))["score"] == -1.0
    with pytest.raises(ValueError, match=r"expected `decode`, because verl passes a completion"):
        asyncio.run(compute_score(solution_str="keep", **call))
    with pytest.raises(ValueError, match="expected one image from `decode`, or None, got 2"):
        asyncio.run(compute_score(solution_str="", decode=lambda *_: pixels(2), **call))
    with pytest.raises(ValueError, match=r"piqe could not score images \[0\] of 1"):
        asyncio.run(compute_score(solution_str="", decode=tool, reward="piqe"))


@text("configuration", "reader")
def test_managers_that_do_not_work(tmp_path) -> None:
    """The batch manager is gone, and a limited rate turns an error into the reward 0."""
    with pytest.raises(ValueError, match="Unknown reward manager: batch"):
        plans(tmp_path, blocks(PAGE)[0], "batch")
    broken = textwrap.dedent("""
        from iqareward.adapters import verl

        async def compute_score(**call):
            return await verl.compute_score(**call, decode=lambda *_: None, reward="piqe")
    """)
    assert scores(plans(tmp_path, broken, "rate_limited")(["a"])).tolist() == [0.0]
    with pytest.raises(ValueError, match="piqe could not score"):
        plans(tmp_path, broken)(["a"])


@text("reader")
def test_gdpo_gets_numbers_only(tmp_path) -> None:
    """One NaN makes all of GDPO's advantages NaN; with `no_image` and `on_nan` ours are all finite."""
    images = pixels(4)
    infos = [{"degraded": each, "clean": images[0]} for each in images]
    batch = plans(tmp_path, blocks(PAGE)[0], "gdpo")(["denoise", "denoise", "denoise", "none"], infos, n=2)
    advantages = double.gdpo_advantages(batch, ["ssim"])
    assert advantages.isfinite().all()
    assert advantages.argmin() == 3 or advantages[3] < 0
    batch.non_tensor_batch["ssim"][3] = float("nan")
    assert double.gdpo_advantages(batch, ["ssim"]).isnan().all()


def roughness(images: Tensor) -> Tensor:
    """A judge that noise deceives."""
    return (images[..., 1:] - images[..., :-1]).abs().mean(dim=(1, 2, 3))


STRENGTHS = [[0.0, 0.02], [0.1, 0.3], [0.2, 0.5]]  # of the noise in two rollouts of each of three inputs


def rollouts() -> SimpleNamespace:
    """A scored batch of verl-omni: quality is trained on, and fidelity only measured."""
    clean = pixels(3, side=6, seed=3).repeat_interleave(8, -1).repeat_interleave(8, -2)
    images = torch.cat([noisy(each, strengths) for each, strengths in zip(clean, STRENGTHS)])
    (entry,) = yaml.safe_load(blocks(ADAPTIVE, "yaml")[-1])["reward"]["reward_functions"].items()
    quality = NoReference(roughness, higher_is_better=True)
    loop = several(quality={"reward": quality, "required": True}, **dict([entry]))
    return loop(images, [{"gt_path": each} for each in clean.repeat_interleave(2, 0)], n=2)


def recipe(monkeypatch, trainers, replace: bool = False) -> dict:
    """The page's module, run beside verl-omni's trainers."""
    package(monkeypatch, verl_omni__trainer__diffusion__ray_diffusion_trainer=trainers)
    code, mixed = (block for block in blocks(ADAPTIVE) if "verl_omni" in block or "mixed =" in block)
    if replace:
        lines = code.splitlines(keepends=True)
        (place,) = (row for row, line in enumerate(lines) if 'columns["rollout_is_weights"] =' in line)
        lines[place] = textwrap.indent(mixed, " " * 12)
        code = "".join(lines)
    scope: dict = {}
    execute(code, scope)
    return scope


def expected_weights(batch: SimpleNamespace):
    """From the definition: by the mean distance of each input's rollouts."""
    distance = 1 - torch.as_tensor(batch.non_tensor_batch["reward/fidelity"]).view(3, 2)
    return AdaptiveWeighter(mode="convex", calibrate_on_first=True)(distance.mean(1).repeat_interleave(2))


@omni("reader", "weights", "gradients")
@pytest.mark.parametrize("loss_mode", ["flow_grpo", "flow_dppo", "grpo_guard"])
@pytest.mark.parametrize("corrected", [False, True])
def test_weights_reach_each_rows_gradient(loss_mode: str, corrected: bool, monkeypatch) -> None:
    """Each row's gradient is the unweighted one times its RL weight, and times that of rollout correction."""
    correction = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)) if corrected else None
    trainers = double.trainers(loss_mode, correction)
    plain, batch = trainers.PolicyGradientRayTrainer().fit_step(rollouts()), rollouts()
    weights = expected_weights(batch)
    recipe(monkeypatch, trainers)
    weighted = trainers.PolicyGradientRayTrainer().fit_step(batch)
    torch.testing.assert_close(weighted, weights.rl[:, None] * plain, **FORMULA_FP32)
    assert plain.abs().min() > 0
    assert weights.rl.unique().numel() == 3


@omni("reader", "weights", "gradients")
def test_weights_reach_diffusion_nft(monkeypatch) -> None:
    """Its r of each row and step is the probability of optimality with the RL weight."""
    trainers, batch = double.trainers("diffusion_nft"), rollouts()
    recipe(monkeypatch, trainers)
    gradient = trainers.DirectPreferenceRayTrainer().fit_step(batch)
    advantages = double.flow_grpo_advantages(batch, 3)[:, 0]
    r = optimality_probability(advantages, expected_weights(batch))[:, None].expand(-1, 3)
    torch.testing.assert_close(batch.batch["reward_prob"], r, **FORMULA_FP32)
    # for a prediction of 0, an old one of 0.5, xt = 1 and x0 = 0: positive part 0.75, negative part 0.25
    torch.testing.assert_close(gradient, (0.25 * (1 - r) - 0.75 * r) / 6, **FORMULA_FP32)


@omni("reader", "weights", "gradients")
def test_sft_weight_on_the_advantage_of_fidelity(monkeypatch) -> None:
    """Easy inputs learn fidelity, hard ones quality, by the weights of their rows."""
    trainers, batch = double.trainers(), rollouts()
    quality = double.flow_grpo_advantages(batch, 1)[:, 0]
    fidelity = group_advantages(
        torch.as_tensor(batch.non_tensor_batch["reward/fidelity"]), torch.arange(3).repeat_interleave(2)
    )
    expected = mixed_advantages(quality, fidelity.values, expected_weights(batch))
    recipe(monkeypatch, trainers, replace=True)
    gradient = trainers.PolicyGradientRayTrainer().fit_step(batch)
    torch.testing.assert_close(gradient, (-expected[:, None] / 6).expand(-1, 3).to(gradient.dtype), **FORMULA_FP32)
    assert (expected - quality).abs().max() > 0.2


@omni("reader", "weights")
def test_a_weight_without_steps_is_refused() -> None:
    """The engine takes a column per step, so weights `[B]` stop it, and it never guesses."""
    trainer, batch = double.trainers().PolicyGradientRayTrainer(), rollouts()
    batch.batch |= {"old_log_probs": torch.zeros(6, 3), "advantages": torch.ones(6, 3)}
    batch.batch["rollout_is_weights"] = torch.ones(6)
    with pytest.raises(IndexError):
        trainer._update_actor(batch)
    batch.batch["rollout_is_weights"] = torch.ones(6)[:, None].expand(-1, 3)
    torch.testing.assert_close(trainer._update_actor(batch), torch.full((6, 3), -1 / 6), **EXACT)
