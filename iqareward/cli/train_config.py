"""The settings file of `iqareward train`: its keys, and errors that name the key at fault."""

import inspect
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch

import iqareward
from iqareward import rewards, schedules
from iqareward.advantages import RewardMemory
from iqareward.cli.train_calls import IN_FILE, Reader, extended, made, object_of
from iqareward.cli.train_policies import POLICIES, PRESETS
from iqareward.difficulty import rmse
from iqareward.diffusion import (
    ClippedPolicyGradient,
    Degradation,
    DegradationModel,
    DiffusionNFT,
    DirectRewardGradient,
    FaceDegradation,
    FolderPairs,
    GroupDPO,
    Objective,
    Pairs,
    Policy,
    RealESRGANDegradation,
    RolloutConfig,
    SyntheticPairs,
    TrainConfig,
    build_restorer,
    load_restorer,
)
from iqareward.diffusion.updates import MakeOptimizer, MakeSchedule
from iqareward.rewards.catalog import load
from iqareward.schedules import Schedule, Weighter, check_signal
from iqareward.types import Reward
from iqareward.weighting import AdaptiveWeighter

_OBJECTIVES = {each.__name__: each for each in (ClippedPolicyGradient, DiffusionNFT, DirectRewardGradient, GroupDPO)}
_DEGRADATIONS = {each.__name__: each for each in (Degradation, RealESRGANDegradation, FaceDegradation)}
_FORMULAS = {
    name: getattr(schedules, name) for name in schedules.__all__ if name[0].islower() and name != "check_signal"
}
_OPTIMIZERS = {name: each for name, each in vars(torch.optim).items() if isinstance(each, type) and name != "Optimizer"}
# Of every policy, whether its constructor takes them or not.
SAMPLER = {name: hint for name, hint in get_type_hints(Policy).items() if name != "model"}


@dataclass(frozen=True)
class SFTConfig:
    """Table `[sft]`: how a policy is trained before RL; 0 updates, unless it is a preset, which starts from scratch."""

    updates: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    optimizer: MakeOptimizer | None = None
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    rows_at_once: int | None = None

    def __post_init__(self) -> None:
        if (self.updates or 0) < 0 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ValueError(f"expected updates >= 0, batch_size >= 1 and learning_rate > 0, got {self}.")


def _usual_rewards() -> Mapping[str, partial[Reward]]:
    return {name: partial(load, name) for name in ("psnr", "ssim")}


@dataclass(frozen=True)
class ValidationConfig:
    """Table `[validation]`: images that are never trained on, and the rewards that score their restorations."""

    images: int = 8
    data: partial[Pairs] | None = None
    rewards: Mapping[str, partial[Reward]] = field(default_factory=_usual_rewards)
    every: int = 25
    num_steps: int | None = None
    eta: float | None = None
    stop_on: str | None = None
    patience: int | None = None
    inputs_at_once: int = 16

    def __post_init__(self) -> None:
        if self.images < 1 or self.every < 1 or (self.patience is not None and self.patience < 1):
            raise ValueError(f"expected images, every and patience >= 1, got {self}.")
        if (self.patience is not None and self.stop_on is None) or self.stop_on not in (None, *self.rewards):
            raise ValueError(f"expected stop_on among the rewards {list(self.rewards)}, got {self.stop_on!r}.")


@dataclass(frozen=True)
class RunConfig:
    """The whole file; `iqareward train --example` prints it with a comment on every key."""

    data: partial[Pairs]
    reward: Mapping[str, partial[Reward]]
    output: Path
    policy: partial[Policy] = field(default_factory=lambda: partial(PRESETS["small"]))
    reward_weights: Mapping[str, float] | None = None
    objective: partial[Objective] = field(default_factory=lambda: partial(ClippedPolicyGradient))
    weighter: Weighter = field(default_factory=AdaptiveWeighter)
    metric: Callable[..., Any] = rmse
    memory: partial[RewardMemory] | None = None
    input_quality: partial[Reward] | None = None
    reachable: bool = False
    updates: int = 200
    save_every: int = 25
    seed: int = 0
    resume: bool = False
    trackers: tuple[str, ...] = ()
    num_workers: int = 0
    overlap: bool = False
    sft: SFTConfig = field(default_factory=SFTConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def __post_init__(self) -> None:
        if min(self.updates, self.save_every) < 1 or min(self.seed, self.num_workers) < 0:
            raise ValueError("expected updates and save_every >= 1, seed and num_workers >= 0.")
        unknown = sorted(set(self.reward_weights or {}) - set(self.reward))
        if unknown:
            raise ValueError(f"key `reward_weights` expected names of {list(self.reward)}, got {unknown}.")
        check_signal("key `weighter`", self.weighter, ("difficulty", "pass_rate"))

    @property
    def sft_updates(self) -> int:
        """Updates of SFT before RL."""
        from_scratch = self.policy.func is build_restorer
        return (2000 if from_scratch else 0) if self.sft.updates is None else self.sft.updates


def read_config(path: Path) -> RunConfig:
    """The settings in a TOML file; Python files that it names are run.

    Args:
        path: The file; paths inside are relative to where the command runs.

    Raises:
        ValueError: The file is not TOML, or a key is unknown, missing or wrong; the key is named.
        OSError: The file cannot be read.
    """
    content = path.read_bytes()
    try:
        table = tomllib.loads(content.decode())
    except Exception as error:  # also of other encodings, or nested too deep
        raise ValueError(f"{path} is not TOML: {error}") from error
    try:
        return made(partial(RunConfig, **_READER.options(RunConfig, table, "")), "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def make_policy(call: partial[Policy], *, seed: int) -> Policy:
    """The policy of the settings, on the CPU."""
    call = _seeded(call, seed)
    own = inspect.signature(call.func).parameters
    sampler = {name: value for name, value in call.keywords.items() if name in SAMPLER and name not in own}
    options = {name: value for name, value in call.keywords.items() if name not in sampler}
    policy: Policy = made(partial(call.func, *call.args, **options), "policy")
    for name, value in sampler.items():
        setattr(policy, name, value)
    return policy


def make_data(call: partial[Pairs], key: str, *, seed: int) -> Pairs:
    """A data set of the settings."""
    return made(_seeded(call, seed), key)


def _seeded(call: partial[Any], seed: int) -> partial[Any]:
    """The call with the seed of the run, if it takes one and the file gives no other."""
    if "seed" in inspect.signature(call.func).parameters and "seed" not in call.keywords:
        return extended(call, seed=seed)
    return call


def make_on(device: torch.device, call: partial[Any], key: str) -> Any:
    """A reward of the settings, or an objective that has one, with weights on `device`."""

    def option(value: Any, key: str) -> Any:
        if isinstance(value, Mapping):
            return {name: option(each, f"{key}.{name}") for name, each in value.items()}
        return make_on(device, value, key) if isinstance(value, partial) else value

    options = {name: option(value, f"{key}.{name}") for name, value in call.keywords.items()}
    if "device" in inspect.signature(call.func).parameters:
        options = {"device": device} | options
    return made(partial(call.func, *call.args, **options), key)


def _policy(spec: Any, key: str) -> partial[Policy]:
    if isinstance(spec, str) and Path(spec).is_dir():
        return partial(load_restorer, folder=spec)
    return _READER.call(spec, key, PRESETS | POLICIES, extra=SAMPLER, also="a folder of save_restorer ")


def _data(spec: Any, key: str) -> partial[Pairs]:
    if isinstance(spec, str) and IN_FILE not in spec:
        return partial(FolderPairs, source=spec)
    table = {"name": "FolderPairs"} | spec if isinstance(spec, dict) else spec
    return _READER.call(table, key, {"FolderPairs": FolderPairs, "SyntheticPairs": SyntheticPairs})


def _reward(spec: Any, key: str) -> partial[Reward]:
    if _is_sum(spec):
        return partial(load, spec)
    options = {"name": spec} if isinstance(spec, str) else spec
    if not isinstance(options, dict) or not isinstance(options.get("name"), str):
        raise ValueError(f"key `{key}` expected a name of `iqareward list` or a table with `name`, got {spec!r}.")
    name = options["name"]
    homes = (iqareward, rewards) if name.isidentifier() else ()
    kind = next((getattr(home, name) for home in homes if hasattr(home, name)), None)
    if IN_FILE in name and isinstance(found := object_of(name, key, {}), Reward) and not isinstance(found, type):
        return partial(_itself, found)
    if IN_FILE in name or isinstance(kind, type):
        return _READER.call(options, key, {name: kind} if isinstance(kind, type) else {}, given=("device",))
    return partial(load, spec)


def _is_sum(spec: Any) -> bool:
    """Whether it is a sum as `load` takes it: names with weights or options, or a list of tables with `weight`."""
    if isinstance(spec, list):
        return bool(spec) and all(isinstance(each, dict) and "weight" in each for each in spec)
    values = spec.values() if isinstance(spec, dict) and "name" not in spec else ()
    return bool(values) and all(isinstance(each, int | float) or _is_options(each) for each in values)


def _is_options(table: Any) -> bool:
    return isinstance(table, dict) and "name" not in table


def _itself(reward: Reward) -> Reward:
    return reward


def _rewards(spec: Any, key: str) -> Mapping[str, partial[Reward]]:
    """One reward, or several by name, or a list of names."""
    if isinstance(spec, list) and all(isinstance(each, str) for each in spec):
        spec = {each: each for each in spec}
    if isinstance(spec, dict) and "name" not in spec and not _is_sum(spec):
        return {name: _reward(each, f"{key}.{name}") for name, each in spec.items()}
    return {"reward": _reward(spec, key)}


def _objective(spec: Any, key: str) -> partial[Objective]:
    return _READER.call(spec, key, _OBJECTIVES)


def _degradation(spec: Any, key: str) -> DegradationModel:
    table = {"name": "Degradation"} | spec if isinstance(spec, dict) else spec
    return made(_READER.call(table, key, _DEGRADATIONS), key)


def _weighter(spec: Any, key: str) -> Weighter:
    """A weighter, or a formula as a `Schedule`."""
    choices = {"AdaptiveWeighter": AdaptiveWeighter} | _FORMULAS
    table = {"name": "AdaptiveWeighter"} | spec if isinstance(spec, dict) else spec
    given, extra = ("difficulty", "pass_rate", "step", "bins", "has_signal", "valid"), {"pass_distance": float}
    name = table["name"] if isinstance(table, dict) else table
    function = object_of(name, key, choices) if isinstance(name, str) else None
    is_formula = next(iter(inspect.signature(function).parameters), "") in given if callable(function) else False
    call = _READER.call(table, key, choices, given=given if is_formula else (), extra=extra if is_formula else None)
    if not is_formula:
        return made(call, key)
    options = dict(call.keywords)
    distance = options.pop("pass_distance", None)
    return made(partial(Schedule, partial(call.func, **options), pass_distance=distance), key)


def _metric(spec: Any, key: str) -> Callable[..., Any]:
    """The distance, or the call of a reward that becomes one."""
    return rmse if spec == "rmse" else _reward(spec, key)


def _memory(spec: Any, key: str) -> partial[RewardMemory]:
    return partial(RewardMemory, **_READER.options(RewardMemory, spec, key, given=("num_inputs",)))


def _optimizer(spec: Any, key: str) -> partial[Any]:
    return _READER.call(
        spec, key, _OPTIMIZERS, given=("params",), also="bitsandbytes.optim.AdamW8bit or another class "
    )


def _lr_schedule(spec: Any, key: str) -> partial[Any]:
    from diffusers.optimization import SchedulerType, get_scheduler

    choices = {each.value: partial(get_scheduler, each.value, num_warmup_steps=0) for each in SchedulerType}
    return _READER.call(spec, key, choices, given=("name", "optimizer"))


def _dtype(spec: Any, key: str) -> torch.dtype:
    found = getattr(torch, spec, None) if isinstance(spec, str) else None
    if not isinstance(found, torch.dtype):
        raise ValueError(f"key `{key}` expected a dtype such as 'bfloat16', got {spec!r}.")
    return found


def _window(spec: Any, key: str) -> range:
    if not (isinstance(spec, list) and [type(step) for step in spec] == [int, int]):
        raise ValueError(f"key `{key}` expected [first, end] of the steps, got {spec!r}.")
    return range(*spec)


_READER = Reader(
    (
        (partial[Policy], _policy),
        (partial[Pairs], _data),
        (partial[Reward], _reward),
        (Reward, _reward),
        (Mapping[str, partial[Reward]], _rewards),
        (Mapping[str, Reward], _rewards),
        (partial[RewardMemory], _memory),
        (partial[Objective], _objective),
        (DegradationModel, _degradation),
        (Weighter, _weighter),
        (Callable[..., Any], _metric),
        (MakeOptimizer, _optimizer),
        (MakeSchedule, _lr_schedule),
        (torch.dtype, _dtype),
        (range, _window),
    )
)
