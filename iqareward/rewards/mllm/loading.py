"""Load a published mPLUG-Owl2 checkpoint, tensor by tensor, straight to its device and dtype."""

from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from iqareward.optional import require
from iqareward.rewards.mllm.checkpoints import (
    ADAPTER_CONFIG,
    checkpoint_folder,
    read_json,
    read_tensors,
    weight_files,
)
from iqareward.rewards.mllm.lora import Adapter, read_adapter
from iqareward.rewards.mllm.owl2 import Owl2, Owl2Config

_SHOWN = 5  # names in an error message


def load_owl2(source: str | Path, *, device: torch.device, dtype: torch.dtype) -> Owl2:
    """A frozen `Owl2` with the weights of a checkpoint; host memory holds about one tensor at a time.

    Args:
        source: hub id or folder, of full weights (safetensors or .bin shards) or of a LoRA adapter, which is merged.
        device: where the weights go.
        dtype: their dtype.

    Raises:
        FileNotFoundError: a file of the checkpoint is missing.
        ValueError: a file is damaged, a tensor is missing, unknown or of another shape, or the architecture is another.
    """
    folder = checkpoint_folder(source)
    adapter = read_adapter(folder) if (folder / ADAPTER_CONFIG).is_file() else None
    weights = folder if adapter is None else checkpoint_folder(adapter.base)
    described = folder if (folder / "config.json").is_file() else weights
    config = Owl2Config.from_hub_dict(read_json(described, "config.json"))
    with torch.device("meta"):
        model = Owl2(config)
    with torch.no_grad():
        _fill(model, weights, adapter, device, dtype)
    return model.requires_grad_(False).eval()


def quantize_decoder(model: Owl2) -> None:
    """Hold the decoder's linear weights in int8, one scale per row; activations stay in the model's dtype."""
    torchao = require("torchao.quantization", extra="quant", purpose='quant="int8"')
    torchao.quantize_(model.model.layers, torchao.Int8WeightOnlyConfig())


def _fill(model: Owl2, folder: Path, adapter: Adapter | None, device: torch.device, dtype: torch.dtype) -> None:
    expected = {key: value.shape for key, value in model.state_dict().items()}
    unknown = sorted((adapter.names() if adapter else set()) - expected.keys())
    if unknown:
        raise ValueError(f"the LoRA adapter changes {_list(unknown)}, which mPLUG-Owl2 does not have.")
    missing = set(expected)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"loading {folder.name}", total=len(expected))
        for path in weight_files(folder):
            tensors = {}
            for key, value in _checked(path, expected):
                merged = adapter.merge(key, value) if adapter else value
                tensors[key] = merged.to(device=device, dtype=dtype)
                progress.advance(task)
            model.load_state_dict(tensors, strict=False, assign=True)
            missing -= tensors.keys()
    if missing:
        raise ValueError(f"{folder} lacks {len(missing)} of {len(expected)} tensors: {_list(sorted(missing))}.")


def _checked(path: Path, expected: dict[str, torch.Size]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a file that belong to the network; others than positions that it computes itself are an error."""
    for key, value in read_tensors(path):
        if key.endswith("rotary_emb.inv_freq"):
            continue
        if key not in expected:
            raise ValueError(f"{path} holds {key}, which mPLUG-Owl2 does not have. Is it another architecture?")
        if value.shape != expected[key]:
            raise ValueError(f"{path} has {key} of shape {list(value.shape)}, expected {list(expected[key])}.")
        yield key, value


def _list(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
