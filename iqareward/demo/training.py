"""The second half of the demo: a small restorer is trained by SFT, judged by a small judge, and trained on by RL."""

import tempfile
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from iqareward.demo.judge import train_judge
from iqareward.difficulty import rmse
from iqareward.diffusion.data.degradations import Degradation
from iqareward.diffusion.data.pairs import SyntheticPairs
from iqareward.diffusion.data.views import StoredPairs
from iqareward.diffusion.experience import Sampling
from iqareward.diffusion.forward_process import ForwardProcess
from iqareward.diffusion.learner import Optimization
from iqareward.diffusion.pixel import PixelPolicy
from iqareward.diffusion.restorer import build_restorer
from iqareward.diffusion.sft import supervised
from iqareward.diffusion.trainer import DifficultyAdaptiveTrainer
from iqareward.diffusion.validation import Validation
from iqareward.functional.gmsd import gmsd
from iqareward.functional.ssim import ssim
from iqareward.monitor import HackingMonitor, MonitorReport
from iqareward.rewards.metric import FullReference
from iqareward.types import Reward

DEGRADATION = Degradation(("blur", "noise"), max_sigma=2.0, max_noise=40.0)
TERCILES = ("easy", "middle", "hard")


@dataclass(frozen=True)
class TrainingSettings:
    """How large the demonstration is; the defaults take about three minutes on one core.

    Args:
        size: side of the pictures in pixels.
        num_scenes: synthetic scenes to train on.
        num_held_out: others to judge by.
        channels: of the network, per resolution.
        sft_updates: of 32 scenes each.
        judge_updates: comparisons are 64 each.
        rl_updates: of `inputs` scenes each.
        inputs: scenes per RL update.
        group_size: restorations of each.
        num_steps: sampling steps.
        seed: of everything.
    """

    size: int = 32
    num_scenes: int = 1024
    num_held_out: int = 96
    channels: tuple[int, ...] = (16, 32, 32)
    sft_updates: int = 300
    judge_updates: int = 300
    rl_updates: int = 40
    inputs: int = 16
    group_size: int = 6
    num_steps: int = 4
    seed: int = 0


@dataclass(frozen=True)
class Training:
    """What came out; V held-out scenes.

    Attributes:
        settings: of the run.
        degraded: `[V, 3, H, W]` in [0, 1], and so are `references`, `before` (SFT) and `after` (RL).
        references: ground truth.
        before: restored by the model after SFT.
        after: restored by the model after RL.
        scores: by measure, (before, after), `[V]` each: "judge", the reward; "rmse", lower is better; "ssim", "gmsd".
        sft_losses: of every SFT update.
        history: of the trainer, a line per RL update.
        report: the monitor's last look.
    """

    settings: TrainingSettings
    degraded: Tensor
    references: Tensor
    before: Tensor
    after: Tensor
    scores: dict[str, tuple[Tensor, Tensor]]
    sft_losses: list[float]
    history: list[dict[str, Any]]
    report: MonitorReport

    @property
    def terciles(self) -> dict[str, Tensor]:
        """Rows of the held-out scenes from easy to hard, by the error of the model after SFT."""
        order = self.scores["rmse"][0].argsort(stable=True)
        return dict(zip(TERCILES, order.tensor_split(3), strict=True))


def train(settings: TrainingSettings) -> Training:
    """SFT, a judge, RL with adaptive weights, and a look at held-out scenes before and after; with progress bars."""
    from accelerate import Accelerator

    size, seed = settings.size, settings.seed
    scenes = SyntheticPairs(settings.num_scenes, size=size, degradation=DEGRADATION, seed=seed)
    held_out = SyntheticPairs(settings.num_held_out, size=size, degradation=DEGRADATION, seed=seed + 1)
    pairs, (degraded, references) = StoredPairs.of(scenes), held_out.batch(range(len(held_out)))
    policy, accelerator = build_restorer(settings.channels, seed=seed), Accelerator(cpu=True)
    losses = supervised(
        policy,
        pairs,
        num_updates=settings.sft_updates,
        batch_size=min(32, settings.num_scenes),
        learning_rate=2e-3,
        ema_decay=0.99,
        accelerator=accelerator,
        seed=seed,
    )
    seen = Validation(pairs.degraded, pairs.references, {}, num_steps=settings.num_steps, inputs_at_once=64)
    judge = train_judge(
        torch.stack([pairs.degraded, pairs.references]),
        seen.restore(policy, seed=seed),
        scenes.severities(range(len(scenes))),
        num_updates=settings.judge_updates,
        seed=seed,
    )
    judges = {
        "ssim": FullReference(ssim, higher_is_better=True),
        "gmsd": FullReference(gmsd, higher_is_better=False),
    }
    monitor = HackingMonitor(judges)
    validation = Validation(degraded, references, judges, num_steps=settings.num_steps, monitor=monitor)
    before = validation.restore(policy, seed=seed)
    history = _reinforce(policy, judge, pairs, validation, accelerator, settings)
    after = validation.restore(policy, seed=seed)
    measures = {"judge": judge, "rmse": rmse, **judges}
    scores = {name: (measure(before, references), measure(after, references)) for name, measure in measures.items()}
    return Training(settings, degraded, references, before, after, scores, losses, history, monitor.history[-1])


def _reinforce(
    policy: PixelPolicy,
    judge: Reward,
    pairs: StoredPairs,
    validation: Validation,
    accelerator: Any,
    settings: TrainingSettings,
) -> list[dict[str, Any]]:
    """RL with the adaptive weights; the trainer's history."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = DifficultyAdaptiveTrainer(
            policy,
            judge,
            pairs,
            output_dir=folder,
            objective=ForwardProcess(),
            sampling=Sampling(group_size=settings.group_size, num_steps=settings.num_steps),
            optimization=Optimization(learning_rate=2e-4, inputs_per_update=settings.inputs, sft_scale="balanced"),
            validation=validation,
            accelerator=accelerator,
            seed=settings.seed,
        )
        return trainer.train(settings.rl_updates, validate_every=max(1, settings.rl_updates // 4))


def training_summary(training: Training) -> dict[str, Any]:
    """The figures of the run as plain numbers, for `results.json`."""

    def rounded(value: float) -> float:
        return round(value, 4)

    table = {
        tercile: {
            name: {"before": rounded(float(old[rows].mean())), "after": rounded(float(new[rows].mean()))}
            for name, (old, new) in training.scores.items()
        }
        for tercile, rows in training.terciles.items()
    }
    lines = training.history[1:]
    names = ("reward", "difficulty", "rl_share", "sft_share", "active")
    return {
        "settings": {name: getattr(training.settings, name) for name in training.settings.__dataclass_fields__},
        "degraded_rmse": rounded(float(rmse(training.degraded, training.references).mean())),
        "terciles": table,
        "updates": {name: [rounded(line[name]) for line in lines] for name in names},
        "sft_loss": [rounded(loss) for loss in training.sft_losses],
        "alarms": list(training.report.alarms),
        "changes": {name: rounded(change) for name, change in training.report.changes.items()},
    }
