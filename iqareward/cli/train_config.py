"""The file that `iqareward train` reads: what may be in it, and errors that name the key at fault."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from iqareward.diffusion import Degradation, RolloutConfig, TrainConfig

Table = TypeVar("Table")
PRESETS = {"tiny": ((16, 32, 32), 1), "small": ((32, 64, 128), 1), "base": ((64, 128, 256), 2)}
OBJECTIVES = ("diffusion_nft", "clipped_policy_gradient")


@dataclass(frozen=True)
class Supervised:
    """Table `[sft]`: how a preset is trained before RL; see `supervised`."""

    updates: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.updates < 0 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError(f"expected updates >= 0, batch_size >= 1 and learning_rate > 0, got {self}.")


@dataclass(frozen=True)
class HeldOut:
    """Table `[validation]`: images that are never trained on, and who judges their restorations."""

    images: int = 8
    judges: tuple[str, ...] = ("psnr", "ssim")
    every: int = 25
    stop_on: str | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.images < 1 or self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"expected images, every and patience >= 1, got {self}.")
        if (self.patience is not None and self.stop_on is None) or self.stop_on not in (None, *self.judges):
            raise ValueError(f"expected stop_on among the judges {list(self.judges)}, got {self.stop_on!r}.")


@dataclass(frozen=True)
class RunConfig:
    """The whole file; `iqareward train --example` prints it with a comment on every key."""

    folder: Path
    reward: str
    output: Path
    model: str = "small"
    size: int = 64
    crops: int = 4
    degraded_folder: Path | None = None
    updates: int = 200
    save_every: int = 25
    objective: str = "diffusion_nft"
    seed: int = 0
    resume: bool = False
    trackers: tuple[str, ...] = ()
    degradation: Degradation = field(default_factory=Degradation)
    sft: Supervised = field(default_factory=Supervised)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: HeldOut = field(default_factory=HeldOut)

    def __post_init__(self) -> None:
        if self.model not in PRESETS and not Path(self.model).is_dir():
            raise ValueError(f"expected model as one of {list(PRESETS)} or as a folder, got {self.model!r}.")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"expected objective as one of {list(OBJECTIVES)}, got {self.objective!r}.")
        if min(self.size, self.crops, self.updates, self.save_every) < 1 or self.seed < 0:
            raise ValueError("expected size, crops, updates and save_every >= 1 and seed >= 0.")


def read_config(path: Path) -> RunConfig:
    """The settings in a TOML file.

    Args:
        path: The file; paths inside are relative to where the command runs.

    Raises:
        ValueError: No TOML, or an unknown, missing or wrong key; the key is named.
        OSError: The file cannot be read.
    """
    content = path.read_bytes()
    try:
        table = tomllib.loads(content.decode())
    except Exception as error:  # also of other encodings, or nested too deep
        raise ValueError(f"{path} is no TOML: {error}") from error
    try:
        config = _build(RunConfig, table, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if config.degraded_folder is not None and "degradation" in table:
        raise ValueError(f"{path}: expected `degraded_folder` or the table `degradation`, got both. Remove one.")
    return config


def _build(cls: type[Table], table: Mapping[str, Any], prefix: str) -> Table:
    """The dataclass `cls` from a table of the file; keys left out keep the default of the field."""
    known, kinds = {item.name: item for item in fields(cls)}, get_type_hints(cls)  # pyright: ignore[reportArgumentType]
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{prefix}{near[0]}`?" if near else f"known are {', '.join(known)}."
            raise ValueError(f"unknown key `{prefix}{key}`; {hint}")
    for key, item in known.items():
        if key not in table and item.default is MISSING and item.default_factory is MISSING:
            raise ValueError(f"missing key `{prefix}{key}`; `iqareward train --example` shows every key.")
    values = {key: _convert(value, kinds[key], f"{prefix}{key}") for key, value in table.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"table `{prefix[:-1]}`: {error}" if prefix else str(error)) from error


def _convert(value: Any, kind: Any, key: str) -> Any:
    """A value of the file as what the field takes."""
    union = isinstance(kind, UnionType)
    choices: list[Any] = [choice for choice in get_args(kind) if choice is not NoneType] if union else [kind]
    for choice in choices:
        if choice is float and type(value) is int:
            return float(value)
        if choice is Path and isinstance(value, str):
            return Path(value)
        if choice is range and _is_list_of(value, int) and len(value) == 2:
            return range(*value)
        if get_origin(choice) is tuple and _is_list_of(value, get_args(choice)[0]):
            return tuple(value)
        if isinstance(value, dict) and is_dataclass(choice):
            return _build(choice, value, f"{key}.")
        if type(value) is choice:
            return value
    expected = " or ".join(_spelled(choice) for choice in choices)
    raise ValueError(f"key `{key}` expected {expected}, got {value!r}.")


def _is_list_of(value: Any, kind: Any) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


def _spelled(kind: Any) -> str:
    """A type in the words of TOML."""
    if get_origin(kind) is tuple:
        return f"a list of {_spelled(get_args(kind)[0]).split()[-1]}s"
    words = {int: "an integer", float: "a number", str: "a string", bool: "true or false", Path: "a path in quotes"}
    return words.get(kind, "[first, end] of the steps" if kind is range else "a table")
