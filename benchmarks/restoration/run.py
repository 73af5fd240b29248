"""One arm with one seed: train, restore the test inputs and the photographs, measure."""

import copy
import json
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor

import iqareward
from benchmarks.restoration import world
from benchmarks.restoration.arms import Arm, arms
from benchmarks.restoration.judges import held_out_judge, trained_judge
from benchmarks.restoration.rewards import mirrored_niqe, study
from benchmarks.restoration.world import Job, Kept
from iqareward.difficulty import rmse
from iqareward.diffusion import (
    DifficultyAdaptiveTrainer,
    DiffusionNFT,
    DirectRewardGradient,
    PixelPolicy,
    RolloutConfig,
    StoredPairs,
    TrainConfig,
    Validation,
)
from iqareward.monitor import HackingMonitor
from iqareward.types import Reward

RATE, AVERAGE = 3e-4, 0.9  # of RL: learning rate, and decay of the averaged weights that are judged
SAMPLED_RATE, SAMPLED_GROUP = 5e-5, 6  # of RL that compares rollouts; a higher rate drowns in its noise
OBJECTIVE = DiffusionNFT(clip=2.0)
CONTINUED_RATE = 1e-3  # of SFT continued with all of the compute
LOOKS = 8  # of the monitor in the reward study
METRICS = ("ssim", "haarpsi", "gmsd", "piqe")


@dataclass(frozen=True)
class Headroom:
    """How far the reward of an image stays below that of its ground truth."""

    reward: Reward

    bounds = (None, 0.0)

    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """`[B]` <= 0."""
        best = self.reward(references, references=references)
        return (self.reward(images, references=references) - best).clamp(max=0.0)


def evaluations(scale: world.Scale, group: int, terms: int) -> int:
    """Network evaluations of the policy per update; a backward pass counts as two."""
    rollouts = scale.inputs * group
    return rollouts * scale.steps + terms * 3 * (rollouts + scale.inputs)


@torch.no_grad()
def measure(
    policy: PixelPolicy, job: Job, kept: Kept, judges: dict[str, Reward]
) -> tuple[dict[str, list[float]], Tensor]:
    """Every measure of the restoration of each input, higher is better but for `rmse`; and the restorations."""
    steps = 2 * job.scale.steps
    validation = Validation(kept, {}, num_steps=steps, inputs_at_once=96)
    images = validation.restore(policy, *validation.batches, seed=job.seed)
    measures = judges | {name: iqareward.load(name) for name in METRICS} | {"niqe": mirrored_niqe(job)}
    found = {name: judge(images, references=kept.references).tolist() for name, judge in measures.items()}
    return found | {"rmse": rmse(images, kept.references).tolist(), "severity": kept.severity.tolist()}, images


def run(job: Job) -> dict[str, Any]:
    """The result of a job, computed or read from its file."""
    file = job.folder / "results" / f"{job.name}.json"
    if file.exists():
        return json.loads(file.read_text())
    policy = world.restorer(job)
    judges: dict[str, Reward] = {"judge": trained_judge(job, policy), "held_out": held_out_judge(job, policy)}
    scale, arm = job.scale, arms(job.scale.rl_updates).get(job.arm)
    group, terms = (SAMPLED_GROUP, OBJECTIVE.num_terms) if arm and arm.sampled else (scale.group, 1)
    spent = 0 if job.arm == "frozen" else evaluations(scale, group, terms) * scale.rl_updates
    history, start = [], (time.perf_counter(), time.process_time())
    if arm is not None:
        validation = watched_inputs(job, judges, arm) if arm.watched else None
        history = train(job, policy, arm, validation, max(1, job.scale.rl_updates // LOOKS))
    elif job.arm != "frozen":
        world.continue_sft(policy, job, spent // (3 * scale.sft_batch), rate=CONTINUED_RATE, seed=job.seed + 1000)
    seconds = time.perf_counter() - start[0], time.process_time() - start[1]
    found: dict[str, Any] = {"seed": job.seed, "arm": job.arm, "history": history, "evaluations": spent}
    found |= {"seconds": seconds[0], "processor_seconds": seconds[1]}
    found["test"], images = measure(policy, job, world.pairs(scale, world.TEST, job.seed), judges)
    found["photographs"], _ = measure(policy, job, world.photographs(scale), judges)
    if job.seed == 0:  # for the picture grids
        (job.folder / "images").mkdir(parents=True, exist_ok=True)
        save_file({"images": images.mul(255).round().byte()}, job.folder / "images" / f"{job.name}.safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    return found


def train(
    job: Job, policy: PixelPolicy, arm: Arm, validation: Validation | None, validate_every: int
) -> list[dict[str, Any]]:
    """Train `policy` and leave the averaged weights in it; the numbers of every update."""
    scale = job.scale
    reward = study(job, copy.deepcopy(policy))[arm.reward]()
    options: dict[str, Any] = {"metric": Headroom(reward)} if arm.headroom else {}
    trainer = DifficultyAdaptiveTrainer(
        policy,
        reward,
        world.pairs(scale, world.TRAIN, job.seed),
        output_dir=job.folder / "runs" / job.name,
        weighter=arm.build(),
        objective=OBJECTIVE if arm.sampled else DirectRewardGradient(reward, checkpointed=False),
        rollout_config=RolloutConfig(group_size=SAMPLED_GROUP if arm.sampled else scale.group, num_steps=scale.steps),
        train_config=TrainConfig(
            learning_rate=SAMPLED_RATE if arm.sampled else RATE,
            inputs_per_update=scale.inputs,
            sft_scale="balanced",
            ema_decay=AVERAGE,
        ),
        validation=validation,
        accelerator=Accelerator(cpu=job.device == "cpu"),
        show_progress=False,
        seed=job.seed,
        **options,
    )
    updates = scale.rl_updates
    history = trainer.train(updates, save_every=updates, validate_every=validate_every, resume=True)
    assert trainer.learner.ema is not None, "AVERAGE > 0"
    trainer.learner.ema.copy_to(trainer.learner.weights)
    kept = ("update", "reward", "difficulty", "rl_share", "sft_share", "has_signal", "alarms")
    lines = [{name: value for name, value in line.items() if name in kept or "/" in name} for line in history]
    return lines if arm.watched else lines[1:]


def watched_inputs(job: Job, judges: dict[str, Reward], arm: Arm) -> Validation:
    """Validation inputs under the eyes of the monitor; the trained judge is one of them where it is not the reward."""
    inputs = world.pairs(job.scale, world.VALIDATION, job.seed)
    first = StoredPairs(*(part[: job.scale.test_inputs // 3] for part in (inputs.degraded, inputs.references)))
    named = {name: iqareward.load(name) for name in ("ssim", "gmsd")} | {"held_out": judges["held_out"]}
    if arm.reward in ("psnr", "haarpsi", "piqe", "niqe"):  # the others are made of it
        named["judge"] = judges["judge"]
    options: dict[str, Any] = {"num_steps": 2 * job.scale.steps, "inputs_at_once": 96, "monitor": HackingMonitor(named)}
    return Validation(first, named, **options)
