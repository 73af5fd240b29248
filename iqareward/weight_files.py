"""Read weights that others published: find the files of a checkpoint, and refuse those that are damaged."""

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

Shape: TypeAlias = Sequence[int]

ADAPTER_CONFIG = "adapter_config.json"
# What a network can be run with. Integers and eight-bit floats are quantised weights, whose scales are elsewhere.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

_ZIP_START = b"PK\x03\x04"
_HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")  # not "../folder"; perhaps a revision
_FILE_NAME = re.compile(r"[\w. +=()-]{1,200}", re.ASCII)  # no folders, and short enough for every file system
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # preferred first
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_ADAPTER_FILES = ["adapter_model.*", "non_lora_trainables.bin"]


def checkpoint_folder(
    source: str | Path, *, inner: str = "", also: Sequence[str] = (), only: Sequence[str] | None = None
) -> Path:
    """The local folder of a checkpoint, downloaded from the Hugging Face hub if need be.

    Args:
        source: A folder, or a hub id such as `q-future/one-align`, perhaps with a branch, tag or commit behind an "@".
            A download that was interrupted resumes; one that is complete is read from the hub's cache, also without a
            network.
        inner: A folder inside of it.
        also: Patterns of file names to download besides weights and JSON.
        only: Patterns of the files to download in place of all these.

    Raises:
        OSError: it cannot be downloaded.
        ValueError: `source` is neither.
    """
    if os.path.isdir(source):  # pathlib raises where the name is too long
        return Path(source) / inner
    found = _HUB_ID.fullmatch(source) if isinstance(source, str) else None
    if os.path.isfile(source):
        raise ValueError(
            f"expected a folder or a hub id, got the file {str(source)!r}, which does not say how its network is "
            "built. Pass a folder that holds it together with its config.json."
        )
    if found is None:
        raise ValueError(
            f"expected a folder or a hub id like 'q-future/one-align', got {str(source)!r}: no such folder."
        )
    from huggingface_hub import snapshot_download

    repository, revision = found.groups()
    start = f"{inner}/" if inner else ""
    more = [*(["--revision", revision] if revision else []), *(["--include", *map(shlex.quote, only)] if only else [])]
    command = " ".join(["hf download", repository, *more])

    def fetch(*patterns: str) -> Path:
        options: Any = {"allow_patterns": [start + pattern for pattern in patterns], "ignore_patterns": [f"{start}*/*"]}
        try:
            return Path(snapshot_download(repository, revision=revision, **options)) / start
        except OSError as error:
            raise OSError(
                f"the weights of {source} are not all in the hub's cache and could not be downloaded. Run `{command}` "
                f"where there is a network, or pass the folder that holds them. The hub's client says: {error}"
            ) from error

    if only is not None:
        return fetch(*only)
    facts = ("*.json", *also)
    folder = fetch(*facts)
    if (folder / ADAPTER_CONFIG).is_file():
        return fetch(*facts, *_ADAPTER_FILES)
    indexed = [pattern for index, pattern in zip(_INDEXES, _WEIGHTS, strict=True) if (folder / index).is_file()]
    for pattern in indexed or _WEIGHTS:
        folder = fetch(*facts, pattern)
        if any(folder.glob(pattern)):
            break
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a missing file is a FileNotFoundError, anything else a ValueError that names it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; expected a checkpoint folder with {path.name}.")
    text = path.read_bytes()
    try:
        content = json.loads(text, object_pairs_hook=_unique_keys)
    except Exception as error:  # not UTF-8, not JSON, nested too deeply, a number of too many digits, a key twice
        raise ValueError(f"{path} cannot be read as JSON: {error}. Delete it and get it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} expected a JSON object, got {type(content).__name__}.")
    return content


def open_weights(folder: Path) -> "list[WeightFile]":
    """The weight files of a checkpoint folder: what its index lists, else what it holds; safetensors before .bin.

    Raises:
        FileNotFoundError: the folder holds no weights, or not all that its index lists.
        ValueError: a file or the index is damaged, they contradict each other, or a tensor is in two files.
    """
    files, owners = list[WeightFile](), dict[str, Path]()
    for path, promised in _promised(folder).items():
        file = WeightFile(path)
        if lacking := promised - file.keys():
            raise ValueError(f"{path} lacks {listed(lacking)}, which the index of {folder} lists there.")
        if twice := sorted(owners.keys() & file.keys()):
            raise ValueError(f"{path} holds {twice[0]}, which {owners[twice[0]]} holds too. Remove one of the files.")
        owners |= dict.fromkeys(file.keys(), path)
        files.append(file)
    return files


def weight_file(source: str | Path, *, name: str = "", inner: str = "") -> "WeightFile":
    """The weights of a network that are one file.

    Args:
        source: The file, a folder with one such file, or a hub id.
        name: The file to take of a folder or a hub id with several.
        inner: Key of the tensors in the file, if it may have other things beside them.

    Raises:
        OSError: there is no such file, or it cannot be downloaded.
        ValueError: the folder holds none or several.
    """
    is_file = Path(source).suffix in _SUFFIXES and not os.path.isdir(source)
    if is_file or os.path.isfile(source):
        return WeightFile(source, inner=inner)
    folder, found = Path(), list[Path]()
    for patterns in [[name]] if name else [["*.safetensors"], [f"*{suffix}" for suffix in _SUFFIXES[1:]]]:
        folder = checkpoint_folder(source, only=patterns)
        if name and (folder / name).is_file():
            return WeightFile(folder / name, inner=inner)
        # a folder of the hub's cache does not exist while nothing was downloaded
        if found := [path for path in sorted(folder.glob("*")) if path.suffix in _SUFFIXES and path.is_file()]:
            break
    if len(found) != 1:
        names = listed(path.name for path in found) or "none"
        raise ValueError(f"{folder} expected one file of weights ({', '.join(_SUFFIXES)}), got {names}. Name the file.")
    return WeightFile(found[0], inner=inner)


@final
class WeightFile:
    """The tensors of one file by name, checked when they are taken.

    Args:
        path: A `.safetensors` file, or one of `torch.save`.
        inner: Key of the dictionary of tensors, if the file holds one with other things beside it.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: the file is damaged, or holds anything but a dictionary of tensors.
    """

    def __init__(self, path: str | Path, *, inner: str = "") -> None:
        self.path = Path(path)
        self._tensors, self.metadata = decode(self.path)
        if isinstance(self._tensors, dict):
            self._tensors = self._tensors.get(inner, self._tensors)
        if not isinstance(self._tensors, dict):
            raise ValueError(f"{path} expected a dictionary of tensors, got {type(self._tensors).__name__}.")
        for key, value in self._tensors.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise ValueError(f"{path} expected tensors by name, got {type(value).__name__} for {key!r}.")

    def keys(self) -> set[str]:
        """Names of the tensors."""
        return set(self._tensors)

    def headers(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of every tensor by name."""
        return {key: (value.shape, value.dtype) for key, value in self._tensors.items()}

    def tensor(self, key: str, shape: Shape) -> Tensor:
        """One tensor in the dtype of the file, whose header is checked and whose values are not read.

        Raises:
            ValueError: it is missing, has another shape, or is not of floating-point numbers.
        """
        if key not in self._tensors:
            raise ValueError(f"{self.path} lacks {key}.")
        value = self._tensors[key]
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{self.path} has {key} of shape {list(value.shape)}, expected {list(shape)}.")
        if value.dtype not in FLOATS or value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(
                f"{self.path} has {key} as {value.dtype}, {value.layout}, on {value.device}; expected floating-point "
                "numbers of 16 bits or more. Quantised weights cannot be read: take the original ones."
            )
        return value.detach()

    def take(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Copies of the tensors of these names and shapes, headers and values checked; others in the file are left."""
        taken = {key: self.tensor(key, shape).clone() for key, shape in shapes.items()}
        check_values(self.path, taken)
        return taken


def decode(path: Path) -> tuple[Any, dict[str, str]]:
    """The content of a `.safetensors` file or a file of `torch.save` on the CPU, and the metadata of the former.

    No code of the file is run. Tensors are mapped into memory, not read, except in torch's format of before 2020.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is truncated or damaged, or needs code to be read.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no file of weights {path}: check the path, which is relative to {Path.cwd()}.")
    with path.open("rb") as file:
        start = file.read(len(_ZIP_START))
    try:
        if path.suffix == ".safetensors":
            return _decode_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=start == _ZIP_START), {}
    except Exception as error:  # a damaged file makes the decoders raise anything
        raise ValueError(
            f"{path} cannot be read as weights: it is truncated or damaged (an interrupted download?), or holds more "
            f"than tensors. Delete it and get it again. ({type(error).__name__}: {error})"
        ) from error


def check_values(path: Path, tensors: Mapping[str, Tensor], *, may_be_zero: bool = False) -> None:
    """Refuse tensors with values that no trained network has.

    The weight of a layer (a name that ends in `.weight`, two or more dimensions longer than 1) that is zero throughout
    is a part of the file that was never written. Biases, scales, tokens and tables of positions may be zero.

    Args:
        path: Where the tensors came from, for the error message.
        tensors: Tensors on any one device, which is waited for once.
        may_be_zero: Whether weights may be zero too, for networks that are not known to be trained throughout.

    Raises:
        ValueError: a tensor holds NaN or infinity, or is a weight of zeros only.
    """
    # one pass without a copy; both extremes are NaN where one value is
    extremes = {key: torch.stack(torch.aminmax(value)).float() for key, value in tensors.items() if value.numel()}
    rows = torch.stack(list(extremes.values())).tolist() if extremes else []
    for key, (low, high) in zip(extremes, rows, strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{path} has NaN or infinite values in {key} (as {tensors[key].dtype}): it is damaged.")
        matrix = key.endswith(".weight") and sum(side > 1 for side in tensors[key].shape) > 1
        if low == high == 0 and matrix and not may_be_zero:
            raise ValueError(f"{path} has nothing but zeros in {key}: it is damaged. Delete it and get it again.")


def listed(names: Iterable[str], shown: int = 5) -> str:
    """The first names in order, and how many more there are, for an error message."""
    names = sorted(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def _decode_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


def _promised(folder: Path) -> dict[Path, set[str]]:
    """Weight files, and the tensors that an index says are in each; none where there is no index."""
    for index, pattern in zip(_INDEXES, _WEIGHTS, strict=True):
        if (folder / index).is_file():
            return _indexed(folder / index, Path(pattern).suffix)
        single = folder / Path(index).stem.removesuffix(".index")  # "model.safetensors", the name of unsharded weights
        if found := [single] if single.is_file() else sorted(folder.glob(pattern)):
            return {path: set() for path in found}
    raise FileNotFoundError(f"{folder} holds no weights; expected *.safetensors or pytorch_model*.bin.")


def _indexed(index: Path, suffix: str) -> dict[Path, set[str]]:
    entries, folder = read_json(index).get("weight_map"), index.parent
    if not isinstance(entries, Mapping) or not entries:
        raise ValueError(f"{index} expected `weight_map` from tensor to file, got {str(entries)[:100]!r}.")
    promised: dict[Path, set[str]] = {}
    for key, name in entries.items():
        # A file of this folder and nothing else, e.g. not "../x"; it may be a link, as in the hub's cache.
        if not isinstance(name, str) or not _FILE_NAME.fullmatch(name) or not name.endswith(suffix):
            raise ValueError(f"{index} says that {key} is in {name!r}; expected the name of a {suffix} file beside it.")
        promised.setdefault(folder / name, set()).add(key)
    if missing := [path.name for path in promised if not path.is_file()]:
        raise FileNotFoundError(
            f"{folder} lacks {listed(missing)}, which {index.name} lists. "
            "The download was interrupted: download the checkpoint again."
        )
    return dict(sorted(promised.items()))


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError(f"it names {Counter(key for key, _ in pairs).most_common(1)[0][0]!r} twice")
    return content
