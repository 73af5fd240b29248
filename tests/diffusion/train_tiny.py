"""A training run of seconds, also as a program: `python -m tests.diffusion.train_tiny FOLDER UPDATES [--wait S]`."""

import argparse
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from iqareward.advantages import RewardMemory
from iqareward.diffusion.checkpoint import trained_weights
from iqareward.diffusion.data.pairs import SyntheticPairs
from iqareward.diffusion.experience import Sampling
from iqareward.diffusion.learner import Optimization
from iqareward.diffusion.policy import unwrapped
from iqareward.diffusion.trainer import DifficultyAdaptiveTrainer
from iqareward.diffusion.validation import Validation
from iqareward.functional.psnr import psnr
from iqareward.rewards.metric import FullReference, NoReference
from tests.diffusion.tiny import SIZE, pixel_policy


def contrast(images):
    """Standard deviation of the pixels."""
    return images.flatten(1).std(1)


def trainer(folder, wait=0.0, seed=0, sft_scale=1.0, **options) -> DifficultyAdaptiveTrainer:
    """A trainer of the tiny pixel policy with everything that has a state."""

    def reward(images):
        time.sleep(wait)
        return contrast(images)

    pairs = SyntheticPairs(16, size=SIZE)
    held_out = SyntheticPairs(4, size=SIZE, seed=1).batch(range(4))
    defaults = {
        "sampling": Sampling(group_size=2, num_steps=3, inputs_at_once=2),
        "optimization": Optimization(
            learning_rate=1e-3, inputs_per_update=4, micro_batch=2, sft_scale=sft_scale, balance_every=2, ema_decay=0.9
        ),
        "validation": Validation(*held_out, {"psnr": FullReference(psnr, higher_is_better=True)}, num_steps=3),
        "memory": RewardMemory(16, length=4),
        "accelerator": options.pop("accelerator", None) or Accelerator(cpu=True),
        "show_progress": False,
        "seed": seed,
    }
    judged = NoReference(reward, name="contrast", higher_is_better=True)
    policy = options.pop("policy", None) or pixel_policy()
    return DifficultyAdaptiveTrainer(policy, judged, pairs, output_dir=folder, **(defaults | options))


def main() -> None:
    """Train, resuming if possible; write the final weights of the main process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("updates", type=int)
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--balanced", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    run = trainer(options.folder, options.wait, sft_scale="balanced" if options.balanced else 1.0)
    run.train(options.updates, save_every=1, validate_every=2, resume=True)
    if run.accelerator.is_main_process:
        torch.save(trained_weights(unwrapped(run.policy.model)), options.folder / "final.pt")
    run.accelerator.end_training()


if __name__ == "__main__":
    main()
