"""Find the files of a published checkpoint and read their tensors one at a time."""

import json
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # preferred first
_ZIP_START = b"PK\x03\x04"
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = ["adapter_model.*", "non_lora_trainables.bin"]


def checkpoint_folder(source: str | Path) -> Path:
    """The local folder of a checkpoint: `source` itself if it is one, else downloaded from the Hugging Face hub.

    Args:
        source: a folder, or a hub id such as `q-future/one-align`. A download that was interrupted resumes; one that is
            complete is read from the hub's cache, also without a network.
    """
    if Path(source).is_dir():
        return Path(source)
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise ValueError(
            f"expected a folder or a hub id like 'q-future/one-align', got {str(source)!r}: no such folder."
        )
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(source, allow_patterns=["*.json"]))
    if (folder / ADAPTER_CONFIG).is_file():
        return Path(snapshot_download(source, allow_patterns=["*.json", *_ADAPTER_FILES]))
    indexed = [pattern for index, pattern in zip(_INDEXES, _WEIGHTS, strict=True) if (folder / index).is_file()]
    for pattern in indexed or _WEIGHTS:
        folder = Path(snapshot_download(source, allow_patterns=["*.json", pattern]))
        if any(folder.glob(pattern)):
            break
    return folder


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON file of the checkpoint."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a checkpoint folder with {name}.")
    return json.loads(path.read_text(encoding="utf-8"))


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder: what its index lists, else what it holds; safetensors before .bin."""
    for index, pattern in zip(_INDEXES, _WEIGHTS, strict=True):
        if (folder / index).is_file():
            names = sorted(set(read_json(folder, index)["weight_map"].values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise FileNotFoundError(
                    f"{folder} lacks {', '.join(missing)}, which {index} lists. "
                    "The download was interrupted: download the checkpoint again."
                )
            return [folder / name for name in names]
        found = sorted(folder.glob(pattern))
        if found:
            return found
    raise FileNotFoundError(f"{folder} holds no weights; expected *.safetensors or pytorch_model*.bin.")


def read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of everything in a weight file, on the CPU and memory-mapped, so that little is held at once.

    Raises:
        ValueError: the file is truncated or damaged, or holds anything but tensors.
    """
    if path.suffix == ".safetensors":
        yield from _read_safetensors(path)
    else:
        yield from _read_pickle(path).items()


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                yield key, file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(_damaged(path)) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(len(_ZIP_START))
    whole_zip = zipfile.is_zipfile(path)  # its table of contents is at the end
    if not start or (start == _ZIP_START and not whole_zip):
        raise ValueError(_damaged(path))
    try:
        # Files of the zip format can be mapped into memory instead of read; older ones cannot.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=whole_zip)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(_damaged(path)) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} expected a dictionary of tensors, got {type(tensors).__name__} of other things.")
    return tensors


def _damaged(path: Path) -> str:
    return (
        f"{path} cannot be read as weights: it is truncated or damaged (an interrupted download?), or holds more than "
        "tensors. Delete it and download the checkpoint again."
    )
