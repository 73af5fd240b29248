"""Published checkpoint layouts load; damaged ones are refused with the file and the key."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from iqareward.rewards.mllm.checkpoints import checkpoint_folder
from iqareward.rewards.mllm.loading import load_owl2, quantize_decoder
from iqareward.rewards.mllm.owl2 import Owl2, Owl2Config
from iqareward.rewards.mllm.prompts import LEVEL_IDS, prompt_ids
from tests.mllm.owl2_tiny import SMALL, seeded_model
from tests.tolerances import EXACT, HALF_NETWORK

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
CONFIG = replace(SMALL, vocab=64)


def hub_config(config: Owl2Config) -> dict[str, Any]:
    """The config.json that a hub repository would have."""
    return {
        "model_type": "mplug_owl2",
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "vocab_size": config.vocab,
        "visual_config": {
            "visual_model": {
                "hidden_size": config.vision_hidden,
                "intermediate_size": config.vision_ffn,
                "num_hidden_layers": config.vision_layers,
                "num_attention_heads": config.vision_heads,
                "image_size": config.image_size,
            },
            "visual_abstractor": {
                "hidden_size": config.abstractor_hidden,
                "intermediate_size": config.abstractor_ffn,
                "num_hidden_layers": config.abstractor_layers,
                "num_attention_heads": config.abstractor_heads,
                "num_learnable_queries": config.num_queries,
            },
        },
    }


def write_checkpoint(folder: Path, state: dict[str, Tensor], *, kind: str) -> list[Path]:
    """Write two shards with their index, or one file, as hub repositories have them; returns the weight files."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub_config(CONFIG)))
    safe = "safetensors" in kind
    stem, end = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    keys = sorted(state)
    shards = [keys] if kind.startswith("one") else [keys[::2], keys[1::2]]
    names = [f"{stem}.{end}"] if len(shards) == 1 else [f"{stem}-{i:05d}-of-00002.{end}" for i in (1, 2)]
    for name, members in zip(names, shards, strict=True):
        part = {key: state[key].contiguous() for key in members}
        if safe:
            save_file(part, folder / name, metadata={"format": "pt"})
        else:
            torch.save(part, folder / name, _use_new_zipfile_serialization="legacy" not in kind)
    if len(shards) == 2:
        weight_map = {key: name for name, members in zip(names, shards, strict=True) for key in members}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return [folder / name for name in names]


@pytest.fixture(scope="module")
def model() -> Owl2:
    """The network whose weights are written."""
    return seeded_model(CONFIG)


@pytest.mark.parametrize("kind", ["safetensors shards", "bin shards", "one safetensors", "one bin", "one bin legacy"])
def test_every_layout_loads(tmp_path, model, kind) -> None:
    """Shards with an index and single files, in both formats, give the weights that were written."""
    write_checkpoint(tmp_path, model.state_dict(), kind=kind)
    loaded = load_owl2(tmp_path, **CPU)
    assert loaded.config == CONFIG
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[key], **EXACT)


def test_weights_take_the_dtype_asked_for(tmp_path, model) -> None:
    """A float32 checkpoint loads as bfloat16, buffers included."""
    write_checkpoint(tmp_path, model.state_dict(), kind="safetensors shards")
    loaded = load_owl2(tmp_path, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.bfloat16}


def test_safetensors_come_first(tmp_path, model) -> None:
    """With both formats present, the one that cannot run code is read."""
    write_checkpoint(tmp_path, model.state_dict(), kind="safetensors shards")
    (tmp_path / "pytorch_model.bin").write_bytes(b"damaged")
    load_owl2(tmp_path, **CPU)


@pytest.mark.parametrize("kind", ["safetensors shards", "bin shards", "one bin legacy"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_file_is_named(tmp_path, model, kind, share) -> None:
    """An interrupted download is an error that names the file."""
    path = write_checkpoint(tmp_path, model.state_dict(), kind=kind)[-1]
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=rf"{path.name}.*truncated"):
        load_owl2(tmp_path, **CPU)


def test_missing_shard_is_named(tmp_path, model) -> None:
    """A shard that the index lists and the folder lacks."""
    path = write_checkpoint(tmp_path, model.state_dict(), kind="bin shards")[0]
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        load_owl2(tmp_path, **CPU)


def test_missing_and_foreign_and_misshapen_tensors_are_named(tmp_path, model) -> None:
    """Each error names the tensor and what is wrong with it."""
    state = dict(model.state_dict())
    removed = "model.layers.1.self_attn.k_proj.multiway.1.weight"
    write_checkpoint(tmp_path / "a", {k: v for k, v in state.items() if k != removed}, kind="one safetensors")
    with pytest.raises(ValueError, match=rf"lacks 1 of {len(state)} tensors: {removed}"):
        load_owl2(tmp_path / "a", **CPU)
    write_checkpoint(tmp_path / "b", state | {"model.mm_projector.weight": torch.zeros(1)}, kind="one safetensors")
    with pytest.raises(ValueError, match=r"model\.mm_projector\.weight"):
        load_owl2(tmp_path / "b", **CPU)
    write_checkpoint(tmp_path / "c", state | {"model.norm.weight": torch.zeros(3)}, kind="one safetensors")
    with pytest.raises(ValueError, match=r"model\.norm\.weight of shape \[3\], expected \[32\]"):
        load_owl2(tmp_path / "c", **CPU)


def test_code_in_a_checkpoint_is_not_run(tmp_path, model) -> None:
    """A .bin that would execute something when unpickled is refused."""

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (pytest.fail, ("the checkpoint ran code",))

    path = write_checkpoint(tmp_path, model.state_dict(), kind="one bin")[0]
    torch.save({"model.norm.weight": Payload()}, path)
    with pytest.raises(ValueError, match="more than tensors"):
        load_owl2(tmp_path, **CPU)


def test_absent_sources_are_explained(tmp_path) -> None:
    """Neither a folder nor a hub id, and a folder without weights."""
    with pytest.raises(ValueError, match="no such folder"):
        checkpoint_folder("no/such/folder")
    (tmp_path / "config.json").write_text(json.dumps(hub_config(CONFIG)))
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        load_owl2(tmp_path, **CPU)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_owl2(tmp_path / "..", **CPU)


ADAPTED = ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj.multiway.1")


def _write_adapter(folder: Path, model: Owl2, base: Path, **config: Any) -> dict[str, Tensor]:
    """A rank-2 adapter of two layers and one tensor trained in full; returns the merged weights."""
    generator = torch.Generator().manual_seed(0)
    folder.mkdir()
    settings = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    scale = settings["lora_alpha"] / (settings["r"] ** (0.5 if config.get("use_rslora") else 1.0))
    merged, tensors = {}, {}
    for name in ADAPTED:
        weight = model.state_dict()[f"{name}.weight"]
        down, up = (torch.randn(shape, generator=generator) for shape in ((2, weight.shape[1]), (weight.shape[0], 2)))
        tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
        merged[f"{name}.weight"] = weight + scale * (up @ down)
    save_file(tensors, folder / "adapter_model.safetensors")
    full = {"model.visual_abstractor.visual_fc.bias": torch.full((CONFIG.hidden,), 0.25)}
    torch.save({f"base_model.model.{key}": value for key, value in full.items()}, folder / "non_lora_trainables.bin")
    return dict(model.state_dict()) | merged | full


@pytest.mark.parametrize("rslora", [False, True])
def test_adapter_is_merged(tmp_path, model, rslora) -> None:
    """Base plus adapter equals weights merged by hand, and nothing else changes."""
    write_checkpoint(tmp_path / "base", model.state_dict(), kind="bin shards")
    expected = _write_adapter(tmp_path / "adapter", model, tmp_path / "base", use_rslora=rslora)
    loaded = load_owl2(tmp_path / "adapter", **CPU).state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(loaded[key], value, rtol=1e-6, atol=1e-6)


def test_adapters_that_cannot_be_merged_are_refused(tmp_path, model) -> None:
    """DoRA is another formula; ignoring it would give plausible wrong scores."""
    write_checkpoint(tmp_path / "base", model.state_dict(), kind="one safetensors")
    _write_adapter(tmp_path / "adapter", model, tmp_path / "base", use_dora=True)
    with pytest.raises(ValueError, match="use_dora"):
        load_owl2(tmp_path / "adapter", **CPU)


def test_int8_decoder_scores_nearly_the_same() -> None:
    """Weight-only int8 moves the level probabilities of a seeded network by less than two percent."""
    pytest.importorskip("torchao.quantization")
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    model, quantized = seeded_model(SMALL), seeded_model(SMALL)
    quantize_decoder(quantized)
    with torch.no_grad():
        exact, rounded = (
            network(pixels, (network.prepare_prompt(*prompt_ids("quality"), LEVEL_IDS),)).softmax(-1)
            for network in (model, quantized)
        )
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, **HALF_NETWORK)
