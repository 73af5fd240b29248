"""A folder belongs to one run: nobody else writes there meanwhile, and who goes on with it has the same settings."""

import functools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from iqareward.atomic import remove_parts
from iqareward.types import Reward

LONGEST = 80  # characters of a value in a message
LOCK = ".lock"  # stays in the folder; what counts is whether a process holds it


@contextmanager
def exclusive(folder: Path, accelerator: Any) -> Generator[None]:
    """Within it no other run can use `folder`, which is made; the main process locks for all of its own.

    The system drops the lock with the process, however it ends. In one process it may be entered again.

    Raises:
        ValueError: another run uses the folder.
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
        raise ValueError(f"{folder} is in use by another run. Wait for its end, or choose another folder.")
    try:
        if accelerator.is_main_process:
            remove_parts(folder)
        yield
    finally:
        if accelerator.is_main_process:
            lock.release()


def described(value: Any, *, without: Sequence[str] = ()) -> Any:
    """How `value` was built, in numbers, strings and containers of them that can be saved and compared.

    Rewards are described by their name and facts, functions by their name, schedulers of diffusers by
    their type and configuration, networks by their type, other objects by their type and options.

    Args:
        value: Any object.
        without: options that are left out, because they change as the run goes on.

    Example:
        >>> from iqareward.diffusion.experience import Sampling
        >>> described(Sampling(window=range(1, 3)))["window"]
        [1, 2]
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
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
        return {"function": _name(value.func), "arguments": described([*value.args]), **described(value.keywords)}
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
    """What differs between two descriptions: the name of each difference and a few words on it.

    Example:
        >>> differences({"rate": 0.1, "memory": None}, {"rate": 0.2, "memory": None})
        {'rate': 'was 0.1, is 0.2'}
    """
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        found: dict[str, str] = {}
        for key in keys:
            found |= differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return found
    return {} if before == now else {name: f"was {_brief(before)}, is {_brief(now)}"}


def _brief(value: Any) -> str:
    text = str(value["type"]) if isinstance(value, dict) and "type" in value else repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def _name(value: Callable[..., Any]) -> str:
    return f"{value.__module__}.{value.__qualname__}"
