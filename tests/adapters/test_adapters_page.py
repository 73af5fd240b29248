"""What the pages on adapters and on TRL tell a reader to write, run against doubles or the frameworks themselves."""

import asyncio
import functools
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from torch import nn

import iqareward
from iqareward.adapters import flow_factory, unirl, unirl_service
from iqareward.types import Reward
from tests.adapters.doubles import cosmos, flow_grpo, gradient_loops, miles, reward_models, verl
from tests.adapters.doubles import flow_factory as flow_factory_double
from tests.adapters.doubles import unirl as unirl_double
from tests.adapters.doubles.pages import DOCS, blocks, execute, package
from tests.adapters.restoration_agent import as_pil
from tests.adapters.test_scorers import CONTRAST, LooksLike
from tests.diffusion.tiny import images as smooth
from tests.tolerances import EXACT, NETWORK_BATCH

PAGE = "reference/adapters.md"
IMAGES = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
PICTURES = [as_pil(image) for image in IMAGES]
STORED = (255 * IMAGES).round() / 255


def sections() -> dict[str, str]:
    """Heading -> text of each section of the page."""
    parts = re.split(r"^## (.+)$", (DOCS / PAGE).read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def code(heading: str, language: str = "python") -> list[str]:
    """The blocks of one section."""
    return re.findall(rf"^```{language}\n(.*?)^```$", sections()[heading], re.M | re.S)


def run(heading: str, scope: dict | None = None) -> dict:
    """The names that a section's Python defines."""
    scope = {} if scope is None else scope
    for block in code(heading):
        execute(block, scope)
    return scope


def settings(heading: str) -> dict:
    """The YAML of a section."""
    (text,) = code(heading, "yaml")
    return yaml.safe_load(text)


def test_every_section_is_run() -> None:
    """Each section has code, each has a test here, and each is in the table."""
    tested = set(re.findall(r'(?:run|settings)\("([^"]+)"', Path(__file__).read_text()))
    assert tested == set(sections())
    table = (DOCS / PAGE).read_text().split("## ")[0]
    anchors = {re.sub(r"[^\w-]", "", heading.lower().replace(" ", "-")) for heading in sections()}
    assert set(re.findall(r"\(#([\w-]+)\)", table)) == anchors


def test_flow_grpo(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """`install` in a script like flow_grpo's, and the functions of its children."""
    module = flow_grpo.rewards_module()
    package(monkeypatch, flow_grpo__rewards=module)
    scope = run("flow_grpo and its children")
    metadata = [{"gt_path": IMAGES[row], "input_id": row} for row in range(2)]
    gathered = flow_grpo.sampling_phase(module.multi_score("cpu", {}), [(IMAGES, ["", ""], metadata)])
    assert set(gathered) == {"qalign", "ssim", "groups", "avg"}
    assert scope["ddpo"](IMAGES, ("", ""), ({}, {}))[0] == pytest.approx(qalign(IMAGES).numpy())
    assert scope["edit"](list(IMAGES), IMAGES, ["", ""], [{}, {}])[0] == pytest.approx(1)
    batch = {"gt_images": 2 * IMAGES - 1}
    assert scope["bfr"](2 * IMAGES - 1, ["", ""], batch, only_strict=True)[0] == pytest.approx(1)


def test_flow_factory(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """The entry builds one of its own reward models, which scores."""
    package(monkeypatch, flow_factory__rewards=flow_factory_double.rewards_module())
    flow_factory._pointwise.cache_clear()
    (entry,) = settings("Flow-Factory")["rewards"]
    built = flow_factory_double.build(flow_factory_double.RewardArguments.from_dict({**entry, "device": "cpu"}))
    samples = flow_factory_double.samples(IMAGES, [0, 0], IMAGES)
    rewards = flow_factory_double.RewardProcessor({"quality": built}).compute_rewards(samples)
    flow_factory._pointwise.cache_clear()
    torch.testing.assert_close(rewards["quality"], 0.7 * qalign(IMAGES) + 0.3, **NETWORK_BATCH)


def test_verl(qalign: Reward) -> None:
    """The configuration's function scores one image per call."""
    manager = verl.MultiVisualRewardManager(settings("verl-omni and verl")["reward"]["reward_functions"])
    pixels = (255 * IMAGES).round().byte()
    scores = verl.rm_scores(asyncio.run(verl.reward_worker(manager, pixels)))[:, 0]
    torch.testing.assert_close(scores, qalign(STORED), **NETWORK_BATCH)


def test_unirl(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """The targets build a backend that scores, and the scorer is registered with the service."""
    made = (unirl._spec, unirl._backend, unirl_service._scorer)
    service = unirl_double.Service()
    package(monkeypatch, **unirl_double.modules(new=True), **service.modules())
    for one in made:
        one.cache_clear()
    entry = settings("UniRL")["reward"]["backend"]
    config = dict(entry["config"])
    backend, spec = (getattr(unirl, part.pop("_target_").rsplit(".", 1)[1]) for part in (entry, config))
    built = backend(base_device=entry["base_device"], config=spec(**config))
    request = unirl_double.request(IMAGES, ["a"] * 2, None, None, new=True)
    rewards = unirl_double.score_and_attach(built, request)
    torch.testing.assert_close(torch.tensor(rewards), qalign(IMAGES), **NETWORK_BATCH)
    run("UniRL")
    items = [unirl_double.ScoreItem([("a", picture)]) for picture in PICTURES]
    scores = [row["score"] for row in service.score("iqareward", {"reward": "qalign"}, items)]
    torch.testing.assert_close(torch.tensor(scores), qalign(STORED), **NETWORK_BATCH)
    for one in made:
        one.cache_clear()


def test_miles(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """The module of the page scores and post-processes a rollout."""
    module = ModuleType("my_module")
    monkeypatch.setitem(sys.modules, "my_module", module)
    run("miles_diffusion", vars(module))
    samples = [
        miles.Sample(group_index=0, generated_output=image[:, None], metadata={"gt_path": image}) for image in IMAGES
    ]
    asyncio.run(miles.rollout("my_module.custom_rm", samples))
    raw, rewards = miles.post_process("my_module.post_process", samples, 2)
    assert raw == pytest.approx(qalign(IMAGES).tolist(), rel=1e-4)
    assert len(rewards) == 2


def test_cosmos(qalign: Reward) -> None:
    """The list is what the launcher takes."""
    reward_fns = run("cosmos-rl")["reward_fns"]
    assert cosmos.compute_rewards(reward_fns, IMAGES[0]) == pytest.approx(qalign(IMAGES[:1]).item())


def test_models_of_loops_without_a_hook(tmp_path: Path, qalign: Reward) -> None:
    """imscore, DanceGRPO, MixGRPO and SRPO get what they call."""
    assert run("imscore")["scores"].shape == (2,)
    model = run("DanceGRPO")["reward_model"]
    advantages = reward_models.dancegrpo_advantages(model, PICTURES, ["", ""], tmp_path, generations=2, device="cpu")
    assert torch.equal(advantages.sign(), (qalign(STORED) - qalign(STORED).mean()).sign())
    models = run("MixGRPO")["reward_models"]
    merged, good, _ = reward_models.mixgrpo_rewards(PICTURES, ["", ""], models, {"PickScoreRewardModel": 1.0})
    assert (merged, good) == (pytest.approx(qalign(STORED).tolist(), rel=1e-4), [1, 1])
    srpo = run("SRPO", {"text_conditioned_reward": LooksLike()})["reward_model"]
    losses = reward_models.srpo_losses(srpo, IMAGES[:1], "bright photo", "photo", k=0.1)
    assert all(loss.isfinite() for loss in losses)


def test_losses() -> None:
    """The three trainers run with what the page assigns, and the weights reach the loss."""
    pixels = nn.Parameter(IMAGES[:, :, :32, :32].clamp(0.1, 0.9).logit())
    scope = {
        "alignprop_trainer": gradient_loops.AlignPropTrainer("aesthetic", pixels),
        "reno_trainer": gradient_loops.LatentNoiseTrainer([], iterations=2),
        "reward": CONTRAST,
        "weighter": iqareward.AdaptiveWeighter(mode="convex", calibrate_on_first=True),
    }
    scope = run("AlignProp, VADER, ReNO", scope)
    _, rewards = scope["alignprop_trainer"].step(["", ""])
    torch.testing.assert_close(rewards, CONTRAST(pixels.detach().sigmoid()), **EXACT)
    frames = (2 * IMAGES - 1).requires_grad_()
    vader = iqareward.adapters.reward_losses.vader_loss(CONTRAST)  # the page's name is taken by a later block
    gradient_loops.vader_step(vader, frames, ["", ""], reward="aesthetic")
    assert frames.grad is not None
    logs = scope["reno_trainer"].train(nn.Parameter(2 * IMAGES[:1, :, :32, :32] - 1), "a cat")
    assert logs[1]["contrast"] < logs[0]["contrast"]
    assert scope["loss"].requires_grad
    torch.testing.assert_close(scope["loss"].detach(), -scope["weights"].rl * scope["rewards"], **EXACT)


def test_diffusers(capsys: pytest.CaptureFixture[str], qalign: Reward) -> None:
    """Both blocks work with a real pipeline."""
    diffusers = pytest.importorskip("diffusers")
    from tests.adapters.tiny_pipelines import img2img, prompt

    call = {"strength": 0.9, "num_inference_steps": 3, "guidance_scale": 1.0}
    scope = {
        "pipeline": img2img(diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)),
        "degraded": smooth(2), "truth": smooth(2, seed=1), "arguments": call, "inputs": prompt(2),
    }  # fmt: skip
    run("diffusers", scope)
    assert scope["steps"].scores.isfinite().tolist() == [[True, True]] * 2
    assert scope["best"].scores.shape == (2, 8)
    assert "tensor" in capsys.readouterr().out


# TRL 1.16 uses names that transformers 5.23 has renamed
@pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6:FutureWarning")
def test_trl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """The page's trainer is built, and the how-to page trains, plain and adaptively."""
    trl = pytest.importorskip("trl")
    from tests.adapters.restoration_agent import build

    scope: dict = {}
    for block in blocks("how-to/trl.md"):
        execute(block, scope)
    logs = [record for record in scope["trainer"].state.log_history if "reward" in record]
    assert len(logs) == 2
    assert all(0 <= record["adaptive/rl_share"] <= 1 for record in logs)
    assert {"restored/no_image", "restored/unscored", "restored/ssim", "restored/haarpsi"} <= set(logs[0])
    assert scope["beside"].__name__ == "restored"
    other = build(trl.GRPOTrainer, tmp_path, [scope["reward"]])
    names = {"model": other.model, "args": other.args, "dataset": other.train_dataset}
    # the page leaves the tokenizer to TRL, which would load it by the model's name
    offline = functools.partial(trl.GRPOTrainer, processing_class=other.processing_class)
    monkeypatch.setattr(trl, "GRPOTrainer", offline)
    assert run("TRL", names)["trainer"].reward_func_names == ["qalign"]
