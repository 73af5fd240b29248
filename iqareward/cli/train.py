"""Train a policy on images: SFT if it starts from scratch, then difficulty-adaptive RL."""

import inspect
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.console import Console
from safetensors.torch import load_file

from iqareward.atomic import atomic_write, write_text
from iqareward.cli.text import say
from iqareward.cli.train_config import RunConfig, make_data, make_on, make_policy, read_config
from iqareward.cli.train_data import Data, check_rewards, split, unusable
from iqareward.cli.train_policies import save_policy
from iqareward.diffusion import (
    DifficultyAdaptiveTrainer,
    DiffusionNFT,
    DiffusionPolicy,
    FolderPairs,
    Pairs,
    PixelPolicy,
    Policy,
    TrainConfig,
    TrainingError,
    Validation,
    batches,
    supervised,
)
from iqareward.diffusion.checkpoint import (
    CHECKPOINT,
    LOCK,
    described,
    differences,
    exclusive,
    latest,
    load_state,
    load_trained_weights,
    trained_weights,
)
from iqareward.monitor import HackingMonitor
from iqareward.optional import require, require_diffusers
from iqareward.types import Reward

EXAMPLE = Path(__file__).with_name("train.toml")
# What may change without making a resumed run another one.
_MAY_CHANGE = (
    "resume",
    "save_every",
    "trackers",
    "updates",
    "num_workers",
    "overlap",
    "rollout.inputs_at_once",
    "train.rows_at_once",
)
# The same while only SFT is done: what SFT has not used.
_NOT_IN_SFT = (
    "reward",
    "objective",
    "weighter",
    "metric",
    "memory",
    "input_quality",
    "reachable",
    "rollout",
    "train",
    "validation.rewards",
    "validation.every",
    "validation.num_steps",
    "validation.eta",
    "validation.stop_on",
    "validation.patience",
    "validation.inputs_at_once",
)
_SFT_HISTORY, _SFT_WEIGHTS = "history-sft.jsonl", "sft.safetensors"
_LESS_MEMORY = (
    "Lower rollout.inputs_at_once or train.rows_at_once and go on with --resume; if it was SFT that failed, "
    "lower sft.rows_at_once or data.size and start again."
)
_SHOWN = 10  # files that are left out and named


def run(file: Path, messages: Console, *, resume: bool = False) -> Path:
    """Do what the file says; returns the folder of the trained model.

    Args:
        file: See `iqareward train --example`.
        messages: Where progress is told.
        resume: Go on with the run in `output`.

    Raises:
        ValueError: A key, image or earlier run does not fit, or another run uses `output`; it is named.
        TrainingError: The run cannot go on, see `DifficultyAdaptiveTrainer.train`; or the device has too little memory.
        ImportError: The extra `diffusers`, a tracker or a reward's package is missing.
    """
    config = read_config(file)
    resume = resume or config.resume
    accelerator = _accelerator(config)
    require_diffusers("iqareward train")

    def tell(text: str) -> None:
        if accelerator.is_main_process:
            say(messages, text)

    with _folder(config.output, accelerator):
        _open_output(config, file, accelerator, resume=resume)
        data = _data(config, accelerator, tell)
        device = accelerator.device
        rewards, held_out = (
            {name: make_on(device, call, f"{key}.{name}") for name, call in calls.items()}
            for key, calls in (("reward", config.reward), ("validation.rewards", config.validation.rewards))
        )
        quality = None if config.input_quality is None else make_on(device, config.input_quality, "input_quality")
        named = {f"reward.{name}": each for name, each in rewards.items()}
        named |= {f"validation.rewards.{name}": each for name, each in held_out.items()}
        check_rewards(named, data)
        tell(
            f"{len(data.train)} inputs to train on, {len(data.held_out)} held out; everything goes to {config.output}/"
        )
        policy = _starting_policy(config, data, accelerator)
        trainer = DifficultyAdaptiveTrainer(
            policy,
            rewards["reward"] if list(rewards) == ["reward"] else rewards,
            data.train,
            output_dir=config.output,
            weighter=config.weighter,
            objective=make_on(device, config.objective, "objective"),
            rollout_config=config.rollout,
            train_config=_train_config(config),
            validation=_validation(config, data, held_out),
            memory=None if config.memory is None else config.memory(len(data.train)),
            metric=make_on(device, config.metric, "metric") if isinstance(config.metric, partial) else config.metric,
            reward_weights=config.reward_weights,
            input_quality=quality,
            reachable=config.reachable,
            accelerator=accelerator,
            sft_updates=config.sft_updates,
            num_workers=config.num_workers,
            overlap=config.overlap,
            seed=config.seed,
        )
        every = config.validation.every
        trainer.train(config.updates, save_every=config.save_every, validate_every=every, resume=resume)
        accelerator.end_training()
        return _finish(trainer, policy, config, tell)


def _data(config: RunConfig, accelerator: Any, tell: Callable[[str], None]) -> Data:
    """The inputs, without files that cannot be used; each process looks at its share of them."""
    from accelerate.utils import gather_object

    pairs: Pairs = make_data(config.data, "data", seed=config.seed)
    if not isinstance(pairs, FolderPairs):
        return split(config, pairs)
    mine = range(len(pairs.names))[accelerator.process_index :: accelerator.num_processes]
    found = unusable(pairs, mine, shown=accelerator.is_main_process)
    left_out: dict[int, str] = dict(gather_object(list(found.items())))
    if left_out:
        tell(f"{len(left_out)} of {len(pairs.names)} images left out, because they cannot be used:")
        for problem in list(left_out.values())[:_SHOWN]:
            tell(f"  {problem}")
        if len(left_out) > _SHOWN:
            tell(f"  and {len(left_out) - _SHOWN} more")
    return split(config, pairs, left_out)


def _accelerator(config: RunConfig) -> Any:
    """Devices and trackers.

    Raises:
        ValueError: An unknown tracker, or FSDP.
        ImportError: Accelerate or the package of a tracker is missing.
    """
    accelerate: Any = require("accelerate", extra="diffusers", purpose="iqareward train")
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    for tracker in config.trackers:
        if tracker not in LOGGER_TYPE_TO_CLASS:
            raise ValueError(f"key `trackers` expected names out of {sorted(LOGGER_TYPE_TO_CLASS)}, got {tracker!r}.")
        if tracker not in available:  # accelerate would leave it out without a word
            raise ImportError(f"key `trackers` names {tracker}, which is not installed. Run: pip install {tracker}")
    accelerator = accelerate.Accelerator(log_with=list(config.trackers) or None, project_dir=config.output / "logs")
    if str(accelerator.distributed_type).endswith("FSDP"):
        raise ValueError(
            "iqareward train expected processes with whole copies of the model, got FSDP, whose model it cannot write "
            "as a folder. Launch it with --multi_gpu, or use DifficultyAdaptiveTrainer in Python."
        )
    return accelerator


def _begun(output: Path) -> str:
    """What a run has left in `output` that is worth going on from, in words; an update is, the calibration is not.

    Raises:
        ValueError: The checkpoint is damaged.
    """
    file = latest(output / CHECKPOINT)
    if file is not None and load_state(file).get("updates") != 0:
        return "a run"
    return "a run that has done its SFT" if (output / _SFT_WEIGHTS).is_file() else ""


@contextmanager
def _folder(output: Path, accelerator: Any) -> Generator[None]:
    """Take `output` for this run; if it fails before the first update, leave the folder as it was."""
    before = {item.name for item in output.iterdir()} if output.is_dir() else None
    with exclusive(output, accelerator):
        try:
            yield
        except BaseException as error:
            worth_keeping = any((output / name).exists() for name in (_SFT_HISTORY, _SFT_WEIGHTS, CHECKPOINT))
            if accelerator.is_main_process and not worth_keeping:
                _remove(output, before)
            if isinstance(error, torch.OutOfMemoryError):
                raise TrainingError(f"{str(error).partition('. ')[0]}. {_LESS_MEMORY}") from error
            raise


def _remove(output: Path, before: set[str] | None) -> None:
    """Remove what was not there before, the lock last, because the folder is free from then on."""
    for item in sorted(output.iterdir(), key=lambda item: item.name == LOCK):
        if item.name in (before or ()):
            continue
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()
    if before is None:
        with suppress(OSError):  # another run has just taken it
            output.rmdir()


def _open_output(config: RunConfig, file: Path, accelerator: Any, *, resume: bool) -> None:
    """Keep a copy of the settings in `output`, beside which a resumed run must not differ."""
    copy, begun = config.output / "config.toml", _begun(config.output)
    if begun and not resume:
        raise ValueError(f"{config.output} holds {begun}. Go on with --resume, or choose another `output`.")
    if begun and copy.is_file():
        may = _MAY_CHANGE if begun == "a run" else _MAY_CHANGE + _NOT_IN_SFT
        found = differences(described(read_config(copy)), described(config))
        changed = {key: words for key, words in found.items() if not key.startswith(may)}
        if changed:
            listed = "; ".join(f"`{key}` {words}" for key, words in changed.items())
            raise ValueError(
                f"{file} differs from the run in {config.output}: {listed}. A resumed run may change "
                f"{', '.join(may)} only: restore the others, or choose another `output`."
            )
    accelerator.wait_for_everyone()  # all have looked before one writes
    if accelerator.is_main_process:
        if begun != "a run":
            (config.output / CHECKPOINT).unlink(missing_ok=True)  # of no update, and maybe of other settings
        write_text(copy, file.read_text(encoding="utf-8"))


def _starting_policy(config: RunConfig, data: Data, accelerator: Any) -> Policy:
    """The policy before RL: as the settings give it, with the SFT of the run to be resumed, or with SFT now."""
    policy = make_policy(config.policy, seed=config.seed)
    if config.objective.func is DiffusionNFT and not isinstance(policy, DiffusionPolicy):
        raise ValueError(
            "key `objective` expected another one than DiffusionNFT, which adds noise to samples of a DiffusionPolicy, "
            f"got it for a {type(policy).__name__}. Use ClippedPolicyGradient or GroupDPO."
        )
    _check_sizes(policy, data)
    weights = config.output / _SFT_WEIGHTS
    if weights.is_file():
        load_trained_weights(policy.model, load_file(weights))
    elif config.sft_updates:
        if config.trackers:
            accelerator.init_trackers("iqareward")
        options = {item.name: getattr(config.sft, item.name) for item in fields(config.sft) if item.name != "updates"}
        supervised(
            policy,
            data.train,
            num_updates=config.sft_updates,
            accelerator=accelerator,
            num_workers=config.num_workers,
            history_file=config.output / _SFT_HISTORY,
            seed=config.seed,
            **options,
        )
        if accelerator.is_main_process:
            _ = save_policy(policy, config.output / "sft")
            _write_weights(policy, weights)
        accelerator.wait_for_everyone()
    return policy


def _write_weights(policy: Policy, file: Path) -> None:
    with atomic_write(file) as whole:
        whole.write(safetensors.torch.save(trained_weights(policy.model)))


def _check_sizes(policy: Policy, data: Data) -> None:
    """Name the key, where a UNet would say that sizes of tensors do not match."""
    if isinstance(policy, PixelPolicy):
        model: Any = policy.model
        factor = 2 ** (len(model.config.block_out_channels) - 1)
        batch = batches(data.train, [0])[0]
        side = policy.scale * batch.degraded.shape[-1]
        if batch.references is not None and batch.references.shape[-1] != side:
            scale = batch.references.shape[-1] / batch.degraded.shape[-1]
            raise ValueError(
                f"key `policy.scale` expected {scale:g}, because the ground truth is so many times larger than the "
                f"degraded images, got {policy.scale}."
            )
        if side % factor:
            raise ValueError(f"key `data.size` expected a multiple of {factor} for this model, got {side}.")


def _train_config(config: RunConfig) -> TrainConfig:
    """The settings, with a learning-rate schedule that ends with the run if the file does not say when."""
    schedule: Any = config.train.lr_schedule
    if schedule is None or "num_training_steps" not in inspect.signature(schedule).parameters:
        return config.train
    steps = config.updates * config.train.minibatches * config.train.epochs
    options = {"num_training_steps": steps} | schedule.keywords
    return replace(config.train, lr_schedule=partial(schedule.func, *schedule.args, **options))


def _validation(config: RunConfig, data: Data, rewards: Mapping[str, Reward]) -> Validation:
    held_out = config.validation
    read = batches(data.held_out, range(len(data.held_out)))
    comparable = len(read) == 1 and read[0].references is not None
    return Validation(
        data.held_out,
        rewards,
        num_steps=held_out.num_steps,
        eta=held_out.eta,
        monitor=HackingMonitor(rewards) if comparable else None,
        stop_on=held_out.stop_on,
        patience=held_out.patience,
        inputs_at_once=held_out.inputs_at_once,
    )


def _finish(trainer: DifficultyAdaptiveTrainer, policy: Policy, config: RunConfig, tell: Callable[[str], None]) -> Path:
    """Write the model, and tell what became of the held-out images and where things are."""
    best, model = config.output / "best.safetensors", config.output / "model"
    with trainer.learner.averaged():
        if config.validation.stop_on is not None and best.is_file():
            load_trained_weights(policy.model, load_file(best))
        policy.model = trainer.accelerator.unwrap_model(policy.model, keep_fp32_wrapper=False)
        written = save_policy(policy, model) if trainer.accelerator.is_main_process else []
    looks = [line for line in trainer.history if "validation/reward" in line]
    for name in ("reward", *config.validation.rewards):
        first, last = (looks[place][f"validation/{name}"] for place in (0, -1))
        tell(f"  {name}, held-out images: {first:.4g} before RL, {last:.4g} after {looks[-1]['update']} updates")
    if looks[-1]["alarms"]:
        tell(f"The monitor warns: {looks[-1]['alarms']}")
    for line in written:
        tell(line)
    tell(f"{trainer.history_file} has a line per update; samples-*.png beside it show held-out images")
    tell(f"{trainer.checkpoint}: with --resume and more `updates` the run goes on")
    return model
