"""Train a restorer on a folder of images: SFT if it starts from scratch, then difficulty-adaptive RL."""

import logging
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file

from iqareward.atomic import write_text
from iqareward.cli.text import say
from iqareward.cli.train_config import PRESETS, RunConfig, read_config
from iqareward.cli.train_data import Data, check_rewards, folder_pairs, split, unusable
from iqareward.diffusion import (
    ClippedPolicyGradient,
    DifficultyAdaptiveTrainer,
    DiffusionNFT,
    PixelPolicy,
    TrainingError,
    Validation,
    build_restorer,
    load_restorer,
    save_restorer,
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
)
from iqareward.diffusion.policies import unwrapped
from iqareward.monitor import HackingMonitor
from iqareward.optional import require
from iqareward.rewards.catalog import load
from iqareward.types import Reward

EXAMPLE = Path(__file__).with_name("train.toml")
# What may change without making a resumed run another one.
_MAY_CHANGE = ("resume", "save_every", "trackers", "updates", "rollout.inputs_at_once", "train.micro_batch")
# The same while only SFT is done: what SFT has not used.
_NOT_IN_SFT = (
    "reward",
    "objective",
    "rollout",
    "train",
    "validation.rewards",
    "validation.every",
    "validation.stop_on",
    "validation.patience",
)
_SFT_HISTORY = "history-sft.jsonl"
_LESS_MEMORY = (
    "Lower rollout.inputs_at_once or train.micro_batch and go on with --resume; if it was SFT that failed, "
    "lower sft.batch_size or size and start again."
)
_SHOWN = 10  # files that are left out and named
# Who warns, as diffusers imports what it needs for quantised models, of packages that are not used here.
_IMPORT_WARNINGS = (
    "bitsandbytes.backends.cpu.ops",
    "diffusers.quantizers.torchao.torchao_quantizer",
    "torch.utils._pytree",
)


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
    _import_diffusers()

    def tell(text: str) -> None:
        if accelerator.is_main_process:
            say(messages, text)

    data = _data(config, accelerator, tell)
    reward = load(config.reward, device=accelerator.device)
    held_out = {name: load(name, device=accelerator.device) for name in config.validation.rewards}
    check_rewards({"reward": reward, **{f"validation.rewards {name}": each for name, each in held_out.items()}}, data)
    with _folder(config.output, accelerator):
        _open_output(config, file, accelerator, resume=resume)
        tell(f"{len(data.train)} crops to train on, {len(data.held_out)} held out; everything goes to {config.output}/")
        policy = _starting_policy(config, data, accelerator)
        trainer = DifficultyAdaptiveTrainer(
            policy,
            reward,
            data.train,
            output_dir=config.output,
            objective=DiffusionNFT() if config.objective == "diffusion_nft" else ClippedPolicyGradient(),
            rollout_config=config.rollout,
            train_config=config.train,
            validation=_validation(config, data, held_out),
            accelerator=accelerator,
            sft_updates=config.sft.updates if config.model in PRESETS else 0,
            seed=config.seed,
        )
        every = config.validation.every
        trainer.train(config.updates, save_every=config.save_every, validate_every=every, resume=resume)
        accelerator.end_training()
        return _finish(trainer, policy, config, tell)


def _import_diffusers() -> None:
    """Import the model class of diffusers without the warnings of packages for quantised models."""
    loggers = [logging.getLogger(name) for name in _IMPORT_WARNINGS]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        require("diffusers.models.unets.unet_2d", extra="diffusers", purpose="iqareward train")
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _data(config: RunConfig, accelerator: Any, tell: Callable[[str], None]) -> Data:
    """The images, without those that cannot be used; each process looks at its share of them."""
    from accelerate.utils import gather_object

    pairs = folder_pairs(config)
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
        ValueError: An unknown tracker.
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
    return accelerate.Accelerator(log_with=list(config.trackers) or None, project_dir=config.output / "logs")


def _begun(output: Path) -> str:
    """What a run has left in `output` that is worth going on from, in words; an update is, the calibration is not.

    Raises:
        ValueError: The checkpoint is damaged.
    """
    file = latest(output / CHECKPOINT)
    if file is not None and load_state(file).get("updates") != 0:
        return "a run"
    return "a run that has done its SFT" if (output / "sft").is_dir() else ""


@contextmanager
def _folder(output: Path, accelerator: Any) -> Generator[None]:
    """Take `output` for this run; if it fails before the first update, leave the folder as it was."""
    before = {item.name for item in output.iterdir()} if output.is_dir() else None
    with exclusive(output, accelerator):
        try:
            yield
        except BaseException as error:
            worth_keeping = any((output / name).exists() for name in (_SFT_HISTORY, "sft", CHECKPOINT))
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


def _starting_policy(config: RunConfig, data: Data, accelerator: Any) -> PixelPolicy:
    """The model before RL: from a folder, from the SFT of the run to be resumed, or from SFT now."""
    kept = config.output / "sft"
    scratch = config.model in PRESETS
    if not scratch or kept.is_dir():
        policy = load_restorer(kept if scratch else config.model)
    else:
        channels, layers = PRESETS[config.model]
        policy = build_restorer(channels, layers=layers, seed=config.seed)
    model: Any = policy.model
    factor = 2 ** (len(model.config.block_out_channels) - 1)
    if config.size % factor:
        raise ValueError(f"key `size` expected a multiple of {factor} for this model, got {config.size}.")
    if scratch and not kept.is_dir():
        sft = config.sft
        if config.trackers:
            accelerator.init_trackers("iqareward")
        supervised(
            policy,
            data.train,
            num_updates=sft.updates,
            batch_size=sft.batch_size,
            learning_rate=sft.learning_rate,
            accelerator=accelerator,
            history_file=config.output / _SFT_HISTORY,
            seed=config.seed,
        )
        if accelerator.is_main_process:
            save_restorer(policy, kept)
        accelerator.wait_for_everyone()
    return policy


def _validation(config: RunConfig, data: Data, rewards: Mapping[str, Reward]) -> Validation:
    held_out = config.validation
    return Validation(
        *data.held_out.batch(range(len(data.held_out))),
        rewards,
        num_steps=config.rollout.num_steps,
        monitor=HackingMonitor(rewards),
        stop_on=held_out.stop_on,
        patience=held_out.patience,
    )


def _finish(
    trainer: DifficultyAdaptiveTrainer, policy: PixelPolicy, config: RunConfig, tell: Callable[[str], None]
) -> Path:
    """Write the model, and tell what became of the held-out images and where things are."""
    best, model = config.output / "best.safetensors", config.output / "model"
    with trainer.learner.averaged():
        if config.validation.stop_on is not None and best.is_file():
            load_trained_weights(unwrapped(policy.model), load_file(best))
        if trainer.accelerator.is_main_process:
            save_restorer(policy, model)
    looks = [line for line in trainer.history if "validation/reward" in line]
    for name in ("reward", *config.validation.rewards):
        first, last = (looks[place][f"validation/{name}"] for place in (0, -1))
        tell(f"  {name}, held-out images: {first:.4g} before RL, {last:.4g} after {looks[-1]['update']} updates")
    if looks[-1]["alarms"]:
        tell(f"The monitor warns: {looks[-1]['alarms']}")
    tell(f"{model}/ is the trained restorer, for iqareward.diffusion.load_restorer")
    tell(f"{trainer.history_file} has a line per update; samples-*.png beside it show held-out images")
    tell(f"{trainer.checkpoint}: with --resume and more `updates` the run goes on")
    return model
