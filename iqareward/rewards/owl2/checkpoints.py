"""Load published mPLUG-Owl2 checkpoints and LoRA adapters, tensor by tensor, straight to their device and dtype."""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from torch import Tensor

from iqareward.optional import require
from iqareward.rewards.owl2.network import Owl2, Owl2Config
from iqareward.weight_files import (
    ADAPTER_CONFIG,
    Shape,
    WeightFile,
    check_values,
    checkpoint_folder,
    listed,
    open_weights,
    read_json,
)

_VISION, _ABSTRACTOR = "visual_config.visual_model.", "visual_config.visual_abstractor."
# keys of config.json with the only answer that this implementation has
_FIXED: dict[str, Any] = {
    "model_type": "mplug_owl2",
    "hidden_act": "silu",
    "rope_scaling": None,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "quantization_config": None,
    _VISION + "hidden_act": "quick_gelu",
    _VISION + "num_channels": 3,
    _VISION + "layer_norm_eps": 1e-6,
    _ABSTRACTOR + "layer_norm_eps": 1e-6,
}
_SIZES = {
    "vision_hidden": _VISION + "hidden_size",
    "vision_ffn": _VISION + "intermediate_size",
    "vision_layers": _VISION + "num_hidden_layers",
    "vision_heads": _VISION + "num_attention_heads",
    "image_size": _VISION + "image_size",
    "patch_size": _VISION + "patch_size",
    "abstractor_hidden": _ABSTRACTOR + "hidden_size",
    "abstractor_ffn": _ABSTRACTOR + "intermediate_size",
    "abstractor_layers": _ABSTRACTOR + "num_hidden_layers",
    "abstractor_heads": _ABSTRACTOR + "num_attention_heads",
    "num_queries": _ABSTRACTOR + "num_learnable_queries",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "vocab": "vocab_size",
}
_NUMBERS = {"rope_theta": "rope_theta", "rms_eps": "rms_norm_eps"}
_LARGEST = 2**20  # of any size, several times what the largest published models have
_DIVISIBLE = (  # size, divisor, factor of the divisor
    ("image_size", "patch_size", 1),
    ("vision_hidden", "vision_heads", 1),
    ("abstractor_hidden", "abstractor_heads", 1),
    ("hidden", "heads", 2),  # rotary positions turn pairs of channels of each head
    ("heads", "kv_heads", 1),
)
# what the names of tensors in each stack of layers begin with
_STACKS = {
    "layers": "model.layers.",
    "vision_layers": "model.vision_model.encoder.layers.",
    "abstractor_layers": "model.visual_abstractor.encoder.layers.",
}

_BASE_HUB_ID = "MAGAer13/mplug-owl2-llama2-7b"
# Keys of adapter_config.json that do not change what the adapter's tensors mean: how it was trained, which layers it
# was put into (the names of the tensors say it), and numbers that only count where another key, refused below, is set.
_WITHOUT_EFFECT = {
    "auto_mapping", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "lora_dropout",
    "megatron_core", "peft_version", "qalora_group_size", "target_modules", "task_type",
}  # fmt: skip
# Settings that can be merged with these values only. Other ways to start training change the base weights as well.
_MERGEABLE: dict[str, tuple[Any, ...]] = {
    "peft_type": (None, "LORA"),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def load_owl2(source: str | Path, *, device: torch.device, dtype: torch.dtype) -> Owl2:
    """A frozen `Owl2` with the weights of a checkpoint; host memory holds about one tensor at a time.

    Names, shapes and dtypes are compared before anything is read. Values are checked where the weights go: NaN,
    infinity and matrices of zeros are refused.

    Args:
        source: Hub id or folder of full weights (safetensors or .bin shards) or of a LoRA adapter, which is merged.
        device: Where the weights go.
        dtype: The dtype that they are converted to.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: a file is damaged, a tensor is missing, unknown, quantised or of another shape, or the architecture
            is another.
    """
    folder = checkpoint_folder(source)
    adapter = _Adapter.of(folder) if (folder / ADAPTER_CONFIG).is_file() else None
    weights = folder if adapter is None else _base_folder(folder, adapter.base)
    path = (folder if (folder / "config.json").is_file() else weights) / "config.json"
    config, files = read_config(path), open_weights(weights)
    _check_depth(path, config, files)
    with torch.device("meta"):
        model = Owl2(config)
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    _check_names(weights, files, shapes)
    if adapter is not None:
        adapter.read(folder, shapes)
    with torch.no_grad():
        while files:  # each is closed as soon as it has been read
            _fill(model, files.pop(0), shapes, adapter, device, dtype)
    return model.requires_grad_(False).eval()


def quantize_decoder(model: Owl2) -> None:
    """Hold the decoder's linear weights in int8, one scale per row; activations stay in the model's dtype."""
    torchao = require("torchao.quantization", extra="quant", purpose='quant="int8"')
    # torchao's settings of Inductor hold for the whole process, and let every compilation after this take minutes
    torchao.quantize_(model.model.layers, torchao.Int8WeightOnlyConfig(set_inductor_config=False))


def read_config(path: Path) -> Owl2Config:
    """The sizes that a published config.json describes; those it leaves out have their defaults.

    Raises:
        ValueError: it asks for something that this implementation does not do, or for impossible sizes.
    """
    values = _flat(read_json(path), path)
    sizes = {name: values[key] for name, key in (_SIZES | _NUMBERS).items() if values.get(key) is not None}
    sizes.setdefault("kv_heads", sizes.get("heads", Owl2Config.heads))
    for name, size in sizes.items():
        if name in _NUMBERS:
            if isinstance(size, bool) or not isinstance(size, int | float) or not 0 < size < 1e30:
                raise ValueError(f"{path} expected a positive number as {_NUMBERS[name]}, got {size!r:.100}.")
        elif type(size) is not int or not 1 <= size <= _LARGEST:
            raise ValueError(
                f"{path} expected a whole number from 1 to {_LARGEST} as {_SIZES[name]}, got {size!r:.100}."
            )
    config = Owl2Config(**sizes)
    for width, parts, factor in _DIVISIBLE:
        if getattr(config, width) % (factor * getattr(config, parts)):
            raise ValueError(
                f"{path} expected {_SIZES[width]} divisible by {'twice ' * (factor - 1)}{_SIZES[parts]}, "
                f"got {getattr(config, width)} and {getattr(config, parts)}."
            )
    if config.abstractor_hidden % 4:  # sine and cosine of two coordinates
        raise ValueError(
            f"{path} expected {_SIZES['abstractor_hidden']} divisible by 4, got {config.abstractor_hidden}."
        )
    repeated = {  # sizes that must agree with another one
        _ABSTRACTOR + "hidden_size": config.vision_hidden,
        _ABSTRACTOR + "encoder_hidden_size": config.vision_hidden,
        _ABSTRACTOR + "grid_size": config.grid,
    }
    for key, answer in (_FIXED | repeated).items():
        found = values.get(key)
        if found is not None and found != answer:
            raise ValueError(f"{path} says {key} = {found!r:.100}; this network needs {answer!r}.")
    return config


def _flat(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Values of config.json by dotted keys, as deep as mPLUG-Owl2 nests them."""
    values = dict(config)
    for section in ("visual_config", _VISION[:-1], _ABSTRACTOR[:-1]):
        found = values.get(section) or {}
        if not isinstance(found, Mapping):
            raise ValueError(f"{path} expected an object as {section}, got {found!r:.100}.")
        values |= {f"{section}.{key}": value for key, value in found.items()}
    return values


def _check_depth(path: Path, config: Owl2Config, files: list[WeightFile]) -> None:
    """Refuse another number of layers than the weights have, before any are built."""
    keys = set[str]().union(*(file.keys() for file in files))
    for name, start in _STACKS.items():
        found = len({match[1] for key in keys if (match := re.match(re.escape(start) + r"(\d+)\.", key))})
        if getattr(config, name) != found:
            raise ValueError(
                f"{path} says {_SIZES[name]} = {getattr(config, name)}, but the weights {start}* are those of {found} "
                "layers."
            )


def _check_names(folder: Path, files: list[WeightFile], shapes: Mapping[str, Shape]) -> None:
    """Refuse missing, unknown, misshapen and quantised tensors by the headers of the files."""
    missing = set(shapes)
    for file in files:
        for key in sorted(_own(file)):
            if key not in shapes:
                raise ValueError(
                    f"{file.path} holds {key}, which mPLUG-Owl2 does not have. Is it another architecture?"
                )
            file.tensor(key, shapes[key])
        missing -= file.keys()
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(shapes)} tensors: {listed(missing)}; "
            f"its weights are in {listed(file.path.name for file in files)}."
        )


def _fill(
    model: Owl2,
    file: WeightFile,
    shapes: Mapping[str, Shape],
    adapter: "_Adapter | None",
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put the tensors of one file into the network."""
    tensors = {}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for key in progress.track(sorted(_own(file)), description=f"loading {escape(file.path.name)}"):
            value = file.tensor(key, shapes[key])
            if adapter and key in adapter.names():
                check_values(file.path, {key: value})
                value = adapter.merge(key, value)
            tensors[key] = value.to(device=device, dtype=dtype)
    check_values(file.path, tensors)
    model.load_state_dict(tensors, strict=False, assign=True)


def _own(file: WeightFile) -> set[str]:
    """Tensors that belong to the network: all but positions that it computes itself."""
    return {key for key in file.keys() if not key.endswith("rotary_emb.inv_freq")}  # noqa: SIM118 - no mapping


def _base_folder(adapter: Path, base: str) -> Path:
    # Adapters record the path of the base on their author's machine; its last part says which it is.
    if not os.path.isdir(base) and Path(base).name == _BASE_HUB_ID.split("/")[1]:
        base = _BASE_HUB_ID
    try:
        return checkpoint_folder(base)
    except ValueError as error:
        raise ValueError(
            f"{adapter / ADAPTER_CONFIG} has as base_model_name_or_path a local path that is not here; a relative one "
            f"counts from the current folder. Set it to the base's full path or hub id. ({error})"
        ) from error


@dataclass
class _Adapter:
    """A LoRA adapter in PEFT's format: what it changes, by published parameter name.

    References:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2022, https://arxiv.org/abs/2106.09685
    """

    base: str  # folder or hub id of the weights that it was trained on
    rank: int
    scale: float
    down: dict[str, Tensor] = field(default_factory=dict)  # [rank, in] by name
    up: dict[str, Tensor] = field(default_factory=dict)  # [out, rank] by name
    replaced: dict[str, Tensor] = field(default_factory=dict)  # tensors that were trained in full

    @classmethod
    def of(cls, folder: Path) -> "_Adapter":
        """Its settings; those that ask for a variant of LoRA that cannot be merged here are refused."""
        path = folder / ADAPTER_CONFIG
        config = read_json(path)
        rank, alpha, rslora, base = (
            config.pop(key, None) for key in ("r", "lora_alpha", "use_rslora", "base_model_name_or_path")
        )
        for key, value, valid, expected in (
            ("r", rank, type(rank) is int and rank >= 1, "a whole number of at least 1"),
            ("lora_alpha", alpha, type(alpha) in (int, float) and 0 < alpha < 1e9, "a number above 0"),
            ("use_rslora", rslora, rslora in (None, False, True), "true or false"),
            ("base_model_name_or_path", base, isinstance(base, str) and base != "", "a folder or hub id"),
        ):
            if not valid:
                raise ValueError(f"{path} expected {expected} as {key}, got {value!r:.100}.")
        for key, value in config.items():
            without_effect = not value or key in _WITHOUT_EFFECT
            if value not in _MERGEABLE[key] if key in _MERGEABLE else not without_effect:
                raise ValueError(
                    f"{path} sets {key} = {value!r:.100}, which cannot be merged here. Merge the adapter with peft and "
                    "pass the result."
                )
        return cls(base, rank, alpha / (math.sqrt(rank) if rslora else rank))

    def names(self) -> set[str]:
        """Names of the parameters that it changes."""
        return self.down.keys() | self.replaced.keys()

    def merge(self, name: str, base: Tensor) -> Tensor:
        """`base + scale * up @ down` in float32, before any rounding to the dtype of the model."""
        base = self.replaced.get(name, base)
        if name not in self.down:
            return base
        return base.float() + self.scale * (self.up[name].float() @ self.down[name].float())

    def read(self, folder: Path, shapes: Mapping[str, Shape]) -> None:
        """Read `adapter_model.*` and, if there is one, `non_lora_trainables.bin`."""
        paths = [folder / name for name in ("adapter_model.safetensors", "adapter_model.bin")]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{folder} has {ADAPTER_CONFIG} but neither adapter_model.safetensors nor .bin.")
        file = WeightFile(path)
        for key in sorted(file.keys()):
            self._add(file, key, shapes)
        if alone := sorted(self.down.keys() ^ self.up.keys()):
            raise ValueError(f"{path} has one of lora_A and lora_B, but not the other, for {alone[0]}.")
        for name in self.down:
            down, up = self.down[name], self.up[name]
            check_values(path, {f"{name} (lora_A)": down, f"{name} (lora_B)": up})
            if not (down.any() or up.any()):  # either may be zero before training, never both
                raise ValueError(f"{path} has nothing but zeros in lora_A and lora_B of {name}: it is damaged.")
        if (folder / "non_lora_trainables.bin").is_file():
            self._add_replaced(WeightFile(folder / "non_lora_trainables.bin"), shapes)

    def _add(self, file: WeightFile, key: str, shapes: Mapping[str, Shape]) -> None:
        """Add one half of a low-rank product, such as `base_model.model.<name>.lora_A.weight`."""
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight", key)
        if match is None:
            raise ValueError(
                f"{file.path} holds {key}, which is not a LoRA weight. Merge the adapter with peft and pass the result."
            )
        name, target = f"{match[1]}.weight", self.down if match[2] == "A" else self.up
        if len(shapes.get(name, ())) != 2:
            raise ValueError(f"{file.path} holds {key}, but mPLUG-Owl2 has no matrix {name} that it could change.")
        if name in target:
            raise ValueError(f"{file.path} holds {key} under two names.")
        rows, columns = shapes[name]
        try:
            target[name] = file.tensor(key, (self.rank, columns) if match[2] == "A" else (rows, self.rank))
        except ValueError as error:
            raise ValueError(f"{error} {ADAPTER_CONFIG} says r = {self.rank}.") from error

    def _add_replaced(self, file: WeightFile, shapes: Mapping[str, Shape]) -> None:
        for key in sorted(file.keys()):
            name = key.removeprefix("base_model.model.")
            if name not in shapes:
                raise ValueError(f"{file.path} holds {key}, which mPLUG-Owl2 does not have.")
            if name in self.names():
                raise ValueError(f"{file.path} holds {key}, which another tensor of the adapter changes too.")
            self.replaced[name] = file.take({key: shapes[name]})[key]
