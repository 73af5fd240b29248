"""Published checkpoint layouts load; damaged ones are refused with the file and the key."""

import json
import random
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from iqareward.rewards.owl2.checkpoints import load_owl2, quantize_decoder
from iqareward.rewards.owl2.network import Owl2, Owl2Config
from iqareward.rewards.owl2.preprocess import LEVEL_IDS, PROMPTS
from iqareward.weight_files import WeightFile, checkpoint_folder
from tests.owl2.owl2_tiny import SMALL, seeded_model
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


def test_absent_sources_are_explained(tmp_path, monkeypatch) -> None:
    """Neither a folder nor a hub id, a download that fails, and a folder without weights."""
    with pytest.raises(ValueError, match="no such folder"):
        checkpoint_folder("no/such/folder")

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(OSError, match=r"hf download nobody/nothing.*no network"):
        checkpoint_folder("nobody/nothing")
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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("rank_pattern", {"q_proj": 4}),
        ("alpha_pattern", {"q_proj": 4}),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("lora_bias", True),
        ("layer_replication", [[0, 1]]),
        ("target_parameters", ["q_proj.weight"]),
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "olora"),
        ("peft_type", "LOHA"),
        ("revision", "v2"),
        ("a_formula_of_tomorrow", True),
        ("r", True),
        ("r", 0),
        ("r", "2"),
        ("r", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 0),
        ("lora_alpha", -4),
        ("lora_alpha", "4"),
        ("lora_alpha", None),
        ("use_rslora", "false"),
        ("base_model_name_or_path", None),
        ("base_model_name_or_path", "../base"),
        ("base_model_name_or_path", "./base"),
        ("base_model_name_or_path", "checkpoints/of/base"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(tmp_path, model, key, value) -> None:
    """A setting that asks for another formula, or that is no setting, would give plausible wrong scores."""
    write_checkpoint(tmp_path / "base", model.state_dict(), kind="one safetensors")
    _write_adapter(tmp_path / "adapter", model, tmp_path / "base")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=rf"adapter_config\.json.*\b{key}\b"):
        load_owl2(tmp_path / "adapter", **CPU)


def test_rank_is_that_of_the_tensors(tmp_path, model) -> None:
    """A rank that the tensors do not have would scale the product wrongly."""
    write_checkpoint(tmp_path / "base", model.state_dict(), kind="one safetensors")
    _write_adapter(tmp_path / "adapter", model, tmp_path / "base", r=8)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors has .*lora_A.*\[2, 32\], expected \[8, .* r = 8"):
        load_owl2(tmp_path / "adapter", **CPU)


def test_settings_as_peft_writes_them(tmp_path, model) -> None:
    """Every default of the installed peft is merged: no setting is refused without need."""
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"], lora_dropout=0.1).to_dict()
    settings = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
    write_checkpoint(tmp_path / "base", model.state_dict(), kind="one safetensors")
    settings |= {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "base")}
    expected = _write_adapter(tmp_path / "adapter", model, tmp_path / "base", **settings)
    loaded = load_owl2(tmp_path / "adapter", **CPU).state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(loaded[key], value, rtol=1e-6, atol=1e-6)


def _change_adapter(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


LORA = f"base_model.model.{ADAPTED[0]}.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[LORA + "B.weight"].fill_(torch.nan), r"adapter_model.*NaN.*q_proj.*lora_B"),
        (lambda t: t.update({LORA + "A.weight": t[LORA + "A.weight"].to(torch.int8)}), r"q_proj\.lora_A.*int8"),
        (
            lambda t: [t[LORA + side].zero_() for side in ("A.weight", "B.weight")],
            r"zeros in lora_A and lora_B.*q_proj",
        ),
        (lambda t: t.pop(LORA + "A.weight"), r"one of lora_A and lora_B.*q_proj"),
        (lambda t: t.update({LORA + "A.default.weight": torch.ones(2, 32)}), r"q_proj\.lora_A.*two names"),
        (
            lambda t: t.update({"base_model.model.lm_body.lora_A.weight": torch.ones(2, 32)}),
            r"no matrix lm_body\.weight",
        ),
        (lambda t: t.update({LORA + "magnitude": torch.ones(2)}), r"lora_magnitude.*not a LoRA weight"),
    ],
)
def test_damaged_adapters_are_refused(tmp_path, model, change, message) -> None:
    """The error names the file and the tensor of the adapter."""
    write_checkpoint(tmp_path / "base", model.state_dict(), kind="one safetensors")
    _write_adapter(tmp_path / "adapter", model, tmp_path / "base")
    _change_adapter(tmp_path / "adapter", change)
    with pytest.raises(ValueError, match=message):
        load_owl2(tmp_path / "adapter", **CPU)


@pytest.mark.parametrize("value", [torch.full((3,), 0.5), torch.full((32,), torch.inf), torch.ones(32).to(torch.int16)])
def test_damaged_tensors_trained_in_full_are_refused(tmp_path, model, value) -> None:
    """They are checked like those of the base."""
    write_checkpoint(tmp_path / "base", model.state_dict(), kind="one safetensors")
    _write_adapter(tmp_path / "adapter", model, tmp_path / "base")
    torch.save({"model.visual_abstractor.visual_fc.bias": value}, tmp_path / "adapter" / "non_lora_trainables.bin")
    with pytest.raises(ValueError, match=r"non_lora_trainables\.bin has .*visual_fc\.bias"):
        load_owl2(tmp_path / "adapter", **CPU)


def test_untrained_adapter_is_the_base(tmp_path, model) -> None:
    """lora_B is zero before training, which is legal and changes nothing."""
    write_checkpoint(tmp_path / "base", model.state_dict(), kind="one safetensors")
    _write_adapter(tmp_path / "adapter", model, tmp_path / "base")
    _change_adapter(tmp_path / "adapter", lambda t: [value.zero_() for key, value in t.items() if "lora_B" in key])
    loaded = load_owl2(tmp_path / "adapter", **CPU).state_dict()
    torch.testing.assert_close(loaded[f"{ADAPTED[0]}.weight"], model.state_dict()[f"{ADAPTED[0]}.weight"], **EXACT)


# ---- damaged weights

DAMAGED = "model.layers.1.mlp.up_proj.weight"


def _one(value: float) -> Callable[[Tensor], Tensor]:
    return lambda weight: weight.index_put((torch.tensor(3), torch.tensor(5)), torch.tensor(value))


@pytest.mark.parametrize("kind", ["safetensors shards", "bin shards"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_one(torch.nan), "NaN"),
        (_one(torch.inf), "infinite"),
        (_one(-torch.inf), "infinite"),
        (torch.zeros_like, "zeros"),
        (lambda weight: weight.to(torch.int8), "int8"),
        (lambda weight: weight.to(torch.int64), "int64"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "float8"),
        (lambda weight: weight.mT.contiguous(), r"shape \[32, 48\], expected \[48, 32\]"),
    ],
)
def test_damaged_weights_are_refused(tmp_path, model, kind, change, message) -> None:
    """NaN, infinity, zeros, integers and other shapes are errors that name the file and the tensor."""
    state = dict(model.state_dict())
    state[DAMAGED] = change(state[DAMAGED])
    files = write_checkpoint(tmp_path, state, kind=kind)
    name = files[sorted(state).index(DAMAGED) % 2].name
    with pytest.raises(ValueError, match=rf"{name} .*{DAMAGED}.*") as caught:
        load_owl2(tmp_path, **CPU)
    assert re.search(message, str(caught.value))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.parametrize("value", [torch.ones(48, 32).to_sparse(), torch.ones(48, 32, device="meta")])
def test_tensors_without_plain_values_are_refused(tmp_path, model, value) -> None:
    """A .bin file can hold sparse tensors, and tensors without any values."""
    write_checkpoint(tmp_path, dict(model.state_dict()), kind="one bin")
    torch.save(dict(model.state_dict()) | {DAMAGED: value}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=DAMAGED):
        load_owl2(tmp_path, **CPU)


def test_values_too_large_for_the_dtype_are_refused(tmp_path, model) -> None:
    """A weight of 1e6 is fine in bfloat16 and infinite in float16."""
    state = dict(model.state_dict())
    state[DAMAGED] = _one(1e6)(state[DAMAGED])
    write_checkpoint(tmp_path, state, kind="one safetensors")
    load_owl2(tmp_path, device=torch.device("cpu"), dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=rf"{DAMAGED}.*float16"):
        load_owl2(tmp_path, device=torch.device("cpu"), dtype=torch.float16)


def test_what_may_be_zero_is_not_refused(tmp_path, model) -> None:
    """Biases, scales, tokens, positions and single rows of a matrix can be zero in a network that works."""
    state = dict(model.state_dict())
    for key, value in state.items():
        if value.ndim == 1 or not key.endswith(".weight"):
            state[key] = torch.zeros_like(value)
    state[DAMAGED] = state[DAMAGED].clone()
    state[DAMAGED][1:] = 0
    write_checkpoint(tmp_path, state, kind="safetensors shards")
    torch.testing.assert_close(load_owl2(tmp_path, **CPU).state_dict()[DAMAGED], state[DAMAGED], **EXACT)


def test_published_weights_pass_the_checks() -> None:
    """No tensor of six published autoencoders is taken for damaged."""
    folder = Path(__file__).resolve().parents[3] / "shared" / "data" / "weights" / "taesd"
    if not folder.is_dir():
        pytest.skip("the published weights are not distributed with the repository (no ../shared/data)")
    for path in folder.glob("*.safetensors"):
        file = WeightFile(path)
        assert file.take({key: shape for key, (shape, _) in file.headers().items()}).keys() == file.keys()


# ---- index, names and sizes


def test_cache_layout_of_the_hub_loads(tmp_path, model) -> None:
    """The hub's cache holds links out of the folder; those are followed."""
    (tmp_path / "blobs").mkdir()
    write_checkpoint(tmp_path / "snapshot", model.state_dict(), kind="safetensors shards")
    for number, path in enumerate(sorted((tmp_path / "snapshot").iterdir())):
        shutil.move(path, tmp_path / "blobs" / str(number))
        path.symlink_to(Path("..") / "blobs" / str(number))
    assert load_owl2(tmp_path / "snapshot", **CPU).config == CONFIG


@pytest.mark.parametrize(
    "name", ["../stolen.safetensors", "/stolen.safetensors", "a/b.safetensors", "x.bin", "", 7, None]
)
def test_index_stays_in_its_folder(tmp_path, model, name) -> None:
    """An index names files beside it, of its own format."""
    files = write_checkpoint(tmp_path / "judge", model.state_dict(), kind="safetensors shards")
    shutil.copy(files[0], tmp_path / "stolen.safetensors")
    path = tmp_path / "judge" / "model.safetensors.index.json"
    entries = json.loads(path.read_text())["weight_map"]
    key = sorted(entries)[0]
    path.write_text(json.dumps({"weight_map": entries | {key: name}}))
    with pytest.raises(ValueError, match=rf"index\.json says that {key} is in {name!r}"):
        load_owl2(tmp_path / "judge", **CPU)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"weight_map": {"a": "model-00001-of-00002.safetensors", "a": "x.safetensors"}}', "names 'a' twice"),
        ('{"weight_map": ["model-00001-of-00002.safetensors"]}', "weight_map"),
        ('{"weight_map": {}}', "weight_map"),
        ("[]", "JSON object"),
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ('{"weight_map": {"no.such.tensor": "model-00001-of-00002.safetensors"}}', r"lacks no\.such\.tensor"),
    ],
)
def test_damaged_index_is_refused(tmp_path, model, text, message) -> None:
    """The error names the index, or the file that lacks what the index says."""
    write_checkpoint(tmp_path, model.state_dict(), kind="safetensors shards")
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=rf"model.*{message}"):
        load_owl2(tmp_path, **CPU)


def test_tensor_in_two_files_is_refused(tmp_path, model) -> None:
    """Which of the two counts would depend on the names of the files."""
    files = write_checkpoint(tmp_path, model.state_dict(), kind="safetensors shards")
    save_file(load_file(files[1]) | {"lm_head.weight": torch.ones(64, 32)}, files[1])
    with pytest.raises(ValueError, match=r"00002-of-00002\.safetensors holds lm_head\.weight, which .*00001-of-00002"):
        load_owl2(tmp_path, **CPU)


WEIRD = (10**9, 10**6, 10**400, 0, -1, True, "32", 32.0, float("nan"), [32], {"a": 1})


@pytest.mark.parametrize("value", WEIRD, ids=lambda value: repr(value)[:10])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "visual_config.visual_model.num_hidden_layers",
        "visual_config.visual_model.image_size",
        "visual_config.visual_model.patch_size",
        "visual_config.visual_abstractor.num_hidden_layers",
        "visual_config.visual_abstractor.num_learnable_queries",
    ],
)
def test_absurd_sizes_are_refused(tmp_path, model, key, value) -> None:
    """No size in config.json makes loading run for minutes or raise anything but a named error."""
    write_checkpoint(tmp_path, model.state_dict(), kind="one safetensors")
    config = hub_config(CONFIG)
    *path, last = key.split(".")
    section = config
    for part in path:
        section = section[part]
    section[last] = value
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json (expected|says) .*{key}|model\.safetensors has .*1000000"):
        load_owl2(tmp_path, **CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 3}, r"config\.json says num_hidden_layers = 3.*2 layers"),
        ({"hidden_size": 64}, r"model\.safetensors has lm_head\.weight of shape \[64, 32\], expected \[64, 64\]"),
        (
            {"hidden_size": 30},
            r"config\.json expected hidden_size divisible by twice num_attention_heads, got 30 and 4",
        ),
        ({"rope_theta": 0}, r"config\.json expected a positive number as rope_theta, got 0"),
        ({"visual_config": "none"}, r"config\.json expected an object as visual_config"),
        (
            {"visual_config": {"visual_model": {"image_size": 57}}},
            r"config\.json .*image_size divisible by .*patch_size",
        ),
        ({"quantization_config": {"bits": 4}}, r"config\.json says quantization_config"),
    ],
)
def test_config_contradicting_the_weights_is_refused(tmp_path, model, change, message) -> None:
    """Plausible sizes are compared with the weights, before any are read."""
    write_checkpoint(tmp_path, model.state_dict(), kind="one safetensors")
    (tmp_path / "config.json").write_text(json.dumps(hub_config(CONFIG) | change))
    with pytest.raises(ValueError, match=message):
        load_owl2(tmp_path, **CPU)


# ---- files that lie about what they hold


@pytest.mark.parametrize(
    "change",
    [
        lambda entry, size: entry.update(data_offsets=[size, size + 6144]),
        lambda entry, size: entry.update(data_offsets=[0, 6144]),
        lambda entry, size: entry.update(dtype="F64"),
        lambda entry, size: entry.update(dtype="Q3"),
        lambda entry, size: entry.update(shape=[2**40, 2**40]),
        lambda entry, size: entry.update(shape=[-48, -32]),
    ],
)
def test_false_header_is_refused(tmp_path, model, change) -> None:
    """Tensors beyond the end of the file, over each other, or of another length than dtype and shape say."""
    path = write_checkpoint(tmp_path, model.state_dict(), kind="one safetensors")[0]
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header[DAMAGED], len(data) - 8 - length)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read as weights"):
        load_owl2(tmp_path, **CPU)


def _mutations(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """The bytes truncated, with flipped bits, with swapped, doubled and emptied blocks, and of random bytes."""
    rng = random.Random(seed)
    for number in range(count):
        # half of the damage is where the structure is: in the first and last kilobytes
        near = rng.choice([len(data), min(len(data), 2048)])
        at = rng.randrange(near) if rng.random() < 0.5 else len(data) - 1 - rng.randrange(near)
        size = min(rng.choice([1, 8, 64, 512]), len(data) - at)
        block, changed = data[at : at + size], bytearray(data)
        match number % 6:
            case 0:
                yield data[:at]
                continue
            case 1:
                for _ in range(rng.choice([1, 4, 32])):
                    changed[(at + rng.randrange(size)) % len(data)] ^= 1 << rng.randrange(8)
            case 2:
                other = rng.randrange(len(data) - size + 1)
                changed[at : at + size] = data[other : other + size]
                changed[other : other + size] = block
            case 3:
                changed[at:at] = block
            case 4:
                changed[at : at + size] = bytes(size)
            case _:
                changed[at : at + size] = rng.randbytes(size)
        yield bytes(changed)


FUZZED = {
    "bin": ("one bin", "base/pytorch_model.bin", 120),
    "legacy bin": ("one bin legacy", "base/pytorch_model.bin", 60),
    "safetensors": ("one safetensors", "base/model.safetensors", 60),
    "index": ("safetensors shards", "base/model.safetensors.index.json", 60),
    "config": ("one safetensors", "base/config.json", 120),
    "adapter config": ("one safetensors", "adapter/adapter_config.json", 120),
    "adapter": ("one safetensors", "adapter/adapter_model.safetensors", 60),
    "trained in full": ("one safetensors", "adapter/non_lora_trainables.bin", 60),
}


def _no_network(source: str, **options: Any) -> None:
    raise FileNotFoundError(f"no {source} on the hub")


@pytest.mark.parametrize("case", FUZZED)
def test_damaged_files_raise_nothing_else(tmp_path, model, monkeypatch, case) -> None:
    """A damaged file is a ValueError or a missing file, or what it says is still a whole network of finite numbers."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", _no_network)
    kind, name, count = FUZZED[case]
    write_checkpoint(tmp_path / "base", model.state_dict(), kind=kind)
    _write_adapter(tmp_path / "adapter", model, tmp_path / "base")
    source, path = tmp_path / name.split("/")[0], tmp_path / name
    refused = 0
    for damaged in _mutations(path.read_bytes(), seed=len(case), count=count):
        path.unlink()  # what was loaded before is still mapped
        path.write_bytes(damaged)
        try:
            state = load_owl2(source, **CPU).state_dict()
        except (ValueError, FileNotFoundError) as error:
            refused += 1
            # a damaged path of the base may lead to the folder of another test beside this one
            assert str(tmp_path.parent) in str(error) or "hub" in str(error)
        else:
            assert all(value.isfinite().all() for value in state.values())
    assert refused > count / 4


def test_int8_changes_no_setting_of_the_compiler() -> None:
    """They hold for the whole process, and torchao would let every later compilation of the user take minutes."""
    pytest.importorskip("torchao.quantization")
    from torch._inductor import config

    before = config.save_config_portable()
    quantize_decoder(seeded_model(SMALL))
    assert config.save_config_portable() == before


def test_int8_decoder_scores_nearly_the_same() -> None:
    """Weight-only int8 moves the level probabilities of a seeded network by less than two percent."""
    pytest.importorskip("torchao.quantization")
    pixels = torch.randn(4, 3, 56, 56, generator=torch.Generator().manual_seed(3))
    model, quantized = seeded_model(SMALL), seeded_model(SMALL)
    quantize_decoder(quantized)
    with torch.no_grad():
        exact, rounded = (
            network(pixels, (network.prepare_prompt(*PROMPTS["quality"], LEVEL_IDS),)).softmax(-1)
            for network in (model, quantized)
        )
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, **HALF_NETWORK)
