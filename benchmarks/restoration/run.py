"""One arm on one task with one seed: train, restore the test inputs, measure."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from benchmarks.restoration import world
from benchmarks.restoration.arms import Arm, arms
from benchmarks.restoration.judges import trained_judges
from iqareward.difficulty import rmse
from iqareward.diffusion import DifficultyAdaptiveTrainer, Optimization, PixelPolicy, Sampling, Validation
from iqareward.diffusion.policy_gradient import PolicyGradient
from iqareward.functional.ssim import ssim
from iqareward.rewards.metric import NoReference

RATE = 1e-4


@dataclass(frozen=True)
class Headroom:
    """How far the reward of an image stays below that of its ground truth."""

    reward: NoReference

    bounds = (None, 0.0)

    def __call__(self, images: Tensor, references: Tensor) -> Tensor:
        """`[B]` <= 0."""
        return (self.reward(images) - self.reward(references)).clamp(max=0.0)


@dataclass(frozen=True)
class Job:
    """What one result belongs to."""

    scale: world.Scale
    task: str
    seed: int
    arm: str
    folder: Path
    device: str

    @property
    def name(self) -> str:
        """Also the name of its files."""
        return f"{self.task}-{self.seed}-{self.arm}".replace(", ", "_").replace(" ", "_")


def evaluations(scale: world.Scale, num_terms: int) -> int:
    """Network evaluations of the policy per update; a backward pass counts as two."""
    rollouts = scale.inputs * scale.group
    return rollouts * scale.steps + num_terms * 3 * (rollouts + scale.inputs)


@torch.no_grad()
def measure(policy: PixelPolicy, job: Job, judge: NoReference, held_out: NoReference) -> dict[str, list[float]]:
    """Per test input: reward, held-out judge, RMSE, SSIM of the restoration, and the known severity."""
    data = world.pairs(job.scale, job.task, world.TEST, job.seed)
    ids = range(len(data))
    degraded, references = data.batch(ids)
    images = Validation(degraded, references, {}, num_steps=4 * job.scale.steps).restore(policy, seed=job.seed)
    device = next(policy.model.parameters()).device
    return {
        "reward": judge(images.to(device)).tolist(),
        "held_out": held_out(images.to(device)).tolist(),
        "rmse": rmse(images, references).tolist(),
        "ssim": ssim(images, references).tolist(),
        "severity": data.severities(ids).tolist(),
    }


def run(job: Job) -> dict[str, Any]:
    """The result of a job, computed or read from its file; a run that was cut off continues from its checkpoint."""
    file = job.folder / "results" / f"{job.name}.json"
    if file.exists():
        return json.loads(file.read_text())
    shared = job.folder / "shared"
    policy = world.restorer(job.scale, job.task, job.seed, shared, job.device)
    judge, held_out = trained_judges(job.scale, job.seed, shared, job.device)
    per_update = evaluations(job.scale, job.scale.steps - 1)
    if job.arm == "frozen":
        history, updates = [], 0
    elif job.arm == "sft, all compute":
        history, updates = [], per_update * job.scale.rl_updates // (3 * job.scale.sft_batch)
        world.continue_sft(policy, job.scale, job.task, job.seed + 1000, updates, RATE)
    else:
        history, updates = _train(job, policy, judge, arms(job.scale.rl_updates)[job.arm]), job.scale.rl_updates
    found = {"task": job.task, "seed": job.seed, "arm": job.arm, "updates": updates}
    found |= {"evaluations": 0 if job.arm == "frozen" else per_update * job.scale.rl_updates, "history": history}
    found |= {"test": measure(policy, job, judge, held_out)}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found))
    return found


def _train(job: Job, policy: PixelPolicy, judge: NoReference, arm: Arm) -> list[dict[str, Any]]:
    scale = job.scale
    options: dict[str, Any] = {"metric": Headroom(judge)} if arm.headroom else {}
    trainer = DifficultyAdaptiveTrainer(
        policy,
        judge,
        world.pairs(scale, job.task, world.TRAIN, job.seed),
        output_dir=job.folder / "runs" / job.name,
        weighter=arm.build(),
        objective=PolicyGradient(),
        sampling=Sampling(group_size=scale.group, num_steps=scale.steps),
        optimization=Optimization(learning_rate=RATE, inputs_per_update=scale.inputs, sft_scale="balanced"),
        accelerator=Accelerator(cpu=job.device == "cpu"),
        show_progress=False,
        seed=job.seed,
        **options,
    )
    kept = ("update", "reward", "difficulty", "rl_share", "sft_share", "active")
    history = trainer.train(scale.rl_updates, save_every=20, resume=True)
    return [{name: line[name] for name in kept} for line in history[1:]]
