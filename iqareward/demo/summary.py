"""The figures of the experiment as one plain dictionary: what `results.json` holds and every page and table shows."""

import math
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import iqareward
from iqareward.demo.experiment import SEED, Experiment
from iqareward.demo.statistics import above_original, spearman

DECIMALS = 5
"""Kept of every figure, so that the last bits of floating-point sums do not differ between runs."""


def summarise(experiment: Experiment) -> dict[str, Any]:
    """Settings, rank correlations, mistakes, difficulties and weights; numbers are rounded, None = undefined."""
    difficulty, num_damaged = experiment.difficulty, experiment.difficulty.numel()
    return {
        "settings": {
            "photographs": [photograph.name for photograph in experiment.photographs],
            "degradations": {item.name: item.strengths[: experiment.num_levels] for item in experiment.degradations},
            "rewards": [reward.name for reward in experiment.rewards],
            "levels": experiment.num_levels,
            "pictures": num_damaged + len(experiment.photographs),
            "damaged": num_damaged,
            "seed": SEED,
        },
        "rank_correlation": {name: _correlations(experiment, scores) for name, scores in experiment.scores.items()},
        "mistakes": {reward.name: _mistakes(experiment.scores[reward.name], reward) for reward in experiment.rewards},
        "difficulty": {
            "geometric_mean": _number(difficulty.log().mean().exp()),
            "mean_by_degradation": {
                item.name: _number(difficulty[:, index].mean()) for index, item in enumerate(experiment.degradations)
            },
        },
        "handover": [
            {"errors": factor, "mean_rl": _number(weights.rl.mean()), "mean_sft": _number(weights.sft.mean())}
            for factor, weights in experiment.handover.items()
        ],
    }


def _correlations(experiment: Experiment, scores: Tensor) -> dict[str, Any]:
    """Spearman's correlation of score and damage: per degradation over the photographs, and over everything."""
    table = spearman(scores, torch.arange(experiment.num_levels + 1))  # [P, D]
    row: dict[str, Any] = {}
    for index, degradation in enumerate(experiment.degradations):
        column = table[:, index]
        row[degradation.name] = {
            "mean": _number(column.mean()),
            "worst": _number(column.max()),  # -1 is perfect, so the largest is the worst
            "worst_photograph": experiment.photographs[int(column.argmax())].name,
        }
    return {"by_degradation": row, "mean": _number(table.mean())}


def _mistakes(scores: Tensor, reward: Any) -> dict[str, Any]:
    """Counts over damaged pictures: above their own original, at the lowest possible score, without a score."""
    damaged, lowest = scores[..., 1:], reward.bounds[0]
    above = int(above_original(scores).sum())
    return {
        "above_original": above,
        "above_original_share": round(above / damaged.numel(), DECIMALS),
        "at_lowest_score": int((damaged <= lowest).sum()) if lowest is not None else 0,
        "not_scored": int(damaged.isnan().sum()),
    }


def environment(seconds: float) -> dict[str, Any]:
    """Versions, hardware, and seconds spent on damage and scores; the only part that differs between two runs."""
    packages = ("torch", "numpy", "pillow", "scikit-image", "matplotlib")
    return {
        "versions": {
            "iqareward": iqareward.__version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in packages},
        },
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "threads": 1,
        "seconds": round(seconds, 1),
    }


def _processor() -> str:
    """The processor's name where the system tells it."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text(encoding="utf-8", errors="replace").splitlines() if listing.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or "unknown"


def _number(value: Tensor) -> float | None:
    number = float(value)
    return round(number, DECIMALS) if math.isfinite(number) else None
