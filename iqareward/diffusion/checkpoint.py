"""Checkpoints and run folders: a killed run resumes with the same numbers, and no two runs write to one folder."""

import functools
import hashlib
import json
import math
import os
import re
import shlex
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from iqareward.atomic import PART, atomic_write, remove_parts, write_text
from iqareward.diffusion.sharding import local, reshard, share_of, whole
from iqareward.types import Reward

_WRAPPED = re.compile(r"_orig_mod\.|_checkpoint_wrapped_module\.")
CHECKPOINT = "checkpoint.pt"  # in the folder of a run
# A checkpoint is what torch.save writes, followed by this word and the SHA-256 of all before it. torch.load reads past
# both, so that other programs can open the file.
MARK, DIGEST_BYTES = b"iqareward sha256", 32


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that train, by name, on the CPU; only the adapters of a LoRA model.

    Of a sharded model they are whole, and every process must call this.
    """
    return {name: whole(weight.detach()).cpu().clone() for name, weight in training_weights(model).items()}


def load_trained_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Restore weights of `trained_weights`; a ValueError if names or shapes differ, and then nothing is loaded."""
    own = training_weights(model)
    shapes, saved = ({name: list(weight.shape) for name, weight in part.items()} for part in (own, weights))
    differing = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"The checkpoint expected a model in which the same weights train, got a difference in {len(differing)} "
            f"of them, e.g. {name!r}: {saved.get(name, 'missing')} in the checkpoint, {shapes.get(name, 'missing')} in "
            "the model. Build the policy as in the run that saved it."
        )
    with torch.no_grad():
        for name, weight in own.items():
            local(weight).copy_(share_of(weights[name], weight))


def training_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights that train, by name, as they are; of a sharded model, the shares of this process."""
    reshard(model)
    # named as in the network itself, not as in what torch.compile or recomputed activations make of it or of a part
    named = ((_WRAPPED.sub("", name), weight) for name, weight in model.named_parameters())
    return {name: weight for name, weight in named if weight.requires_grad}


def previous(path: Path) -> Path:
    """Where `save_state` keeps the checkpoint that was at `path` before; links are followed."""
    path = Path(os.path.realpath(path))
    return path.with_name(f"{path.stem}-previous{path.suffix}")


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors, numbers, strings and containers of them with a checksum, and keep the file from before.

    At every moment `path` holds the old or the new file, never a part; the old one is kept as `previous(path)`.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as file:
        torch.save(_numbers(dict(state)), file)
        file.write(MARK + _digest(file, file.tell()))
        file.flush()
        os.fsync(file.fileno())  # the new one is safe before the old one loses its name
        if path.is_file():
            _keep(path)


def _numbers(value: Any) -> Any:
    """The value with numbers of NumPy as Python's, which `load_state` can read: a learning-rate schedule makes such."""
    if isinstance(value, np.generic):
        return value.item()
    if type(value) is dict:
        return {_numbers(key): _numbers(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_numbers(item) for item in value)
    return value


def _keep(path: Path) -> None:
    second_name = path.with_name(path.name + PART)
    second_name.unlink(missing_ok=True)
    try:
        os.link(path, second_name)  # so that `path` never lacks a file
    except OSError:  # a file system without hard links: `path` is missing for an instant, and `latest` looks on
        path.replace(second_name)
    second_name.replace(previous(path))


def save_lines(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Write records as JSON lines, null for NaN and infinity; `path` holds the old or the new file, never a part."""
    write_text(path, "".join(map(_line, history)))


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Add a record to the file of `save_lines`."""
    with path.open("a", encoding="utf-8") as file:
        file.write(_line(record))


def _line(record: Mapping[str, Any]) -> str:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
    return json.dumps(finite) + "\n"


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, without ever running code from the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint or is damaged; if the previous one is intact, the message says so.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}. Give the folder that a run wrote, or start anew.")
    try:
        return _read(path)
    except Exception as error:  # torch.load raises whatever the damage leads to
        raise ValueError(f"{path} expected a whole checkpoint of this library, but {error}. {_advice(path)}") from error


def latest(path: Path) -> Path | None:
    """The newest checkpoint of a run that writes to `path`, None if there is none."""
    return next((file for file in (path, previous(path)) if file.is_file()), None)


def _read(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END) - len(MARK) - DIGEST_BYTES
        file.seek(max(size, 0))
        mark, digest = file.read(len(MARK)), file.read()
        if mark != MARK:
            raise ValueError("it does not end in a checksum: it is truncated, or something else")
        if digest != _digest(file, size):
            raise ValueError("its content does not fit its checksum: it was changed on the disk")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def _advice(path: Path) -> str:
    older = previous(path)
    try:
        updates = _read(older)["updates"]
    except Exception:
        return "Start anew in another folder."
    return f"The one before, {older} of update {updates}, is whole: move it over {path.name} to go on from there."


def _digest(file: BinaryIO, size: int) -> bytes:
    """SHA-256 of the first `size` bytes; the file is at their end then."""
    file.seek(0)
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, 1 << 20))):
        digest.update(piece)
        size -= len(piece)
    return digest.digest()


_LONGEST = 80  # characters of a value in a message
LOCK = ".lock"  # stays in the folder; what counts is whether a process holds it


@contextmanager
def exclusive(folder: Path, accelerator: Any) -> Generator[None]:
    """Within this context no other run can use `folder`, which is created; a ValueError if another run uses it.

    The main process locks for all processes of its run. The system drops the lock with the process, however it ends.
    The same process may enter again.
    """
    from accelerate.utils import broadcast_object_list
    from filelock import FileLock, Timeout

    folder = folder.resolve()
    lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)
    ours = [True]
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            ours = [False]
    broadcast_object_list(ours)
    if not ours[0]:
        raise ValueError(
            f"{folder} is in use by another run. Wait for its end, or choose another folder. "
            f"`fuser {shlex.quote(str(folder / LOCK))}` shows the number of its process."
        )
    try:
        if accelerator.is_main_process:
            remove_parts(folder)
        yield
    finally:
        if accelerator.is_main_process:
            lock.release()


def described(value: Any, *, without: Sequence[str] = ()) -> Any:
    """How `value` was built, as numbers, strings and containers of them that can be saved and compared.

    A reward becomes its name and facts, a function its name, a scheduler of diffusers its type and configuration, a
    network its type, any other object its type and options. Options in `without` are left out, because they change
    during a run.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path | torch.dtype):
        return str(value)
    if isinstance(value, Tensor):
        return f"tensor of {list(value.shape)}"
    if isinstance(value, nn.Module) and not isinstance(value, Reward):
        return _name(type(value))  # the options of a network are in its weights, which are compared as they are loaded
    if isinstance(value, Reward):
        names = ["name", "bounds", "needs_references", "needs_prompts", "differentiable"]
        return {name: described(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [described(item) for item in value]
    if isinstance(value, functools.partial):
        return {"function": described(value.func), "arguments": described([*value.args]), **described(value.keywords)}
    config = getattr(value, "config", None)
    if isinstance(config, Mapping) and not is_dataclass(value):  # a scheduler of diffusers
        options = {key: item for key, item in config.items() if not str(key).startswith("_")}
        return {"type": _name(type(value)), **described(options)}
    if is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in fields(value) if item.init]
    elif callable(value) and hasattr(value, "__qualname__"):
        return _name(value)
    else:
        plain = (bool, int, float, str)
        attributes = getattr(value, "__dict__", {})
        names = [name for name, item in attributes.items() if not name.startswith("_") and isinstance(item, plain)]
    options = {name: described(getattr(value, name)) for name in names if name not in without}
    return {"type": _name(type(value)), **options}


def differences(before: Any, now: Any, name: str = "") -> dict[str, str]:
    """What differs between two descriptions: maps the name of each difference to a few words about it."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        found: dict[str, str] = {}
        for key in keys:
            found |= differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if before == now else {name: f"was {_brief(before)}, is {_brief(now)}"}


def _brief(value: Any) -> str:
    text = str(value["type"]) if isinstance(value, dict) and "type" in value else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _name(value: Callable[..., Any]) -> str:
    return f"{value.__module__}.{value.__qualname__}"
