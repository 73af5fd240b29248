"""Train a small restorer by SFT, learn a reward that ranks damage, and go on by difficulty-adaptive RL."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

import iqareward
from iqareward import diffusion

DEGRADATION = diffusion.Degradation(("blur", "noise"), max_sigma=2.0, max_noise=40.0)
THIRDS = ("easy", "middle", "hard")
BATCH = 64  # comparisons in an update of the learned reward


@dataclass(frozen=True)
class Settings:
    """Size of the training; the defaults take about four minutes on one core."""

    size: int = 32  # side of the images in pixels
    num_scenes: int = 1024
    num_held_out: int = 96
    channels: tuple[int, ...] = (16, 32, 32)
    sft_updates: int = 300
    reward_updates: int = 300
    rl_updates: int = 40
    inputs: int = 16  # scenes per RL update
    group_size: int = 6  # restorations of each scene
    num_steps: int = 4  # of sampling
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """Results on V held-out scenes."""

    settings: Settings
    images: dict[str, Tensor]  # `[V, 3, H, W]` each: "damaged", "after SFT", "after RL", "reference"
    scores: dict[str, tuple[Tensor, Tensor]]  # by measure, `[V]` before and after RL
    history: list[dict[str, Any]]  # the trainer's records
    alarms: list[str]  # of the monitor's last look

    def thirds(self, measure: str) -> dict[str, tuple[float, float]]:
        """Return the means before and after RL of the easy, middle and hard scenes, by their error after SFT."""
        parts = self.scores["rmse"][0].argsort(stable=True).tensor_split(3)
        old, new = self.scores[measure]
        return {name: (float(old[part].mean()), float(new[part].mean())) for name, part in zip(THIRDS, parts)}


class Ranker(nn.Module):
    """A small network that gives each image `[B, 3, H, W]` in [0, 1] a score `[B]`."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, width, 3, padding=1)
        self.second = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.third = nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1)
        self.head = nn.Linear(4 * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Score the images; higher is better."""
        detail = 8 * (images - F.avg_pool2d(images, 3, 1, 1, count_include_pad=False))  # it is small beside the image
        features = F.silu(self.second(F.silu(self.first(torch.cat([2 * images - 1, detail], 1)))))
        features = F.silu(self.third(features))
        pooled = torch.cat([features.mean((2, 3)), features.flatten(2).std(2)], 1)
        return self.head(pooled)[:, 0]


def learn_reward(
    pairs: diffusion.StoredPairs, restored: Tensor, severity: Tensor, settings: Settings
) -> iqareward.NoReference:
    """Train a reward without references to rank images by their damage.

    The loss is logistic in the difference of two scores, weighted with the difference of their damage. A restoration
    counts as half as damaged as its input: a reward that never saw one takes the smooth output of SFT for flawless.

    References:
        Liu, van de Weijer, Bagdanov, RankIQA: Learning from Rankings for No-reference Image Quality Assessment, 2017,
        https://arxiv.org/abs/1707.08347
    """
    torch.manual_seed(settings.seed)
    network = Ranker()
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.reward_updates)
    images = torch.cat([pairs.degraded, pairs.references, restored])
    damage = torch.cat([severity, torch.zeros_like(severity), severity / 2])
    for _ in range(settings.reward_updates):
        rows = torch.randint(len(images), (2, BATCH))
        rows[1, ::2] = (rows[0, ::2] + len(severity)) % len(images)  # half compare versions of one scene
        scores = network(images[rows.flatten()]).view(2, BATCH)
        better = damage[rows[1]] - damage[rows[0]]
        loss = (better.abs() * F.softplus(-better.sign() * (scores[0] - scores[1]))).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.requires_grad_(False).eval()
    return iqareward.NoReference(network, higher_is_better=True, name="learned")


def train(settings: Settings, progress: Callable[[str], None]) -> Trained:
    """Train and evaluate; `progress` is called with a line of text before each stage."""
    seed, kind = settings.seed, {"size": settings.size, "degradation": DEGRADATION}
    scenes = diffusion.SyntheticPairs(settings.num_scenes, **kind, seed=seed)
    held_out = diffusion.SyntheticPairs(settings.num_held_out, **kind, seed=seed + 1)
    pairs, unseen = diffusion.StoredPairs.of(scenes), diffusion.StoredPairs.of(held_out)
    degraded, references = unseen.degraded, unseen.references
    policy = diffusion.build_restorer(settings.channels, seed=seed)
    progress(f"Training a restorer by SFT on {len(pairs)} scenes")
    common: dict[str, Any] = {"accelerator": Accelerator(cpu=True), "seed": seed}
    sft = {"num_updates": settings.sft_updates, "batch_size": 32, "learning_rate": 2e-3, "ema_decay": 0.99}
    diffusion.supervised(policy, pairs, **sft, **common)
    progress(f"Training a reward that ranks damage, {settings.reward_updates} updates")
    seen = diffusion.Validation(pairs, {}, num_steps=settings.num_steps, inputs_at_once=64)
    severity = scenes.severities(range(len(scenes)))
    reward = learn_reward(pairs, seen.restore(policy, *seen.batches, seed=seed), severity, settings)
    progress(f"Training on by RL, {settings.group_size} restorations of each of {settings.inputs} scenes per update")
    watched = {name: iqareward.load(name) for name in ("ssim", "gmsd")}
    monitor = iqareward.HackingMonitor(watched)
    validation = diffusion.Validation(unseen, watched, num_steps=settings.num_steps, monitor=monitor)
    before = validation.restore(policy, *validation.batches, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trainer = diffusion.DifficultyAdaptiveTrainer(
            policy,
            reward,
            pairs,
            output_dir=folder,
            objective=diffusion.DiffusionNFT(),
            rollout_config=diffusion.RolloutConfig(group_size=settings.group_size, num_steps=settings.num_steps),
            train_config=diffusion.TrainConfig(
                learning_rate=2e-4, inputs_per_update=settings.inputs, rows_at_once=None, sft_scale="balanced"
            ),
            validation=validation,
            **common,
        )
        history = trainer.train(settings.rl_updates, validate_every=max(1, settings.rl_updates // 4))
    after = validation.restore(policy, *validation.batches, seed=seed)
    images = {"damaged": degraded, "after SFT": before, "after RL": after, "reference": references}
    measures = {"learned": reward, "rmse": iqareward.reference_distance, **watched}
    scores = {
        name: (measure(before, references=references), measure(after, references=references))
        for name, measure in measures.items()
    }
    return Trained(settings, images, scores, history, list(monitor.history[-1].alarms))
