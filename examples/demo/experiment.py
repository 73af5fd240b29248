"""Restore photographs with the small restorer, train it further by difficulty-adaptive RL, and measure both."""

import csv
import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import iqareward
from examples.small_restorer import photographs, restorer, tasks
from iqareward import diffusion

ONE_STEP, BEFORE, AFTER = "one step", "restored", "after RL"  # the first is the regression that the network has learned
RESTORED = (ONE_STEP, BEFORE, AFTER)
VERSIONS = ("degraded", *RESTORED, "ground truth")
REWARDS = ("haarpsi", "psnr", "ssim", "cvvdp", "stlpips", "quick", "niqe")
THIRDS = ("easy", "middle", "hard")
SEVERITIES = (0.6, 0.9)  # of the damage to the test photographs, in turn
TRAINED_SEVERITIES = (0.3, 1.0)
AVERAGE = 0.98  # decay of the averaged weights, which restore


@dataclass(frozen=True)
class Settings:
    """Size of the demo; the defaults take about five minutes on an idle core."""

    reward: str = "0.5*haarpsi + 0.5*cvvdp"
    updates: int = 150
    inputs: int = 16  # windows in an update
    windows: int = 2048  # of the training photographs
    window_side: int = 64
    photographs: int = 24  # to test on
    side: int = 256  # of these
    learning_rate: float = 2e-4
    looks: int = 5  # validations after the first
    seed: int = 0


@dataclass(frozen=True)
class Run:
    """Photographs by version, `[V, 3, H, W]`, and everything that was measured, ready for JSON."""

    images: dict[str, Tensor]
    results: dict[str, Any]


def load_rewards() -> tuple[dict[str, iqareward.Reward], dict[str, str]]:
    """The rewards that can score here, and why the others cannot: ST-LPIPS needs the extra `perceptual`."""
    rewards, missing = {}, {}
    probe, other = torch.rand(2, 1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    for name in REWARDS:
        try:
            reward = iqareward.load(name)
            reward(probe, references=other)
        except (ImportError, OSError) as error:
            missing[name] = str(error).splitlines()[0]
        else:
            rewards[name] = reward
    return rewards, missing


def training_pairs(settings: Settings) -> diffusion.StoredPairs:
    """Random windows of the training photographs, damaged by the five tasks in turn."""
    draw, crops, side = torch.Generator().manual_seed(settings.seed), photographs.training(), settings.window_side
    count, room = settings.windows, crops.shape[-1] - settings.window_side
    rows = torch.randint(len(crops), (count,), generator=draw)
    corners = torch.randint(room + 1, (count, 2), generator=draw)
    severity = torch.empty(count).uniform_(*TRAINED_SEVERITIES, generator=draw)
    return tasks.damaged(photographs.windows(crops, rows, corners, side), severity, seed=settings.seed)


def run(settings: Settings, progress: Callable[[str], None]) -> Run:
    """Restore, score, train and measure; `progress` is called with a line of text before each stage."""
    progress(f"Damaging {settings.photographs} photographs that the restorer has never seen")
    kodak = photographs.kodak()[: settings.photographs, :, : settings.side, : settings.side]
    severity = torch.tensor([SEVERITIES[row % len(SEVERITIES)] for row in range(len(kodak))])
    unseen = tasks.damaged(kodak, severity, seed=settings.seed)
    rewards, missing = load_rewards()
    for name, reason in missing.items():
        progress(f"{name} is left out: {reason}")
    images = {"degraded": unseen.degraded}
    frozen = restorer.load()
    progress(f"Restoring them in one step and in {frozen.num_steps}")
    for version, steps in ((ONE_STEP, 1), (BEFORE, None)):
        images[version] = restored(frozen, unseen, steps, settings.seed)
    held_out = {name: reward for name, reward in rewards.items() if name not in settings.reward}
    trained, trainer, monitor = train(settings, unseen, held_out, progress)
    images |= {AFTER: restored(trained, unseen, None, settings.seed), "ground truth": unseen.references}
    scores: dict[str, dict[str, Tensor]] = {}
    for version in VERSIONS:
        progress(f"Scoring with {len(rewards)} rewards: {version}")
        scores[version] = {
            name: reward(images[version], references=unseen.references) for name, reward in rewards.items()
        }
        scores[version]["rmse"] = iqareward.reference_distance(images[version], unseen.references)
    weight = {version: trainer.weighter(scores[version]["rmse"]) for version in (BEFORE, AFTER)}
    per_photograph = [
        {
            "name": f"kodim{row + 1:02}",
            "task": list(tasks.TASKS)[row % len(tasks.TASKS)],
            "severity": plain(severity[row]),
            "weights": {
                version: {"rl": plain(rl[row]), "sft": plain(sft[row])} for version, (rl, sft) in weight.items()
            },
            "scores": {version: {name: plain(s[row]) for name, s in scores[version].items()} for version in VERSIONS},
        }
        for row in range(len(kodak))
    ]
    order = scores[BEFORE]["rmse"].argsort(stable=True)
    return Run(
        images,
        {
            "settings": asdict(settings),
            "steps": frozen.num_steps,
            "weights": sum(weights.numel() for weights in frozen.model.parameters()),
            "rewards": list(rewards),
            "missing": missing,
            "held_out": list(held_out),
            "means": means(scores),
            "thirds": {
                third: means(scores, rows) for third, rows in zip(THIRDS, order.tensor_split(len(THIRDS)), strict=True)
            },
            "photographs": per_photograph,
            "by_difficulty": order.tolist(),
            "history": [{key: plain(value) for key, value in record.items()} for record in trainer.history],
            "monitor": [{name: plain(change) for name, change in look.changes.items()} for look in monitor.history],
            "alarms": list(monitor.history[-1].alarms),
        },
    )


def restored(policy: diffusion.PixelPolicy, pairs: diffusion.StoredPairs, steps: int | None, seed: int) -> Tensor:
    """The photographs as `policy` restores them, in its own number of steps if there is none."""
    validation = diffusion.Validation(pairs, {}, num_steps=steps, inputs_at_once=4)
    return validation.restore(policy, *validation.batches, seed=seed)


def train(
    settings: Settings,
    unseen: diffusion.StoredPairs,
    held_out: Mapping[str, iqareward.Reward],
    progress: Callable[[str], None],
) -> tuple[diffusion.PixelPolicy, diffusion.DifficultyAdaptiveTrainer, iqareward.HackingMonitor]:
    """The restorer after RL in fp32, with what trained and what watched it."""
    progress(f"Damaging {settings.windows} windows of other photographs to train on")
    pairs, policy = training_pairs(settings), restorer.load()
    policy.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]  # faster on a CPU
    reward = iqareward.load(settings.reward, differentiable=True)
    monitor = iqareward.HackingMonitor(held_out)
    progress(f"Training by RL on {settings.reward}, {settings.updates} updates of {settings.inputs} windows")
    with tempfile.TemporaryDirectory() as folder:
        trainer = diffusion.DifficultyAdaptiveTrainer(
            policy,
            reward,
            pairs,
            output_dir=folder,
            objective=diffusion.DirectRewardGradient(reward, checkpointed=False),
            rollout_config=diffusion.RolloutConfig(group_size=1, num_steps=policy.num_steps, eta=policy.eta),
            train_config=diffusion.TrainConfig(
                learning_rate=settings.learning_rate,
                inputs_per_update=settings.inputs,
                rows_at_once=None,
                sft_scale="balanced",
                ema_decay=AVERAGE,
            ),
            validation=diffusion.Validation(unseen, held_out, monitor=monitor, inputs_at_once=4),
            accelerator=Accelerator(cpu=True, mixed_precision="bf16"),
            seed=settings.seed,
        )
        trainer.train(settings.updates, validate_every=max(1, settings.updates // settings.looks))
    trained = restorer.build()  # without the mixed precision that the accelerator has given the other one
    with trainer.learner.averaged():
        trained.model.load_state_dict(policy.model.state_dict())
    return trained, trainer, monitor


def means(scores: Mapping[str, Mapping[str, Tensor]], rows: Tensor | None = None) -> dict[str, dict[str, Any]]:
    """Mean of every measure by version, of some rows or all."""
    return {
        version: {name: plain((each if rows is None else each[rows]).mean()) for name, each in found.items()}
        for version, found in scores.items()
    }


def plain(value: Any) -> Any:
    """A number rounded for JSON, None if it is not finite; anything else as it is."""
    if isinstance(value, Tensor | float):
        return float(f"{float(value):.6g}") if math.isfinite(value) else None
    return value


def write_scores(results: Mapping[str, Any], path: Path) -> None:
    """Write one CSV row for each version of each photograph: its scores, and the weights of a restoration."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        measures = [*results["rewards"], "rmse"]
        rows.writerow(["photograph", "task", "severity", "version", *measures, "w_rl", "w_sft"])
        for each in results["photographs"]:
            for version in VERSIONS:
                weights = each["weights"].get(version, {"rl": "", "sft": ""})
                found = [each["scores"][version][name] for name in measures]
                rows.writerow([each["name"], each["task"], each["severity"], version, *found, *weights.values()])
