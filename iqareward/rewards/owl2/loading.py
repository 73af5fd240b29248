"""Load a published mPLUG-Owl2 checkpoint, tensor by tensor, straight to its device and dtype."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from iqareward.optional import require
from iqareward.rewards.checkpoints import ADAPTER_CONFIG, checkpoint_folder, open_weights, read_json
from iqareward.rewards.owl2 import Owl2, Owl2Config
from iqareward.rewards.owl2.lora import Adapter, LoraSettings, read_adapter
from iqareward.weight_files import Shape, WeightFile, check_values, listed

# Stacks of layers: field of the configuration, key in config.json, and what the names of their tensors begin with.
_STACKS = (
    ("layers", "num_hidden_layers", "model.layers."),
    ("vision_layers", "visual_config.visual_model.num_hidden_layers", "model.vision_model.encoder.layers."),
    (
        "abstractor_layers",
        "visual_config.visual_abstractor.num_hidden_layers",
        "model.visual_abstractor.encoder.layers.",
    ),
)


def load_owl2(source: str | Path, *, device: torch.device, dtype: torch.dtype) -> Owl2:
    """A frozen `Owl2` with the weights of a checkpoint; host memory holds about one tensor at a time.

    Names, shapes and dtypes are compared before anything is read. Values are checked where the weights go: NaN,
    infinity and matrices of zeros are refused.

    Args:
        source: hub id or folder, of full weights (safetensors or .bin shards) or of a LoRA adapter, which is merged.
        device: where the weights go.
        dtype: their dtype.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: a file is damaged, a tensor is missing, unknown, quantised or of another shape, or the architecture
            is another.
    """
    folder = checkpoint_folder(source)
    lora = LoraSettings.read(folder) if (folder / ADAPTER_CONFIG).is_file() else None
    weights = folder if lora is None else _base_folder(folder, lora.base)
    described = folder if (folder / "config.json").is_file() else weights
    config = Owl2Config.from_hub_dict(read_json(described, "config.json"), source=str(described / "config.json"))
    files = open_weights(weights)
    _check_depth(described / "config.json", config, files)
    with torch.device("meta"):
        model = Owl2(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    _check_names(weights, files, expected)
    adapter = None if lora is None else read_adapter(folder, lora, expected)
    with torch.no_grad():
        while files:  # each is closed as soon as it has been read
            _fill(model, files.pop(0), expected, adapter, device, dtype)
    return model.requires_grad_(False).eval()


def quantize_decoder(model: Owl2) -> None:
    """Hold the decoder's linear weights in int8, one scale per row; activations stay in the model's dtype."""
    torchao = require("torchao.quantization", extra="quant", purpose='quant="int8"')
    torchao.quantize_(model.model.layers, torchao.Int8WeightOnlyConfig())


def _base_folder(adapter: Path, base: str) -> Path:
    try:
        return checkpoint_folder(base)
    except ValueError as error:
        raise ValueError(
            f"{adapter / ADAPTER_CONFIG} has as base_model_name_or_path a local path that is not here; a relative one "
            f"counts from the current folder. Set it to the base's full path or hub id. ({error})"
        ) from error


def _check_depth(path: Path, config: Owl2Config, files: list[WeightFile]) -> None:
    """Refuse another number of layers than the weights have, before any are built."""
    keys = set[str]().union(*(file.keys() for file in files))
    for field, where, start in _STACKS:
        found = len({match[1] for key in keys if (match := re.match(re.escape(start) + r"(\d+)\.", key))})
        if getattr(config, field) != found:
            raise ValueError(
                f"{path} says {where} = {getattr(config, field)}, but the weights {start}* are those of {found} layers."
            )


def _check_names(folder: Path, files: list[WeightFile], expected: Mapping[str, Shape]) -> None:
    """Refuse missing, unknown, misshapen and quantised tensors by the headers of the files."""
    missing = set(expected)
    for file in files:
        for key in sorted(_own(file)):
            if key not in expected:
                raise ValueError(
                    f"{file.path} holds {key}, which mPLUG-Owl2 does not have. Is it another architecture?"
                )
            file.tensor(key, expected[key])
        missing -= file.keys()
    if missing:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(expected)} tensors: {listed(missing)}; "
            f"its weights are in {listed(file.path.name for file in files)}."
        )


def _fill(
    model: Owl2,
    file: WeightFile,
    expected: Mapping[str, Shape],
    adapter: Adapter | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Put the tensors of one file into the network."""
    tensors = {}
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        for key in progress.track(sorted(_own(file)), description=f"loading {escape(file.path.name)}"):
            value = file.tensor(key, expected[key])
            if adapter and key in adapter.names():
                check_values(file.path, {key: value})
                value = adapter.merge(key, value)
            tensors[key] = value.to(device=device, dtype=dtype)
    check_values(file.path, tensors)
    model.load_state_dict(tensors, strict=False, assign=True)


def _own(file: WeightFile) -> set[str]:
    """Tensors that belong to the network: all but positions that it computes itself."""
    keys = file.keys()
    return {key for key in keys if not key.endswith("rotary_emb.inv_freq")}
