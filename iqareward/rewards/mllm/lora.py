"""Merge a LoRA adapter into the weights it was trained on, while they are being loaded."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from iqareward.rewards.mllm.checkpoints import ADAPTER_CONFIG, read_json, read_tensors

_PREFIX = "base_model.model."
_UNSUPPORTED = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save")
_BASE_HUB_ID = "MAGAer13/mplug-owl2-llama2-7b"


@dataclass
class Adapter:
    """What an adapter changes, by published parameter name.

    Attributes:
        base: folder or hub id of the weights that it was trained on.
        scale: factor of the low-rank product.
        down: `[r, in]` per name.
        up: `[out, r]` per name.
        replaced: tensors that were trained in full.
    """

    base: str
    scale: float
    down: dict[str, Tensor] = field(default_factory=dict)
    up: dict[str, Tensor] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)

    def names(self) -> set[str]:
        """Names that the adapter changes."""
        return self.down.keys() | self.replaced.keys()

    def merge(self, name: str, base: Tensor) -> Tensor:
        """`base + scale * up @ down` in float32, before any rounding to the dtype of the model."""
        base = self.replaced.get(name, base)
        if name not in self.down:
            return base
        down, up = self.down[name].float(), self.up[name].float()
        if (up.shape[0], down.shape[1]) != tuple(base.shape) or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"the LoRA adapter has {list(up.shape)} @ {list(down.shape)} for {name}, "
                f"which does not fit its weight {list(base.shape)}."
            )
        return base.float() + self.scale * (up @ down)


def read_adapter(folder: Path) -> Adapter:
    """Read a PEFT LoRA folder: `adapter_config.json`, `adapter_model.*` and, if any, `non_lora_trainables.bin`.

    Raises:
        ValueError: the adapter uses a variant of LoRA, or tensors, that this cannot merge.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022, https://arxiv.org/abs/2106.09685
    """
    config = read_json(folder, ADAPTER_CONFIG)
    for key in _UNSUPPORTED:
        if config.get(key):
            raise ValueError(f"{folder / ADAPTER_CONFIG} sets {key}, which cannot be merged here. Merge it with peft.")
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    adapter = Adapter(_base_of(config["base_model_name_or_path"]), scale)
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has {ADAPTER_CONFIG} but neither adapter_model.safetensors nor .bin.")
    for key, value in read_tensors(path):
        _sort_in(adapter, path, key, value)
    if adapter.down.keys() != adapter.up.keys():
        raise ValueError(f"{path} has lora_A without lora_B for {sorted(adapter.down.keys() ^ adapter.up.keys())[0]}.")
    full = folder / "non_lora_trainables.bin"
    if full.is_file():
        adapter.replaced = {_published_name(key): value for key, value in read_tensors(full)}
    return adapter


def _sort_in(adapter: Adapter, path: Path, key: str, value: Tensor) -> None:
    for marker, target in ((".lora_A", adapter.down), (".lora_B", adapter.up)):
        name, found, rest = _published_name(key).partition(marker)
        if found and rest in (".weight", ".default.weight"):
            target[f"{name}.weight"] = value.to(torch.float32)
            return
    raise ValueError(f"{path} holds {key}, which is no LoRA weight. Merge the adapter with peft and pass the result.")


def _published_name(key: str) -> str:
    return key.removeprefix(_PREFIX)


def _base_of(path: str) -> str:
    """Adapters record the path of the base on their author's machine; its last part says which it is."""
    if not Path(path).is_dir() and Path(path).name == _BASE_HUB_ID.split("/")[1]:
        return _BASE_HUB_ID
    return path
