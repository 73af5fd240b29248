"""`HackingMonitor` in the training loops of others: at intervals, without disturbing the run.

In a loop of your own, or one of diffusers' training scripts, call `PeriodicMonitor.step` before the first update and
after every one. In TRL, `monitor_callback` does so.
"""

import random
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from iqareward.atomic import atomic_write
from iqareward.groups import is_distributed
from iqareward.images import ImageLike
from iqareward.monitor import HackingMonitor
from iqareward.optional import require

__all__ = ["PeriodicMonitor", "monitor_callback"]

_FILE = "hacking_monitor.pt"  # in a checkpoint of TRL


@final
class PeriodicMonitor:
    """Sample the held-out inputs at intervals, and compare them with those before RL.

    The run goes on as if nothing had happened: the states of torch's, NumPy's and Python's random numbers and the
    training mode of every part of the models are restored, and no graph is built. An alarm is also a warning.

    Args:
        monitor: Compares. Give it `reward=`, the training reward, so that an alarm means that this has risen.
        sample: `sample() -> images` of the same held-out inputs in the same order, as `iqareward.to_images` reads them,
            floats in [0, 1]. It should start from the same noise each time.
        every: Steps between samples.
        models: What is trained; in evaluation mode while sampling.
        references: Ground truth of the held-out inputs, if there is any.
        inputs: Their degraded images, for rewards that need them.
        prompts: Their texts, for rewards that need them.
        gather: Every process samples inputs of its own, and those of all are compared; for models that are sharded, or
            to save time. Without it only the main process samples.

    Example:
        >>> weights, truth = torch.nn.Linear(1, 1), torch.rand(8, 3, 16, 16)
        >>> monitor = HackingMonitor(["ssim"], reward="psnr")
        >>> watched = PeriodicMonitor(monitor, lambda: 0.9 * truth, every=100, models=[weights], references=truth)
        >>> for step in range(201):  # log each dictionary that is not empty
        ...     logged = watched.step(step)
        >>> sorted(logged)[:4]
        ['monitor/alarms', 'monitor/change/colorfulness', 'monitor/change/dark_fraction', 'monitor/change/edge_density']
    """

    def __init__(
        self,
        monitor: HackingMonitor,
        sample: Callable[[], ImageLike],
        *,
        every: int,
        models: Sequence[nn.Module] = (),
        references: ImageLike | None = None,
        inputs: ImageLike | None = None,
        prompts: Sequence[str] | None = None,
        gather: bool = False,
    ) -> None:
        if every < 1:
            raise ValueError(f"PeriodicMonitor expected every >= 1, got {every}.")
        if not callable(sample) or isinstance(models, nn.Module):
            raise TypeError(
                "PeriodicMonitor expected `sample` as a function that returns images and `models` as a list of "
                f"networks, got {type(sample).__name__} and {type(models).__name__}."
            )
        self.monitor, self.sample, self.every = monitor, sample, every
        self.models, self.gather = list(models), gather
        self._columns: dict[str, Any] = {"references": references, "inputs": inputs, "prompts": prompts}

    def step(self, step: int) -> dict[str, float]:
        """Sample and compare if it is time; the first call measures the model before RL.

        Args:
            step: Number of updates so far. With several processes all must call it.

        Returns:
            `MonitorReport.log()` for the log of the run; empty if nothing was measured, as on other processes than the
            main one unless `gather` is set.
        """
        is_main = not is_distributed() or dist.get_rank() == 0
        if (self.monitor.calibrated and step % self.every) or not (is_main or self.gather):
            return {}
        with torch.no_grad(), undisturbed(self.models):
            self.monitor.add(self.sample(), **self._columns)
            report = self.monitor.step(gather=self.gather)
        for alarm in report.alarms if is_main else ():
            warnings.warn(f"step {step}: {alarm}", stacklevel=2)
        return report.log()


@contextmanager
def undisturbed(models: Sequence[nn.Module] = ()) -> Generator[None]:
    """Models are in evaluation mode within, and random numbers and modes are as before afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    states = random.getstate(), np.random.get_state()  # noqa: NPY002  code of others uses it
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices):
            for model in models:
                model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def monitor_callback(trainer: Any, watched: PeriodicMonitor, *, stop: bool = False) -> Any:
    """A callback that watches a run of TRL: `trainer.add_callback(monitor_callback(trainer, watched))`.

    It measures when training begins and after every `watched.every` optimiser steps, and logs to wherever the trainer
    logs. Its baseline is saved with every checkpoint, so that a resumed run compares with the model before RL.

    Args:
        trainer: A trainer of TRL, or any other of transformers.
        watched: What to measure. `sample` may use `trainer.model`, which is in evaluation mode then.
        stop: End training at the first alarm.

    Returns:
        A `transformers.TrainerCallback`.

    Raises:
        ValueError: `stop` with several processes of which only the main one measures: the others would go on.
    """
    transformers: Any = require("transformers", extra="trl", purpose="monitor_callback")
    if stop and not watched.gather and is_distributed() and dist.get_world_size() > 1:
        raise ValueError("monitor_callback expected PeriodicMonitor(gather=True) with stop=True on several processes.")

    class MonitorCallback(transformers.TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step > 0:
                file = _checkpoint(args, state) / _FILE
                if file.is_file():
                    watched.monitor.load_state_dict(torch.load(file, weights_only=True))
                    return  # this step was looked at before it was saved; twice would count as two in a row
                warnings.warn(f"{file} is missing: the monitor compares with the resumed model.", stacklevel=2)
            self._look(state, control)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._look(state, control)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                with atomic_write(_checkpoint(args, state) / _FILE) as file:
                    torch.save(watched.monitor.state_dict(), file)

        def _look(self, state: Any, control: Any) -> None:
            with undisturbed([trainer.model]):
                found = watched.step(state.global_step)
            if found:
                # Not the trainer's own `log`: TRL's empties the averages of the step, which are not logged yet. They
                # would not be logged any more if this counted as the log that is due.
                due = control.should_log
                transformers.Trainer.log(trainer, found)
                control.should_log = due
            if stop and found.get("monitor/alarms"):
                control.should_training_stop = True

    return MonitorCallback()


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
