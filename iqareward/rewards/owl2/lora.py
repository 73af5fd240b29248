"""Merge a LoRA adapter into the weights it was trained on, while they are being loaded."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from iqareward.rewards.checkpoints import ADAPTER_CONFIG, read_json
from iqareward.weight_files import Shape, WeightFile, check_values

_PREFIX = "base_model.model."
_BASE_HUB_ID = "MAGAer13/mplug-owl2-llama2-7b"
# Keys of adapter_config.json that do not change what the adapter's tensors mean: how it was trained, which layers it
# was put into (the names of the tensors say it), and numbers that only count where another key, refused below, is set.
_WITHOUT_EFFECT = {
    "auto_mapping", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "target_modules", "task_type",
}  # fmt: skip
# Settings with one answer here, and what stands for it. Other ways to start training change the base weights as well.
_ANSWERS: dict[str, tuple[Any, ...]] = {
    "peft_type": (None, "LORA"),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}
_READ = {"r", "lora_alpha", "use_rslora", "base_model_name_or_path"}


@dataclass(frozen=True)
class LoraSettings:
    """What adapter_config.json says.

    Attributes:
        base: folder or hub id of the weights that the adapter was trained on.
        rank: inner size of every low-rank product.
        scale: factor of the low-rank product.
    """

    base: str
    rank: int
    scale: float

    @classmethod
    def read(cls, folder: Path) -> "LoraSettings":
        """Read a PEFT folder's adapter_config.json.

        Raises:
            ValueError: it asks for a variant of LoRA that cannot be merged here, or a setting is missing or impossible.
        """
        path, config = folder / ADAPTER_CONFIG, read_json(folder, ADAPTER_CONFIG)
        for key, value in config.items():
            if key in _READ or key in _WITHOUT_EFFECT or (key in _ANSWERS and value in _ANSWERS[key]):
                continue
            if value or key in _ANSWERS:
                raise ValueError(
                    f"{path} sets {key} = {value!r:.100}, which cannot be merged here. Merge the adapter with peft and "
                    "pass the result."
                )
        rank, alpha, base = (config.get(key) for key in ("r", "lora_alpha", "base_model_name_or_path"))
        rslora = config.get("use_rslora") or False
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{path} expected a whole number of at least 1 as r, got {rank!r:.100}.")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
            raise ValueError(f"{path} expected a number above 0 as lora_alpha, got {alpha!r:.100}.")
        if rslora not in (True, False):
            raise ValueError(f"{path} expected true or false as use_rslora, got {rslora!r:.100}.")
        if not isinstance(base, str) or not base:
            raise ValueError(f"{path} expected a folder or hub id as base_model_name_or_path, got {base!r:.100}.")
        return cls(_base_of(base), rank, alpha / (math.sqrt(rank) if rslora else rank))


@dataclass
class Adapter:
    """What an adapter changes, by published parameter name.

    Attributes:
        scale: factor of the low-rank product.
        down: `[r, in]` per name.
        up: `[out, r]` per name.
        replaced: tensors that were trained in full.
    """

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
        return base.float() + self.scale * (self.up[name].float() @ self.down[name].float())


def read_adapter(folder: Path, settings: LoraSettings, shapes: Mapping[str, Shape]) -> Adapter:
    """Read the tensors of a PEFT LoRA folder: `adapter_model.*` and, if any, `non_lora_trainables.bin`.

    Args:
        folder: Folder that holds the adapter.
        settings: its adapter_config.json.
        shapes: of the weights that it may change, by name.

    Raises:
        ValueError: a tensor is no LoRA weight, changes no weight of the network, or contradicts `settings`.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022, https://arxiv.org/abs/2106.09685
    """
    adapter = Adapter(settings.scale)
    files = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has {ADAPTER_CONFIG} but neither adapter_model.safetensors nor .bin.")
    file = WeightFile(path)
    for key in sorted(file.keys()):
        _sort_in(adapter, file, key, settings.rank, shapes)
    if alone := sorted(adapter.down.keys() ^ adapter.up.keys()):
        raise ValueError(f"{path} has one of lora_A and lora_B, but not the other, for {alone[0]}.")
    for name in adapter.down:
        down, up = adapter.down[name], adapter.up[name]
        check_values(path, {f"{name} (lora_A)": down, f"{name} (lora_B)": up})
        if not (down.any() or up.any()):  # either may be zero before training, never both
            raise ValueError(f"{path} has nothing but zeros in lora_A and lora_B of {name}: it is damaged.")
    full = folder / "non_lora_trainables.bin"
    if full.is_file():
        _read_replaced(adapter, WeightFile(full), shapes)
    return adapter


def _sort_in(adapter: Adapter, file: WeightFile, key: str, rank: int, shapes: Mapping[str, Shape]) -> None:
    for marker, target in ((".lora_A", adapter.down), (".lora_B", adapter.up)):
        stem, found, rest = key.removeprefix(_PREFIX).partition(marker)
        if not found or rest not in (".weight", ".default.weight"):
            continue
        name = f"{stem}.weight"
        if len(shapes.get(name, ())) != 2:
            raise ValueError(f"{file.path} holds {key}, but mPLUG-Owl2 has no matrix {name} that it could change.")
        if name in target:
            raise ValueError(f"{file.path} holds {key} under two names.")
        rows, columns = shapes[name]
        shape = (rank, columns) if target is adapter.down else (rows, rank)
        try:
            target[name] = file.tensor(key, shape)
        except ValueError as error:
            raise ValueError(f"{error} {ADAPTER_CONFIG} says r = {rank}.") from error
        return
    raise ValueError(
        f"{file.path} holds {key}, which is no LoRA weight. Merge the adapter with peft and pass the result."
    )


def _read_replaced(adapter: Adapter, file: WeightFile, shapes: Mapping[str, Shape]) -> None:
    for key in sorted(file.keys()):
        name = key.removeprefix(_PREFIX)
        if name not in shapes:
            raise ValueError(f"{file.path} holds {key}, which mPLUG-Owl2 does not have.")
        if name in adapter.names():
            raise ValueError(f"{file.path} holds {key}, which another tensor of the adapter changes too.")
        adapter.replaced[name] = file.take({key: shapes[name]})[key]


def _base_of(path: str) -> str:
    """Adapters record the path of the base on their author's machine; its last part says which it is."""
    if not Path(path).is_dir() and Path(path).name == _BASE_HUB_ID.split("/")[1]:
        return _BASE_HUB_ID
    return path
