"""What the pages on adapters and on TRL tell a reader to write, run against mocks or the trainers themselves."""

import functools
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from PIL import Image
from torch import nn

import iqareward
from benchmarks import adapters
from examples.adapters.mixgrpo import PickScoreRewardModel
from iqareward import AdaptiveWeighter, to_images
from iqareward.adapters import unirl
from iqareward.types import Reward
from tests.adapters.doubles import flow_grpo, gradient_loops, reward_models
from tests.adapters.doubles import unirl as unirl_double
from tests.adapters.doubles.pages import DOCS, blocks, execute, package
from tests.adapters.restoration_agent import as_pil
from tests.adapters.test_reward_models import CONTRAST, hpsv2
from tests.diffusion.tiny import images as smooth
from tests.tolerances import EXACT, HALF_NETWORK, NETWORK_BATCH

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


def test_flow_grpo(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """`install` in a script like flow_grpo's."""
    module = flow_grpo.rewards_module()
    package(monkeypatch, flow_grpo__rewards=module)
    run("flow_grpo and its forks")
    metadata = [{"gt_path": IMAGES[row], "input_id": row} for row in range(2)]
    gathered = flow_grpo.sampling_phase(module.multi_score("cpu", {}), [(IMAGES, ["", ""], metadata)])
    assert set(gathered) == {"qalign", "ssim", "groups", "avg"}


def test_unirl(monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """The targets build a backend that scores, in UniRL's process or behind its reward service."""
    service = unirl_double.Service()
    package(monkeypatch, **unirl_double.modules(new=True), **service.modules())
    local, served, remote = (yaml.safe_load(text) for text in code("UniRL", "yaml"))
    request = unirl_double.request(IMAGES, ["a"] * 2, None, None, new=True)
    entry = local["reward"]["backend"]
    config = dict(entry["config"])
    backend, spec = (getattr(unirl, part.pop("_target_").rsplit(".", 1)[1]) for part in (entry, config))
    built = backend(base_device=entry["base_device"], config=spec(**config))
    assert f"backend={built.get_model_name()}`" in sections()["UniRL"]
    scores = unirl_double.score_and_attach(built, request, new=True)
    torch.testing.assert_close(scores, qalign(IMAGES), **NETWORK_BATCH)
    run("UniRL")  # registers the scorer
    (entry,), config = served["rewards"], remote["reward"]["backend"]["config"]
    assert config["required_rewards"] == [entry["name"]]
    client = service.backend(entry["scorer"], entry["params"], config["image_format"])
    scores = unirl_double.score_and_attach(client, request, new=True)
    torch.testing.assert_close(scores, qalign(STORED), **NETWORK_BATCH)


def test_models_of_loops_without_a_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qalign: Reward) -> None:
    """DanceGRPO, AlignProp and VADER learn from what the page tells them to write, weights included."""
    theirs = gradient_loops.alignprop_module()
    package(monkeypatch, alignprop_trainer=theirs)
    samples = {"rewards": torch.tensor([0.5, 0.7, 0.8, 0.9]), "advantages": torch.tensor([-1.0, 1.0, -1.0, 1.0])}
    scope = {
        "device": "cpu", "Image": Image, "decoded_video": [IMAGES.movedim(1, -1).numpy()], "reward": CONTRAST,
        "samples": samples, "args": SimpleNamespace(num_generations=2), "accelerator": SimpleNamespace(device="cpu"),
        "weighter": AdaptiveWeighter(mode="convex", calibrate_on_first=True),
    }  # fmt: skip
    slots = []
    for block in code("imscore, DanceGRPO, AlignProp, VADER"):
        execute(block, scope)
        slots += [SimpleNamespace(**scope)] if "reward_model =" in block else []
    del slots[1].processor  # the script has either block
    for slot in slots:
        rewards, _ = reward_models.dancegrpo("flux", slot, IMAGES, ["", ""], tmp_path)
        torch.testing.assert_close(rewards, qalign(STORED), **NETWORK_BATCH)
    torch.testing.assert_close(to_images(scope["image_path"])[0], STORED[0], **EXACT)
    easier, harder = samples["advantages"].abs()[[3, 1]]
    assert easier < harder

    pixels = nn.Parameter(IMAGES[:, :, :32, :32].clamp(0.1, 0.9).logit())
    logs = theirs.AlignPropTrainer(pixels, "aesthetic").step(["", ""])
    assert logs["loss"] == pytest.approx(-0.01 * logs["reward_mean"])
    frames = nn.Parameter(2 * IMAGES - 1)
    logs = gradient_loops.vader_step(scope["loss_fn"], frames, ["", ""], reward_fn="aesthetic")
    assert logs["step_loss"] == -logs["step_reward"]
    theirs.aesthetic_loss_fn = lambda **options: scope["weighted_loss"]
    logs = theirs.AlignPropTrainer(nn.Parameter(IMAGES.logit(1e-3)), "aesthetic", loss_coeff=1.0).step(["", ""])
    weighted = -(scope["weights"].rl * IMAGES.mean((1, 2, 3))).mean().item()
    assert logs["loss"] == pytest.approx(weighted, rel=1e-3)
    logs = gradient_loops.vader_step(scope["weighted_vader_loss"], frames, ["", ""], reward_fn="aesthetic")
    assert logs["step_loss"] == pytest.approx(weighted, rel=HALF_NETWORK["rtol"])


@pytest.mark.parametrize("loop", ["flux", "sd", "advantage_aggr", "reward_aggr"])
def test_weights_in_loops_without_a_hook(tmp_path: Path, loop: str) -> None:
    """The page's weights reach the gradients of DanceGRPO's scripts and of MixGRPO's two modes, under their names."""
    (block,) = (text for text in code("imscore, DanceGRPO, AlignProp, VADER") if "pass_rate" in text)
    of_ours = 'samples["rewards"]["PickScoreRewardModel"]'
    names = {
        "sd": {"args.num": "config.num", 'samples["advantages"]': 'samples["final_advantages"]'},
        "advantage_aggr": {'samples["rewards"]': of_ours},
    }
    for old, new in names.get(loop, {}).items():
        block = block.replace(old, new)
    images = torch.linspace(0, 1, 96).expand(4, 3, 96, 96) * torch.tensor([0.5, 0.6, 0.9, 1.0]).view(-1, 1, 1, 1)

    def weigh(samples: dict) -> None:
        scope = {
            "samples": samples, "config" if loop == "sd" else "args": SimpleNamespace(num_generations=2),
            "torch": torch, "weighter": AdaptiveWeighter(mode="convex", calibrate_on_first=True),
        }  # fmt: skip
        execute(block.replace("threshold=0.6", "threshold=0.2"), scope)

    def gradient(**options) -> torch.Tensor:
        if loop in ("flux", "sd"):
            return reward_models.dancegrpo(loop, hpsv2(CONTRAST), images, [""] * 4, tmp_path, **options)[1]
        models, pictures = [PickScoreRewardModel(CONTRAST, device="cpu")], [as_pil(image) for image in images]
        return reward_models.mixgrpo(models, {}, pictures, [""] * 4, generations=2, mix=loop, **options)[1]

    shares = gradient(weigh=weigh) / gradient()
    torch.testing.assert_close(shares[::2], shares[1::2], **HALF_NETWORK)  # both images of a prompt
    assert shares[0] > shares[2] + 0.3
    assert shares[2] > 0


def test_diffusers(capsys: pytest.CaptureFixture[str], qalign: Reward) -> None:
    """Both blocks work with a real pipeline."""
    diffusers = pytest.importorskip("diffusers")
    from tests.adapters.tiny_pipelines import img2img, prompt

    call = {"strength": 0.9, "num_inference_steps": 3, "guidance_scale": 1.0}
    scope = {
        "pipeline": img2img(diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)),
        "degraded": smooth(2), "references": smooth(2, seed=1), "arguments": call, "inputs": prompt(2),
    }  # fmt: skip
    run("diffusers", scope)
    assert scope["steps"].scores.shape == (2, 2)
    last = iqareward.load("psnr")(scope["restored"], references=scope["references"])
    torch.testing.assert_close(scope["steps"].scores[-1], last, **NETWORK_BATCH)
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
    assert {"restored/no_image", "restored/unscored"} <= set(logs[0])
    for block in blocks("how-to/adaptive-in-your-trainer.md", section="TRL"):
        execute(block, scope)
    logs = [record for record in scope["trainer"].state.log_history if "reward" in record]
    assert all(0 < record["adaptive/sft_share"] <= 1 for record in logs)
    assert scope["beside"].__name__ == "restored"
    other = build(trl.GRPOTrainer, tmp_path, [scope["reward"]])
    names = {"model": other.model, "args": other.args, "dataset": other.train_dataset}
    # the page leaves the tokenizer to TRL, which would load it by the model's name
    offline = functools.partial(trl.GRPOTrainer, processing_class=other.processing_class)
    monkeypatch.setattr(trl, "GRPOTrainer", offline)
    assert run("TRL", names)["trainer"].reward_func_names == ["qalign"]


def test_the_page_lists_what_the_tests_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of trainers has a row for each that a test is marked with, and no other."""
    monkeypatch.setattr(sys, "argv", ["adapters", "--check"])
    with pytest.raises(SystemExit) as end:
        adapters.main()  # in this process, which has imported the tests
    assert end.value.code == 0
