"""One run: train from a start with a reward and a weighting, restore the test inputs, measure."""

import contextlib
import copy
import multiprocessing.connection
import os
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import iqareward
from benchmarks.restoration import world
from benchmarks.restoration.arms import (
    PICTURED,
    SFT,
    UNTRAINED,
    VARIANTS,
    WEIGHTERS,
    Job,
    LearningProgress,
    Variant,
)  # fmt: skip
from benchmarks.restoration.world import Bench, Scale
from examples.small_restorer.restorer import STEPS
from iqareward import FidelityFloor, QualityGain
from iqareward.difficulty import rmse
from iqareward.diffusion import (
    ClippedPolicyGradient,
    DifficultyAdaptiveTrainer,
    DirectRewardGradient,
    PixelPolicy,
    RolloutConfig,
    StoredPairs,
    TrainConfig,
    TrainingError,
    supervised,
)
from iqareward.types import Reward

EPOCHS = MINIBATCHES = 2
AVERAGE = 0.98  # decay of the averaged weights per optimiser step
SFT_BATCH = 16
SFT_RATE = {"converged": 1e-4, "early": 3e-4}  # of SFT with all of the compute; it decays
SAMPLED, SAMPLED_GROUP = ClippedPolicyGradient(clip=1e-3), 6  # of rewards that are not followed by their gradient
SAMPLED_INPUTS = 1 / 3  # of the inputs of an update: groups cost more than a gradient
FLOOR_INPUTS, BELOW_FLOOR = 120, 0.25  # training inputs that a floor is set on, and the share of them below it
COMPARED = ("sampled", "patches")  # rewards by which rollouts are compared; of patches, within a quarter of an input
GRADIENT_STEPS = 2  # that the reward's gradient goes through: the last one has too little noise to count
POINTS = 20  # of a history


@dataclass(frozen=True)
class Headroom:
    """How far the reward of an image stays below that of its ground truth."""

    reward: Reward

    bounds = (None, 0.0)

    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """`[B]` <= 0."""
        best = self.reward(references, references=references)
        return (self.reward(images, references=references) - best).clamp(max=0.0)


def reward_named(name: str, bench: Bench, start: PixelPolicy) -> Reward:
    """A reward of the study; a floor is the PSNR that the start misses on a quarter of the training inputs."""
    kind, _, how = name.partition(", ")
    gradient = how not in COMPARED
    if kind == "stlpips":
        reward = bench.st_lpips(differentiable=gradient)
    else:
        reward = iqareward.load(kind, differentiable=gradient)
    if how == "gain":
        return QualityGain(reward, iqareward.load("haarpsi[0.35, 1]", differentiable=True))
    if how == "floor":
        pairs = world.training(bench.scale)
        some = StoredPairs(pairs.degraded[:FLOOR_INPUTS], pairs.references[:FLOOR_INPUTS])
        psnr = iqareward.load("psnr", differentiable=True)
        floor = psnr(bench.restored(start, some), references=some.references).quantile(BELOW_FLOOR)
        return FidelityFloor(reward, psnr, floor=float(floor), low=-1.0 if kind == "stlpips" else 0.0)
    return reward


def evaluations(scale: Scale) -> int:
    """Network evaluations of a run that follows the reward's gradient; a backward pass counts as two."""
    rollouts = scale.inputs * scale.group
    return scale.updates * (rollouts * STEPS + EPOCHS * 3 * (GRADIENT_STEPS * rollouts + scale.inputs))


def run(job: Job, bench: Bench) -> dict[str, Any]:
    """The result of a job."""
    policy, pairs, began = bench.start(job.start), world.test(bench.scale), time.perf_counter()
    history: list[dict[str, Any]] = []
    if job.arm == SFT:
        continue_sft(policy, bench, job)
    elif job.arm not in UNTRAINED:
        history = train(job, policy, bench)
    seconds = time.perf_counter() - began
    steps = VARIANTS.get(job.arm, Variant(job.arm)).steps
    images = pairs.degraded if job.arm == "degraded" else bench.restored(policy, pairs, steps)
    found: dict[str, Any] = {**job._asdict(), "seconds": round(seconds, 1), "history": shortened(history)}
    if 0 < len(history) < bench.scale.updates:
        found["stopped"] = len(history)
    if job.arm in PICTURED and job.seed == 0 and job.reward == "haarpsi":
        found["strip"] = world.strip(images)
    return found | {"test": bench.measured(images, pairs)}


def continue_sft(policy: PixelPolicy, bench: Bench, job: Job) -> None:
    """SFT with the network evaluations of a run of RL."""
    supervised(
        policy,
        world.training(bench.scale),
        num_updates=max(1, evaluations(bench.scale) // (3 * SFT_BATCH)),
        batch_size=SFT_BATCH,
        learning_rate=SFT_RATE[job.start],
        ema_decay=AVERAGE,
        accelerator=bench.accelerator(),
        seed=job.seed,
        show_progress=False,
    )


def train(job: Job, policy: PixelPolicy, bench: Bench) -> list[dict[str, Any]]:
    """Train `policy`, leave the averaged weights in it, and return the updates.

    There are fewer of them where a reward is exploited until no gradient is finite any more.
    """
    scale, pairs, inputs = bench.scale, world.training(bench.scale), bench.scale.inputs
    how = job.reward.partition(", ")[2]
    if sampled := how in COMPARED:
        inputs = max(MINIBATCHES, round(inputs * SAMPLED_INPUTS))
    if how == "patches":
        pairs, inputs = world.quartered(pairs), 4 * inputs
    reward = reward_named(job.reward, bench, copy.deepcopy(policy))
    arm, _, rate = VARIANTS.get(job.arm, Variant(job.arm))
    progress = arm == "learning progress"
    weighter: Any = LearningProgress(errors(policy, bench)) if progress else WEIGHTERS[arm]()
    options: dict[str, Any] = {"metric": Headroom(reward)} if arm == "headroom" else {}
    with tempfile.TemporaryDirectory() as folder:
        trainer = DifficultyAdaptiveTrainer(
            policy,
            reward,
            pairs,
            output_dir=folder,
            weighter=weighter,
            objective=SAMPLED if sampled else DirectRewardGradient(reward, checkpointed=False),
            rollout_config=RolloutConfig(SAMPLED_GROUP if sampled else scale.group, num_steps=policy.num_steps),
            train_config=TrainConfig(
                learning_rate=rate * scale.learning_rate,
                inputs_per_update=inputs,
                minibatches=MINIBATCHES,
                epochs=EPOCHS,
                rows_at_once=None,
                sft_scale="balanced",
                ema_decay=AVERAGE,
            ),
            accelerator=bench.accelerator(),
            show_progress=False,
            seed=job.seed,
            **options,
        )
        if progress:
            weighter.ids = trainer.order.ids
        with contextlib.suppress(TrainingError):
            trainer.train(scale.updates, save_every=scale.updates)
    assert trainer.learner.ema is not None, "AVERAGE > 0"
    trainer.learner.ema.copy_to(trainer.learner.weights)
    policy.model = trainer.accelerator.unwrap_model(policy.model, keep_fp32_wrapper=False)
    return trainer.history[1:]


def errors(policy: PixelPolicy, bench: Bench) -> Tensor:
    """RMSE `[N]` of the start on all training inputs."""
    pairs = world.training(bench.scale)
    return rmse(bench.restored(policy, pairs), pairs.references)


def shortened(history: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Means over equal stretches of the updates."""
    if not history:
        return {}
    stretches = np.array_split(np.arange(len(history)), min(POINTS, len(history)))
    names = ("update", "reward", "difficulty", "rl_share", "sft_share", "has_signal")
    return {
        name: [round(float(np.mean([history[place][name] for place in rows])), 4) for rows in stretches]
        for name in names
    }


_bench: list[Bench] = []  # of a worker


def end_with_parent() -> None:
    """End this process when its parent ends, however it ends; a pool's workers would go on and wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker of a pool"
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def prepare(scale: Scale, device: str, stlpips: str | None) -> None:
    """Make a worker ready."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(1)  # small convolutions gain nothing from more
    _bench[:] = [Bench(scale, device, stlpips)]


def work(job: Job) -> dict[str, Any]:
    """Do a job in a worker."""
    return run(job, _bench[0])
