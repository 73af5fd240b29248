"""`iqareward train` on every kind of policy that the how-to shows, with tiny random models in place of the Hub's."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner

pytest.importorskip("diffusers", reason="training needs the extra diffusers")
pytest.importorskip("peft", reason="adapters need the extra diffusers")

import diffusers
import peft
import safetensors.torch

from examples.policies.nafnet import Residual
from iqareward.cli import app
from iqareward.cli.train_policies import save_policy
from iqareward.diffusion import OneStepPolicy, synthetic_images
from iqareward.diffusion.checkpoint import load_state
from tests.diffusion.policies import flow_pipelines as flow
from tests.diffusion.policies import kinds
from tests.diffusion.policies import sd_pipelines as sd
from tests.tolerances import EXACT

ROOT = Path(__file__).parents[1]
HOW_TO = (ROOT / "docs/how-to/own-policy.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```toml\n(.*?)```", HOW_TO, re.DOTALL)
BASE = """
output = "run"
updates = {updates}
data.source = "photos"
data.size = 32
rollout = {{ group_size = 2, num_steps = 2 }}
validation.images = 1
validation.rewards = ["psnr"]
validation.num_steps = {steps}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three photographs, in a folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number, image in enumerate(synthetic_images(range(3), size=32)):
        Image.fromarray((image * 255).round().byte().movedim(0, -1).numpy()).save(f"photos/{number}.png")
    return tmp_path


def saved(pipeline: diffusers.DiffusionPipeline, monkeypatch: pytest.MonkeyPatch, *, words: bool = False) -> None:
    """In the folder `pipeline`; with `words`, prompts are encoded as by this one, which has no text encoder."""
    pipeline.save_pretrained("pipeline")
    if words:
        missing = {name: None for name, part in pipeline.components.items() if part is None}
        load, encode, kind = type(pipeline).from_pretrained, pipeline.encode_prompt, type(pipeline)
        monkeypatch.setattr(kind, "from_pretrained", lambda *given, **named: load(*given, **missing, **named))
        monkeypatch.setattr(kind, "encode_prompt", lambda _, *given, **named: encode(*given, **named))


def networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ResShift."""
    kinds.pixel_unet().save_pretrained("pipeline/unet")
    kinds.vq_autoencoder().save_pretrained("pipeline/vqvae")


def weights(network: nn.Module, file: str) -> None:
    torch.save(network.state_dict(), file)


def controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = sd.text_to_image()
    pipeline.save_pretrained("pipeline")
    sd.controlnet().save_pretrained("controlnet")


def sd3_controlled(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = flow.sd3_controlnet()
    saved(pipeline, monkeypatch, words=True)
    pipeline.controlnet.save_pretrained("controlnet")


MODELS = {
    "ControlNetPolicy": controlled,
    "OneStepPolicy": lambda patch: saved(sd.text_to_image(), patch),
    "UpscalePolicy": lambda patch: saved(sd.upscaling(), patch),
    "SD3ControlNetPolicy": sd3_controlled,
    "FluxKontextPolicy": lambda patch: saved(flow.flux_kontext(), patch, words=True),
    "QwenImageEditPolicy": lambda patch: saved(flow.qwen_edit(), patch, words=True),
    "FeedForwardPolicy": lambda patch: weights(kinds.swinir(), "file"),
    "resshift.py:build": networks,
    "ir_sde.py:build": lambda patch: kinds.pixel_unet().save_pretrained("pipeline"),
    "nafnet.py:build": lambda patch: weights(flow.seeded(lambda: Residual(32)), "file"),
}


def train(block: str, updates: int, *options: str) -> str:
    """What the command says of the settings of a block, with local models."""
    name = re.findall(r'\[policy\]\nname = "(.*)"', block)[0]
    block = re.sub(r'^(pipeline|folder) = ".*"', r'\1 = "pipeline"', block, flags=re.MULTILINE)
    block = re.sub(r'^controlnet = ".*"', 'controlnet = "controlnet"', block, flags=re.MULTILINE)
    block = re.sub(r'^(path|weights) = ".*"', r'\1 = "file"', block, flags=re.MULTILINE)
    block = block.replace('name = "' + name, f'name = "{ROOT}/examples/policies/{name}') if ".py" in name else block
    steps = 15 if name.startswith("resshift") else 2
    base = BASE.format(updates=updates, steps=steps) + 'reward = "haarpsi"\n'
    block = block if "[train]" in block else block + "\n[train]\n"
    Path("train.toml").write_text(base + block.replace("[train]", "[train]\ninputs_per_update = 2"))
    result = CliRunner().invoke(app, ["train", "--config", "train.toml", *options])
    assert result.exit_code == 0, result.output
    return result.stderr


def trained() -> dict[str, torch.Tensor]:
    """The weights of the last checkpoint that trained."""
    return load_state(Path("run/checkpoint.pt"))["learner"]["model"]


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # SwinIR as it was published
@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: re.findall(r'name = "(.*)"', block)[0])
def test_each_kind_trains_resumes_and_is_written(block: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 40 lines of settings; a resumed run goes on; the files in `model` have the weights of the checkpoint."""
    assert len(block.splitlines()) <= 40
    MODELS[re.findall(r'\[policy\]\nname = "(.*)"', block)[0]](monkeypatch)
    train(block, 1)
    before = trained()
    said = train(block, 2, "--resume")
    assert len(Path("run/history.jsonl").read_text().splitlines()) == 3
    lines = [json.loads(line) for line in Path("run/history.jsonl").read_text().splitlines()]
    assert not any(line.get("skipped") for line in lines)
    assert any(not torch.equal(before[name], weight) for name, weight in trained().items())
    assert "run/model" in said
    files = sorted(Path("run/model").rglob("*.safetensors"))
    written = [weight for file in files for weight in safetensors.torch.load_file(file).values()]
    for weight in trained().values():
        assert any(weight.shape == each.shape and torch.equal(weight, each.to(weight)) for each in written)


def test_what_is_written_loads_as_the_command_says(folder: Path) -> None:
    """Adapters into the network they were trained on, other weights into the model; both then answer alike."""

    def build() -> OneStepPolicy:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return OneStepPolicy.from_pipeline(sd.text_to_image(), lora_rank=2, train="both")

    policy, fresh = build(), build()
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.add_(0.1 * weight.requires_grad)
    adapters, encoder = save_policy(policy, Path("model"))
    assert 'peft.PeftModel.from_pretrained(network, "model/unet")' in adapters
    assert 'policy.model["encoder"].load_state_dict' in encoder
    inputs = torch.ones(1, 4, 8, 8), torch.tensor([5]), torch.ones(1, 3, 8)
    with torch.no_grad():
        network = peft.PeftModel.from_pretrained(sd.unet(), "model/unet")
        torch.testing.assert_close(network(*inputs).sample, policy.unet(*inputs).sample, **EXACT)
        weights = safetensors.torch.load_file("model/encoder/model.safetensors")
        assert not fresh.model["encoder"].load_state_dict(weights, strict=False).unexpected_keys
        images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(fresh.encoder(images), policy.encoder(images), **EXACT)
