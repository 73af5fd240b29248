"""A training run of seconds; `python -m tests.diffusion.train_tiny FOLDER KILLS` kills one again and again."""

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator

from iqareward.advantages import RewardMemory
from iqareward.diffusion import (
    DifficultyAdaptiveTrainer,
    RolloutConfig,
    StoredPairs,
    TrainConfig,
    Validation,
    batches,
)
from iqareward.diffusion.checkpoint import latest, load_state, trained_weights
from iqareward.diffusion.trainer import ROLLOUT
from iqareward.functional.psnr import psnr
from iqareward.rewards.metric import FullReference, NoReference
from tests.diffusion.tiny import TinyPairs, pixel_policy


def contrast(images):
    """Standard deviation of the pixels."""
    return images.flatten(1).std(1)


def trainer(folder, seed=0, sft_scale=1.0, **options) -> DifficultyAdaptiveTrainer:
    """A trainer of the tiny pixel policy with everything that has a state."""
    pairs = options.pop("pairs", None) or TinyPairs(16)
    held_out = TinyPairs(4, seed=1)
    defaults = {
        "rollout_config": RolloutConfig(group_size=2, num_steps=3, inputs_at_once=2),
        "train_config": TrainConfig(
            learning_rate=1e-3, inputs_per_update=4, rows_at_once=4, sft_scale=sft_scale, balance_every=2, ema_decay=0.9
        ),
        "validation": Validation(held_out, {"psnr": FullReference(psnr, higher_is_better=True)}, num_steps=3),
        "memory": RewardMemory(16, length=4),
        "accelerator": options.pop("accelerator", None) or Accelerator(cpu=True),
        "show_progress": False,
        "seed": seed,
    }
    reward = options.pop("reward", None) or NoReference(contrast, name="contrast", higher_is_better=True)
    policy = options.pop("policy", None) or pixel_policy()
    return DifficultyAdaptiveTrainer(policy, reward, pairs, output_dir=folder, **(defaults | options))


def overflow(run: DifficultyAdaptiveTrainer) -> None:
    """The SFT loss of the last input of the first update is NaN, and a pixel of the last input of the second one."""
    plain, spoilt = run.policy.sft_loss, batches(run.pairs, run.order.ids(0)[-1:])[0].references
    stored = StoredPairs.of(run.pairs)
    stored.degraded[run.order.ids(1)[-1], 0, 0, 0] = torch.nan
    run.pairs = stored

    def sft_loss(references, *more):
        hit = (references.cpu() == spoilt).flatten(1).all(1) & (run.updates == 0)
        return plain(references, *more) * torch.where(hit, torch.nan, 1.0)

    run.policy.sft_loss = sft_loss


def experience_of(run: DifficultyAdaptiveTrainer, update: int = 0, purpose: int = ROLLOUT):
    """What the run samples and scores for an update."""
    read = batches(run.pairs, run.order.ids(update), run.accelerator.device)
    return run.experiences(read, update, purpose)[0]


def use_reward(run: DifficultyAdaptiveTrainer, reward) -> None:
    """Let the run score with another reward from now on."""
    run.rewards, run.scorers = {"reward": reward}, [reward]


def kill_again_and_again(folder: Path, kills: int) -> None:
    """Train without end in `folder`; that many processes are killed, each after another, at moments of a seed.

    Half of them die after some processor time, the others just before one of the steps that a save is made of.
    """
    moments = random.Random(0)
    sys.stdout.reconfigure(line_buffering=True)  # nothing is pending that a child would repeat
    list(trainer(folder).pairs)  # imports and draws what the children would, one after another
    for number in range(kills):
        child = os.fork()
        if child == 0:
            if number % 2:
                die_before_file_step(folder, moments.randrange(1, 25))
            trainer(folder, sft_scale="balanced").train(10**6, save_every=1, validate_every=2, resume=True)
            os._exit(1)
        if number % 2 == 0:
            seconds, process = moments.uniform(0.1, 0.7), psutil.Process(child)
            while sum(process.cpu_times()[:2]) < seconds and process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.005)
            os.kill(child, signal.SIGKILL)
        else:
            moments.randrange(1, 25)  # as the child drew
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status), "the run ended by itself"
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        file = latest(folder / "checkpoint.pt")
        sys.stdout.write(f"{load_state(file)['updates'] if file else -1}\n")  # whole, whenever it was


def die_before_file_step(folder: Path, count: int) -> None:
    """Kill this process just before it opens, renames, links or removes something in the folder for that time."""
    left, steps = [count], {"open", "os.rename", "os.link", "os.remove"}

    def look(event: str, arguments: tuple) -> None:
        if event in steps and str(arguments[0]).startswith(str(folder)):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)


def one_of_two(rank: int, folder: Path, environment: dict[str, str]) -> None:
    """Two updates of a run that overflows, by one of two processes; the main one writes the final weights."""
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run = trainer(folder)
    overflow(run)
    run.train(2, save_every=1, validate_every=2)
    if run.accelerator.is_main_process:
        torch.save(trained_weights(run.policy.model), folder / "final.pt")
    run.accelerator.end_training()


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_again_and_again(Path(sys.argv[1]), int(sys.argv[2]))
