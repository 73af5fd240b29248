"""From the results of all jobs to differences with intervals, and to the distance from the front of fixed shares."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.restoration.arms import FIXED
from benchmarks.restoration.world import TASKS
from iqareward.agreement import spearman

TERCILES = ("easy", "middle", "hard")
MEASURES = ("held_out", "judge", "haarpsi", "ssim", "gmsd", "piqe", "niqe", "rmse", "psnr")
FRONT = ("sft", *(f"fixed {share:g}" for share in FIXED), "rl")
RESAMPLES = 10_000
POINTS = 20  # of the front between two neighbouring shares

Table = dict[tuple[int, str], dict[str, np.ndarray]]
"""(seed, arm) -> measure -> means `[tasks, terciles]`."""


class Interval(NamedTuple):
    """An estimate, its 95 % bootstrap interval over seeds, and how many seeds have its sign."""

    value: float
    low: float
    high: float
    agree: int


def load(folder: Path) -> list[dict[str, Any]]:
    """The results of all jobs."""
    return [json.loads(file.read_text()) for file in sorted((folder / "results").glob("*.json"))]


def terciles(errors: Sequence[float] | np.ndarray) -> list[np.ndarray]:
    """Indices of the inputs from easy to hard, by the frozen model's error."""
    return np.array_split(np.argsort(np.asarray(errors), kind="stable"), 3)


def tabulate(results: Sequence[Mapping[str, Any]], place: str = "test") -> Table:
    """Means of every measure by task and tercile; `place` is "test" or "photographs"."""
    frozen = {row["seed"]: np.asarray(row[place]["rmse"]) for row in results if row["arm"] == "frozen"}
    found: Table = {}
    for row in results:
        if row["seed"] not in frozen:
            continue
        values = {name: np.asarray(row[place][name], dtype=np.float64) for name in MEASURES if name != "psnr"}
        values["psnr"] = -20 * np.log10(values["rmse"])
        means = {name: np.empty((len(TASKS), 3)) for name in MEASURES}
        for task in range(len(TASKS)):
            groups = terciles(frozen[row["seed"]][task :: len(TASKS)])
            for name in MEASURES:
                column = values[name][task :: len(TASKS)]
                means[name][task] = [np.nanmean(column[group]) for group in groups]
        found[row["seed"], row["arm"]] = means
    return found


def seeds_of(table: Table, arms: Sequence[str]) -> list[int]:
    """Seeds that have all of these arms."""
    return sorted(seed for seed in {seed for seed, _ in table} if all((seed, arm) in table for arm in arms))


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis, as in rliable (https://arxiv.org/abs/2108.13264)."""
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def draws(count: int, seed: int = 0) -> np.ndarray:
    """Resampled seeds `[RESAMPLES, count]`."""
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def interval(differences: np.ndarray) -> Interval:
    """Interquartile mean of paired differences `[seeds, strata]`; seeds are resampled whole; NaN bounds for one."""
    values = np.asarray(differences, dtype=np.float64)
    estimate = float(interquartile_mean(values.ravel()))
    agree = int((np.sign(values.mean(1)) == np.sign(estimate)).sum())
    if len(values) < 2:
        return Interval(estimate, float("nan"), float("nan"), agree)
    resampled = interquartile_mean(values[draws(len(values))].reshape(RESAMPLES, -1))
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Interval(estimate, float(low), float(high), agree)


def difference(
    table: Table, arm: str, baseline: str, measure: str, tercile: str, *, relative: bool = False
) -> Interval:
    """Arm less baseline, over the seeds that have both; "all" is the mean over the terciles; `relative` in percent."""
    seeds = seeds_of(table, [arm, baseline])

    def values(name: str) -> np.ndarray:
        cells = np.stack([table[seed, name][measure] for seed in seeds])
        return cells.mean(2) if tercile == "all" else cells[:, :, TERCILES.index(tercile)]

    ours, theirs = values(arm), values(baseline)
    return interval(100 * (ours / theirs - 1) if relative else ours - theirs)


def above_front(table: Table, arm: str, quality: str, *, aggregate: bool) -> Interval:
    """Quality of an arm less the best that a constant share with at most its RMSE reaches.

    Args:
        table: from `tabulate`.
        arm: any arm.
        quality: measure, higher is better.
        aggregate: means over all inputs; otherwise quality on the hard tercile at the RMSE of the easy one.
    """
    seeds = seeds_of(table, [*FRONT, arm])

    def points(measure: str, tercile: int) -> np.ndarray:
        cells = np.stack([[table[seed, name][measure].mean(0) for name in (*FRONT, arm)] for seed in seeds])
        return cells.mean(2) if aggregate else cells[..., tercile]

    errors, qualities = points("rmse", 0), points(quality, 2)  # [seeds, arms]

    def distance(rows: np.ndarray) -> float:
        return _distance(errors[rows].mean(0), qualities[rows].mean(0))

    every = np.arange(len(seeds))
    each = [distance(np.array([row])) for row in every]
    estimate = distance(every)
    agree = int((np.sign(each) == np.sign(estimate)).sum())
    if len(seeds) < 2:
        return Interval(estimate, float("nan"), float("nan"), agree)
    low, high = np.quantile([distance(rows) for rows in draws(len(seeds))], [0.025, 0.975])
    return Interval(estimate, float(low), float(high), agree)


def _distance(errors: np.ndarray, qualities: np.ndarray) -> float:
    """Of the last point from the line through all others."""
    line_errors, line_qualities = (_between(values[:-1]) for values in (errors, qualities))
    reached = line_errors <= errors[-1]
    if not reached.any():  # more faithful than every constant: compare with the most faithful one
        reached = line_errors == line_errors.min()
    return float(qualities[-1] - line_qualities[reached].max())


def _between(values: np.ndarray) -> np.ndarray:
    """Points on the line through `values`."""
    places = np.linspace(0, len(values) - 1, POINTS * (len(values) - 1) + 1)
    return np.interp(places, np.arange(len(values)), values)


def difficulty_check(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Spearman correlation of the frozen model's error with the known severity, per task, mean over seeds."""
    found: dict[str, list[float]] = {task: [] for task in TASKS}
    for row in results:
        if row["arm"] == "frozen":
            for number, task in enumerate(TASKS):
                rows = slice(number, None, len(TASKS))
                found[task].append(spearman(row["test"]["rmse"][rows], row["test"]["severity"][rows]))
    return {task: float(np.mean(values)) for task, values in found.items()}
