"""From the results of all jobs to differences with intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np

TERCILES = ("easy", "middle", "hard")
MEASURES = ("reward", "held_out", "rmse", "ssim")
RESAMPLES = 10_000


def terciles(errors: Sequence[float]) -> list[np.ndarray]:
    """Indices of the inputs from easy to hard, by the frozen model's error."""
    return np.array_split(np.argsort(np.asarray(errors), kind="stable"), 3)


def summary(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per task, arm, seed and tercile, with the mean of every measure."""
    frozen = {(row["task"], row["seed"]): row["test"]["rmse"] for row in results if row["arm"] == "frozen"}
    rows = []
    for result in results:
        groups = terciles(frozen[result["task"], result["seed"]])
        for name, members in zip(TERCILES, groups, strict=True):
            means = {measure: float(np.asarray(result["test"][measure])[members].mean()) for measure in MEASURES}
            rows.append({"task": result["task"], "arm": result["arm"], "seed": result["seed"], "tercile": name} | means)
    return rows


def interval(differences: Sequence[float], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean of paired differences and its 95 % bootstrap interval over seeds; the interval is NaN for one seed."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), float("nan"), float("nan")
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def interquartile_mean(values: Sequence[float]) -> float:
    """Mean of the middle half, as in rliable (https://arxiv.org/abs/2108.13264)."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    cut = len(ordered) // 4
    return float(ordered[cut : len(ordered) - cut].mean())


def against(rows: Sequence[dict[str, Any]], baseline: str) -> list[dict[str, Any]]:
    """Every arm against a baseline of the same task and seed: difference of each measure in each tercile."""
    index = {(row["task"], row["seed"], row["tercile"], row["arm"]): row for row in rows}
    found = []
    keys = dict.fromkeys((row["task"], row["arm"], row["tercile"]) for row in rows if row["arm"] != baseline)
    for task, arm, tercile in keys:
        seeds = sorted({row["seed"] for row in rows if (row["task"], row["arm"]) == (task, arm)})
        line: dict[str, Any] = {"task": task, "arm": arm, "tercile": tercile, "baseline": baseline, "seeds": len(seeds)}
        for measure in MEASURES:
            values = [
                index[task, seed, tercile, arm][measure] - index[task, seed, tercile, baseline][measure]
                for seed in seeds
            ]
            mean, low, high = interval(values)
            line[measure] = {"mean": mean, "low": low, "high": high, "iqm": interquartile_mean(values)}
        found.append(line)
    return found


def difficulty_check(results: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Spearman correlation of the frozen model's error with the known severity, per task, mean over seeds."""
    found: dict[str, list[float]] = {}
    for result in results:
        if result["arm"] == "frozen":
            ranks = [np.argsort(np.argsort(result["test"][name])) for name in ("rmse", "severity")]
            found.setdefault(result["task"], []).append(float(np.corrcoef(*ranks)[0, 1]))
    return {task: float(np.mean(values)) for task, values in found.items()}
