"""Find the files of a published checkpoint and open them."""

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iqareward.weight_files import WeightFile, listed

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # not "../folder"
_FILE_NAME = re.compile(r"[\w. +=()-]{1,200}", re.ASCII)  # no folders, and short enough for every file system
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # preferred first
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = ["adapter_model.*", "non_lora_trainables.bin"]


def checkpoint_folder(source: str | Path, *, inner: str = "", also: Sequence[str] = ()) -> Path:
    """The local folder of a checkpoint: `source` itself if it is one, else downloaded from the Hugging Face hub.

    Args:
        source: a folder, or a hub id such as `q-future/one-align`. A download that was interrupted resumes; one that is
            complete is read from the hub's cache, also without a network.
        inner: folder inside of it.
        also: patterns of file names to download besides weights and JSON.

    Raises:
        OSError: it cannot be downloaded.
        ValueError: `source` is neither.
    """
    if os.path.isdir(source):  # pathlib raises where the name is too long
        return Path(source) / inner
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        raise ValueError(
            f"expected a folder or a hub id like 'q-future/one-align', got {str(source)!r}: no such folder."
        )
    from huggingface_hub import snapshot_download

    start = f"{inner}/" if inner else ""

    def fetch(*patterns: str) -> Path:
        allowed = [start + pattern for pattern in ("*.json", *also, *patterns)]
        try:
            return Path(snapshot_download(source, allow_patterns=allowed, ignore_patterns=[f"{start}*/*"])) / start
        except OSError as error:
            raise OSError(
                f"the weights of {source} are not all in the hub's cache and could not be downloaded ({error}). "
                f"Run `hf download {source}` where there is a network, or pass the folder that holds them."
            ) from error

    folder = fetch()
    if (folder / ADAPTER_CONFIG).is_file():
        return fetch(*_ADAPTER_FILES)
    indexed = [pattern for index, pattern in zip(_INDEXES, _WEIGHTS, strict=True) if (folder / index).is_file()]
    for pattern in indexed or _WEIGHTS:
        folder = fetch(pattern)
        if any(folder.glob(pattern)):
            break
    return folder


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is no JSON object, or names one key twice.
    """
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a checkpoint folder with {name}.")
    text = path.read_bytes()
    try:
        content = json.loads(text, object_pairs_hook=_once_each)
    except Exception as error:  # not UTF-8, not JSON, nested too deeply, a number of too many digits, a key twice
        raise ValueError(f"{path} cannot be read as JSON: {error}. Delete it and get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} expected a JSON object, got {type(content).__name__}.")
    return content


def open_weights(folder: Path) -> list[WeightFile]:
    """The weight files of a checkpoint folder: what its index lists, else what it holds; safetensors before .bin.

    Raises:
        FileNotFoundError: the folder holds no weights, or not all that its index lists.
        ValueError: a file or the index is damaged, they contradict each other, or a tensor is in two files.
    """
    promised = _promised(folder)
    files = [WeightFile(path) for path in promised]
    owners: dict[str, WeightFile] = {}
    for file in files:
        if lacking := promised[file.path] - file.keys():
            raise ValueError(f"{file.path} lacks {listed(lacking)}, which the index of {folder} lists there.")
        for key in sorted(file.keys()):
            if key in owners:
                raise ValueError(
                    f"{file.path} holds {key}, which {owners[key].path} holds too. Remove one of the files."
                )
            owners[key] = file
    return files


def _promised(folder: Path) -> dict[Path, set[str]]:
    """Weight files, and the tensors that an index says are in each; none where there is no index."""
    for index, pattern in zip(_INDEXES, _WEIGHTS, strict=True):
        if (folder / index).is_file():
            return _indexed(folder, index, Path(pattern).suffix)
        single = folder / Path(index).stem.removesuffix(".index")  # "model.safetensors", the name of unsharded weights
        if found := [single] if single.is_file() else sorted(folder.glob(pattern)):
            return {path: set() for path in found}
    raise FileNotFoundError(f"{folder} holds no weights; expected *.safetensors or pytorch_model*.bin.")


def _indexed(folder: Path, index: str, suffix: str) -> dict[Path, set[str]]:
    entries = read_json(folder, index).get("weight_map")
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError(f"{folder / index} expected `weight_map` from tensor to file, got {str(entries)[:100]!r}.")
    promised: dict[Path, set[str]] = {}
    for key, name in entries.items():
        # A file of this folder and nothing else, e.g. not "../x"; it may be a link, as in the hub's cache.
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or not name.endswith(suffix):
            raise ValueError(
                f"{folder / index} says that {key} is in {name!r}; expected the name of a {suffix} file beside it."
            )
        promised.setdefault(folder / name, set()).add(key)
    if missing := [path.name for path in promised if not path.is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {listed(missing)}, which {index} lists. "
            "The download was interrupted: download the checkpoint again."
        )
    return dict(sorted(promised.items()))


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"it names {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} twice")
    return content
