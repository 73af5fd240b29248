"""Train a restorer on a folder of images: SFT if it starts from scratch, then difficulty-adaptive RL."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import load_file

from iqareward.atomic import write_text
from iqareward.cli.train_config import PRESETS, TrainConfig, read_config
from iqareward.cli.train_data import Data, check_rewards, split
from iqareward.diffusion.checkpoint import load_trained_weights
from iqareward.diffusion.forward_process import ForwardProcess
from iqareward.diffusion.monitor import HackingMonitor
from iqareward.diffusion.pixel import PixelPolicy
from iqareward.diffusion.policy import unwrapped
from iqareward.diffusion.policy_gradient import PolicyGradient
from iqareward.diffusion.restorer import build_restorer, load_restorer, save_restorer
from iqareward.diffusion.run_folder import described, differences, exclusive
from iqareward.diffusion.sft import supervised
from iqareward.diffusion.trainer import DifficultyAdaptiveTrainer
from iqareward.diffusion.validation import Validation
from iqareward.optional import require
from iqareward.rewards.catalog import load
from iqareward.types import Reward

EXAMPLE = Path(__file__).with_name("train.toml")
MAY_CHANGE = ("resume", "save_every", "trackers", "updates")  # without making a resumed run another one


def run(file: Path, messages: Console, *, resume: bool = False) -> Path:
    """Do what the file says; returns the folder of the trained model.

    Args:
        file: see `iqareward train --example`.
        messages: where progress is told.
        resume: go on with the run in `output`.

    Raises:
        ValueError: a key, image or earlier run does not fit, or another run uses `output`; it is named.
        TrainingError: the run cannot go on; see `DifficultyAdaptiveTrainer.train`.
        ImportError: the extra `diffusers`, a tracker or a reward's package is missing.
    """
    config = read_config(file)
    resume = resume or config.resume
    accelerator, data = _accelerator(config), split(config)
    reward = load(config.reward, device=accelerator.device)
    judges = {name: load(name, device=accelerator.device) for name in config.validation.judges}
    check_rewards({"reward": reward, **{f"validation.judges {name}": judge for name, judge in judges.items()}}, data)

    def say(text: str) -> None:
        if accelerator.is_main_process:
            messages.print(text, soft_wrap=True, highlight=False)

    with exclusive(config.output, accelerator):
        _open_output(config, file, accelerator, resume=resume)
        say(f"{len(data.train)} crops to train on, {len(data.held_out)} held out; everything goes to {config.output}/")
        policy = _starting_policy(config, data, accelerator, resume=resume)
        trainer = DifficultyAdaptiveTrainer(
            policy,
            reward,
            data.train,
            output_dir=config.output,
            objective=ForwardProcess() if config.objective == "forward_process" else PolicyGradient(),
            sampling=config.sampling,
            optimization=config.optimization,
            validation=_validation(config, data, judges),
            accelerator=accelerator,
            seed=config.seed,
        )
        every = config.validation.every
        trainer.train(config.updates, save_every=config.save_every, validate_every=every, resume=resume)
        accelerator.end_training()
        return _finish(trainer, policy, config, say)


def _accelerator(config: TrainConfig) -> Any:
    """Devices and trackers.

    Raises:
        ValueError: an unknown tracker.
        ImportError: accelerate or the package of a tracker is missing.
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


def _open_output(config: TrainConfig, file: Path, accelerator: Any, *, resume: bool) -> None:
    """Keep a copy of the settings in `output`, beside which a resumed run must not differ."""
    copy = config.output / "config.toml"
    if copy.is_file() and not resume:
        raise ValueError(f"{config.output} holds a run. Go on with --resume, or choose another `output`.")
    if copy.is_file():
        before = read_config(copy)
        changed = differences(described(before, without=MAY_CHANGE), described(config, without=MAY_CHANGE))
        if changed:
            listed = "; ".join(f"`{key}` {words}" for key, words in changed.items())
            raise ValueError(
                f"{file} differs from the run in {config.output}: {listed}. A resumed run may change "
                f"{', '.join(MAY_CHANGE)} only: restore the others, or choose another `output`."
            )
    accelerator.wait_for_everyone()  # all have looked before one writes
    if accelerator.is_main_process:
        write_text(copy, file.read_text(encoding="utf-8"))


def _starting_policy(config: TrainConfig, data: Data, accelerator: Any, *, resume: bool) -> PixelPolicy:
    """The model before RL: from a folder, from the SFT of the run to be resumed, or from SFT now."""
    kept = config.output / "sft"
    scratch = config.model in PRESETS
    if not scratch or (resume and kept.is_dir()):
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
        supervised(
            policy,
            data.train,
            num_updates=sft.updates,
            batch_size=sft.batch_size,
            learning_rate=sft.learning_rate,
            accelerator=accelerator,
            seed=config.seed,
        )
        if accelerator.is_main_process:
            save_restorer(policy, kept)
        accelerator.wait_for_everyone()
    return policy


def _validation(config: TrainConfig, data: Data, judges: Mapping[str, Reward]) -> Validation:
    held_out = config.validation
    return Validation(
        *data.held_out.batch(range(len(data.held_out))),
        judges,
        num_steps=config.sampling.num_steps,
        monitor=HackingMonitor(judges),
        stop_on=held_out.stop_on,
        patience=held_out.patience,
    )


def _finish(
    trainer: DifficultyAdaptiveTrainer, policy: PixelPolicy, config: TrainConfig, say: Callable[[str], None]
) -> Path:
    """Write the model, and tell what became of the held-out images and where things are."""
    best, model = config.output / "best.safetensors", config.output / "model"
    with trainer.learner.averaged():
        if config.validation.stop_on is not None and best.is_file():
            load_trained_weights(unwrapped(policy.model), load_file(best))
        if trainer.accelerator.is_main_process:
            save_restorer(policy, model)
    looks = [line for line in trainer.history if "validation/reward" in line]
    for name in ("reward", *config.validation.judges):
        first, last = (looks[place][f"validation/{name}"] for place in (0, -1))
        say(f"  {name}, held-out images: {first:.4g} before RL, {last:.4g} after {looks[-1]['update']} updates")
    if looks[-1]["alarms"]:
        say(f"[yellow]The monitor warns:[/] {looks[-1]['alarms']}")
    say(f"{model}/ is the trained restorer, for iqareward.diffusion.restorer.load_restorer")
    say(f"{trainer.history_file} has a line per update; samples-*.png beside it show held-out images")
    say(f"{trainer.checkpoint}: with --resume and more `updates` the run goes on")
    return model
