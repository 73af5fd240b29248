"""Runs of the reference loop by name, each on any number of processes, with whole weights or shares of them."""

import os
import signal
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import fully_shard

from iqareward.diffusion import (
    ClippedPolicyGradient,
    DiffusionNFT,
    DirectRewardGradient,
    GroupDPO,
    RolloutConfig,
    SyntheticPairs,
    TrainConfig,
    Validation,
    add_lora,
    supervised,
)
from iqareward.diffusion.checkpoint import load_state, trained_weights
from iqareward.functional.psnr import psnr
from iqareward.rewards.metric import FullReference, NoReference
from iqareward.schedules import Schedule, constant
from tests.diffusion.tiny import TinyPairs, pixel_policy
from tests.diffusion.train_tiny import contrast, trainer

SGD = partial(torch.optim.SGD, lr=0.3)  # AdamW's first steps have one size, whatever the gradient: it hides rounding
UPDATES = 2
SHARDED = ("clipped", "nft", "dpo-all", "draft", "lora", "sizes", "adamw")  # what FSDP might do otherwise
BRIGHTEST = 0.5


def contrast_of_dark(images):
    """The contrast; NaN of bright images, so that inputs lose some rollouts or all."""
    return torch.where(images.flatten(1).mean(1) < BRIGHTEST, contrast(images), torch.nan)


@dataclass(frozen=True)
class Sizes:
    """Pairs of two sizes: processes get batches of other numbers and sizes."""

    num_inputs: int = 8

    def __len__(self):
        return self.num_inputs

    def __getitem__(self, index):
        return SyntheticPairs(self.num_inputs, size=16 if index % 3 else 8)[index]


def reward_of(function, **options):
    """A reward of the images alone."""
    return NoReference(function, name="contrast", higher_is_better=True, **options)


def config(**options):
    """Options of the update."""
    return TrainConfig(**{"inputs_per_update": 4, "rows_at_once": 3, "optimizer": SGD} | options)


def rollouts(size=2, **options):
    """Options of the rollouts."""
    return RolloutConfig(group_size=size, num_steps=3, **options)


def cases():
    """Options of each run, made anew."""
    differentiable = reward_of(contrast, differentiable=True)
    psnr_reward = FullReference(psnr, higher_is_better=True)
    several = {"reward": {"a": reward_of(contrast), "b": psnr_reward}, "memory": None}
    alone = Schedule(partial(constant, share=0.0))
    return {
        "clipped": {
            "objective": ClippedPolicyGradient(clip=0.1),
            "train_config": config(kl_beta=0.1, ema_decay=0.9, minibatches=2),
        },
        "stepwise": several | {"objective": ClippedPolicyGradient(), "rollout_config": rollouts(reward_steps=(0, 1))},
        "nft": {"objective": DiffusionNFT(), "train_config": config(kl_beta=0.1, minibatches=2)},
        "dpo-sum": {"objective": GroupDPO(beta=50.0)},
        "dpo-all": {"objective": GroupDPO(beta=50.0, pairs="all"), "train_config": config(ema_decay=0.9)},
        "draft": {"objective": DirectRewardGradient(differentiable, last_steps=2)},
        "refl": {"objective": DirectRewardGradient(differentiable, last_steps=0), "rollout_config": rollouts(1)},
        "sft": {"weighter": alone, "train_config": config(ema_decay=0.9)},
        "lora": {"lora": True, "objective": DiffusionNFT(), "train_config": config(kl_beta=0.1)},
        "nan": {"reward": reward_of(contrast_of_dark), "memory": None},
        "sizes": {"pairs": Sizes(), "train_config": config(ema_decay=0.9, kl_beta=0.1)},
        "adamw": {"train_config": config(epochs=2, optimizer=None, learning_rate=1e-3, ema_decay=0.9, kl_beta=0.1)},
        "rows: all": {"train_config": config(rows_at_once=None)},
        "rows: 1": {"train_config": config(rows_at_once=1)},
    }


def shard(model):
    """Divide the weights, block by block, as accelerate's plugin does."""
    network = getattr(model, "base_model", model)
    network = getattr(network, "model", network)
    for block in network.down_blocks:
        fully_shard(block)
    return fully_shard(model)


def run_of(name, folder, *, sharded=False, **changes):
    """The trainer of a case."""
    options = {"rollout_config": rollouts(), "train_config": config(), "pairs": TinyPairs(8)} | cases()[name] | changes
    policy = pixel_policy()
    if options.pop("lora", False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policy.model = add_lora(policy.model, rank=2, targets=["conv1", "conv2"])
    if sharded:
        shard(policy.model)
    rewards = {"psnr": FullReference(psnr, higher_is_better=True)}
    validation = Validation(TinyPairs(3, seed=1), rewards, num_steps=3, stop_on="psnr")
    return trainer(folder, policy=policy, validation=validation, **options)


def sft_of(batch_size, *, sharded=False):
    """Weights after SFT and its losses: batches that do not divide among processes, a NaN pixel, an average."""
    pairs, policy = list(TinyPairs(8)), pixel_policy()
    pairs[3] = pairs[3] | {"lq": torch.where(torch.rand(1, 16, 16) < 2, torch.nan, pairs[3]["lq"])}
    if sharded:
        shard(policy.model)
    options = {"num_updates": 4, "batch_size": batch_size, "learning_rate": 1.0, "optimizer": SGD, "ema_decay": 0.5}
    quiet = {"show_progress": False, "accelerator": Accelerator(cpu=True)}
    losses = supervised(policy, pairs, rows_at_once=2, **options, **quiet)
    return trained_weights(policy.model), losses


def with_plugin():
    """An accelerator with the FSDP plugin, which accelerate itself leaves out on CPUs."""
    accelerator = Accelerator(cpu=True)
    wrap = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["DownBlock2D"]}
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, **wrap)
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    return accelerator


def join(rank: int, environment: dict[str, str]) -> None:
    """Become one of the processes."""
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    Accelerator(cpu=True)


def all_cases(rank: int, folder: Path, environment: dict[str, str], sharded: tuple[bool, ...]) -> None:
    """Every case with whole weights and with shares, by one of the processes."""
    join(rank, environment)
    for kind in sharded:
        for name in SHARDED if kind else cases():
            run = run_of(name, folder / f"{name} {kind}", sharded=kind)
            run.train(UPDATES, save_every=2, validate_every=2)
            weights = trained_weights(run.policy.model)
            if rank == 0:
                torch.save((weights, run.history), folder / f"{name} {kind}.pt")
        for batch_size in (5, 1) if not kind else (5,):
            weights, losses = sft_of(batch_size, sharded=kind)
            if rank == 0:
                torch.save((weights, losses), folder / f"sft of {batch_size} {kind}.pt")
    with pytest.raises(ValueError, match="with FSDP, a number as sft_scale"):
        run_of("adamw", folder / "balanced", sharded=True, train_config=config(sft_scale="balanced"))
    run = run_of("adamw", folder / "state", sharded=True)
    run.learner.updates.optimizer.state[run.learner.weights[0]]["whole"] = torch.zeros(2)
    with pytest.raises(ValueError, match="state is sharded as its weights are"):
        run.save()
    run = run_of("clipped", folder / "plugin", accelerator=with_plugin())
    run.train(UPDATES, save_every=2, validate_every=2)
    weights = trained_weights(run.policy.model)
    if rank == 0:
        torch.save((weights, run.learner.updates.sharded), folder / "plugin.pt")
    Accelerator(cpu=True).end_training()


def killed(rank: int, folder: Path, environment: dict[str, str], sharded: bool) -> None:
    """A run whose last process is killed in the middle of the last update."""
    join(rank, environment)
    run = run_of("adamw", folder, sharded=sharded)
    plain = run.learner.updates.backward

    def backward(loss):
        if rank == 1 and run.updates == UPDATES - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(loss)

    run.learner.updates.backward = backward
    run.train(UPDATES, save_every=1, validate_every=2)


def resumed(rank: int, folders: dict[bool, Path], environment: dict[str, str]) -> None:
    """Runs that go on after a kill, by one of two processes."""
    join(rank, environment)
    for sharded, folder in folders.items():
        run = run_of("adamw", folder, sharded=sharded)
        run.train(UPDATES, save_every=1, validate_every=2, resume=True)
        weights = trained_weights(run.policy.model)
        if rank == 0:
            torch.save((weights, run.history, load_state(run.checkpoint)["learner"]), folder / "final.pt")
    Accelerator(cpu=True).end_training()
