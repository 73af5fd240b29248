"""The settings file of `iqareward train`: its keys, and errors that name the key at fault."""

import difflib
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

from iqareward.diffusion import Degradation, RolloutConfig, TrainConfig
from iqareward.optional import require

PRESETS = {"tiny": ((16, 32, 32), 1), "small": ((32, 64, 128), 1), "base": ((64, 128, 256), 2)}


@dataclass(frozen=True)
class SFTConfig:
    """Table `[sft]`: how a preset is trained before RL."""

    updates: int = 2000
    batch_size: int = 16
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.updates < 0 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError(f"expected updates >= 0, batch_size >= 1 and learning_rate > 0, got {self}.")


@dataclass(frozen=True)
class ValidationConfig:
    """Table `[validation]`: images that are never trained on, and the rewards that score their restorations."""

    images: int = 8
    rewards: tuple[str, ...] = ("psnr", "ssim")
    every: int = 25
    stop_on: str | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.images < 1 or self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"expected images, every and patience >= 1, got {self}.")
        if (self.patience is not None and self.stop_on is None) or self.stop_on not in (None, *self.rewards):
            raise ValueError(f"expected stop_on among the rewards {list(self.rewards)}, got {self.stop_on!r}.")


@dataclass(frozen=True)
class RunConfig:
    """The whole file; `iqareward train --example` prints it with a comment on every key."""

    __pydantic_config__ = {"extra": "forbid", "strict": True, "arbitrary_types_allowed": True}  # noqa: RUF012

    folder: Path
    reward: str
    output: Path
    model: str = "small"
    size: int = 64
    crops: int = 4
    degraded_folder: Path | None = None
    updates: int = 200
    save_every: int = 25
    objective: Literal["diffusion_nft", "clipped_policy_gradient"] = "diffusion_nft"
    seed: int = 0
    resume: bool = False
    trackers: tuple[str, ...] = ()
    degradation: Degradation = field(default_factory=Degradation)
    sft: SFTConfig = field(default_factory=SFTConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        if self.model not in PRESETS and not Path(self.model).is_dir():
            raise ValueError(f"expected model as one of {list(PRESETS)} or as a folder, got {self.model!r}.")
        if min(self.size, self.crops, self.updates, self.save_every) < 1 or self.seed < 0:
            raise ValueError("expected size, crops, updates and save_every >= 1 and seed >= 0.")


def read_config(path: Path) -> RunConfig:
    """The settings in a TOML file.

    Args:
        path: The file; paths inside are relative to where the command runs.

    Raises:
        ValueError: The file is not TOML, or a key is unknown, missing or wrong; the key is named.
        OSError: The file cannot be read.
    """
    pydantic: Any = require("pydantic", extra="diffusers", purpose="iqareward train")
    content = path.read_bytes()
    try:
        table = tomllib.loads(content.decode())
    except Exception as error:  # also of other encodings, or nested too deep
        raise ValueError(f"{path} is not TOML: {error}") from error
    if "degraded_folder" in table and "degradation" in table:
        raise ValueError(f"{path}: expected `degraded_folder` or the table `degradation`, got both. Remove one.")
    rollouts = table.get("rollout")
    window: Any = rollouts.pop("window", None) if isinstance(rollouts, dict) else None
    if window is not None and not (isinstance(window, list) and [type(step) for step in window] == [int, int]):
        raise ValueError(f"{path}: key `rollout.window` expected [first, end] of the steps, got {window!r}.")
    try:
        # As JSON, because strict types accept lists as tuples and strings as paths there only.
        config: RunConfig = pydantic.TypeAdapter(RunConfig).validate_json(json.dumps(table, default=str))
    except pydantic.ValidationError as error:
        raise ValueError(f"{path}: {_explained(error.errors())}") from None
    return config if window is None else replace(config, rollout=replace(config.rollout, window=range(*window)))


def _explained(errors: Sequence[Mapping[str, Any]]) -> str:
    """The first error in one sentence, with its key as the file spells it."""
    tables = {name: kind for name, kind in get_type_hints(RunConfig).items() if is_dataclass(kind)}
    known = [item.name for item in fields(RunConfig)]
    known += [f"{name}.{item.name}" for name, kind in tables.items() for item in fields(kind)]
    location, kind = errors[0]["loc"], errors[0]["type"]
    key = ".".join(location[: 2 if location and location[0] in tables else 1])
    if kind == "missing":
        return f"missing key `{key}`; `iqareward train --example` shows every key."
    if kind == "unexpected_keyword_argument":
        near = difflib.get_close_matches(key, known, n=1)
        return f"unknown key `{key}`; " + (f"did you mean `{near[0]}`?" if near else f"known are {', '.join(known)}.")
    if kind == "value_error":
        reason = str(errors[0]["ctx"]["error"])
        return f"table `{key}`: {reason}" if key else reason
    same = [error["msg"] for error in errors if error["loc"][:2] == location[:2]]  # one for each type of a union
    expected = " or ".join(message.removeprefix("Input should be ") for message in same)
    expected = expected.replace("array", "list").replace("an object", "a table")
    return f"key `{key}` expected {expected}, got {errors[0]['input']!r}."
