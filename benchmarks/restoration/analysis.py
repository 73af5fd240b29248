"""From the runs to differences with intervals, and to distances from the front of constant shares."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from benchmarks.restoration.arms import FRONT, UNTRAINED
from examples.small_restorer.tasks import TASKS

TERCILES = ("easy", "middle", "hard")
DRAWS = 2_000  # resamples of seeds and pictures


class Interval(NamedTuple):
    """An estimate and its 95 % bootstrap interval over seeds and pictures."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


@dataclass
class Study:
    """The runs of one start and one reward, as arrays `[seeds, pictures, tasks]`.

    Args:
        rows: Runs of a results file.
        start: Which start.
        reward: Which reward; what is not trained is taken from those of HaarPSI.
    """

    rows: Sequence[Mapping[str, Any]]
    start: str = "converged"
    reward: str = "haarpsi"
    runs: dict[str, dict[int, Mapping[str, Any]]] = field(init=False)

    def __post_init__(self) -> None:
        self.runs = {}
        for row in self.rows:
            if row["start"] == self.start and (row["reward"] == self.reward or row["arm"] in UNTRAINED):
                self.runs.setdefault(row["arm"], {})[row["seed"]] = row
        if "frozen" in self.runs:
            errors = self.values("frozen", "rmse", [0])[0]
            ranks = errors.argsort(0, kind="stable").argsort(0, kind="stable")
            # as np.array_split does: the first parts are the longer ones
            sizes = [len(part) for part in np.array_split(np.arange(len(errors)), 3)]
            self.tercile = np.searchsorted(np.cumsum(sizes), ranks, side="right")  # [pictures, tasks], 0 is easy

    def seeds(self, *arms: str) -> list[int]:
        """Seeds that have all of these arms; what is not trained has every seed."""
        found = [set(self.runs.get(arm, {})) for arm in arms if arm not in UNTRAINED]
        return sorted(set.intersection(*found)) if found else [0]

    def values(self, arm: str, measure: str, seeds: Sequence[int]) -> np.ndarray:
        """`[seeds, pictures, tasks]`."""
        runs = [self.runs[arm][0 if arm in UNTRAINED else seed] for seed in seeds]
        name = "rmse" if measure == "psnr" else measure
        found = np.array([run["test"][name] for run in runs], dtype=np.float64).reshape(len(runs), -1, len(TASKS))
        return -20 * np.log10(found) if measure == "psnr" else found

    def mask(self, tercile: str) -> np.ndarray:
        """`[pictures, tasks]`: the inputs of a tercile, or "all"."""
        return np.ones_like(self.tercile, bool) if tercile == "all" else self.tercile == TERCILES.index(tercile)

    def mean(self, arm: str, measure: str, tercile: str = "all") -> float:
        """Mean over seeds and inputs, each task counting alike."""
        values = self.values(arm, measure, self.seeds(arm))
        return float(_cells(values, self.mask(tercile), np.ones((1, len(self.tercile)))).mean())


def _cells(values: np.ndarray, mask: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means over the pictures of a mask `[draws, seeds, tasks]`, each picture `counts` `[draws, pictures]` times."""
    total = np.einsum("rp,pt,spt->rst", counts, mask, values)
    return total / (counts @ mask)[:, None]


def _draws(seeds: int, pictures: int) -> tuple[np.ndarray, np.ndarray]:
    """Resampled seeds `[DRAWS, seeds]`, and how often each picture was drawn `[DRAWS, pictures]`."""
    rng = np.random.default_rng(0)
    return rng.integers(seeds, size=(DRAWS, seeds)), rng.multinomial(pictures, np.full(pictures, 1 / pictures), DRAWS)


def interquartile_mean(values: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the last axis, as in rliable (https://arxiv.org/abs/2108.13264)."""
    ordered = np.sort(values, axis=-1)
    cut = ordered.shape[-1] // 4
    return ordered[..., cut : ordered.shape[-1] - cut].mean(-1)


def _interval(value: float, draws: np.ndarray) -> Interval:
    low, high = np.nanquantile(draws, [0.025, 0.975])  # a draw without any picture of the tercile is NaN
    return Interval(value, float(low), float(high))


def difference(
    study: Study,
    arm: str,
    baseline: str,
    measure: str,
    tercile: str = "all",
    *,
    relative: bool = False,
    trimmed: bool = False,
    task: str | None = None,
) -> Interval:
    """Arm less baseline, paired by seed and input.

    Args:
        study: The runs.
        arm: Any arm.
        baseline: Another one.
        measure: Name of a measure.
        tercile: Which inputs.
        relative: In percent of the baseline.
        trimmed: The interquartile mean over seeds and tasks instead of the mean. Where tasks differ more than seeds
            it leaves out whole tasks.
        task: This one alone; all if not given.
    """
    seeds, mask = study.seeds(arm, baseline), study.mask(tercile)
    column = slice(None) if task is None else [list(TASKS).index(task)]
    ours, theirs = (study.values(name, measure, seeds) for name in (arm, baseline))

    def cells(counts: np.ndarray) -> np.ndarray:
        own, other = _cells(ours, mask, counts), _cells(theirs, mask, counts)
        return (100 * (own / other - 1) if relative else own - other)[..., column]

    which, counts = _draws(len(seeds), len(mask))
    with np.errstate(invalid="ignore"):
        drawn = np.take_along_axis(cells(counts), which[:, :, None], 1).reshape(DRAWS, -1)
    drawn[np.isnan(drawn).any(1)] = np.nan  # which sorting would hide
    centre = interquartile_mean if trimmed else partial(np.mean, axis=-1)
    value = centre(cells(np.ones((1, len(mask)))).reshape(-1))
    return _interval(float(value), centre(drawn))


def above_front(
    study: Study, arm: str, quality: str, error: str = "rmse", *, where: tuple[str, str] = ("all", "all")
) -> Interval:
    """Quality of an arm less the best that a constant share with at most its error reaches.

    Args:
        study: The runs.
        arm: Any arm.
        quality: A measure, higher is better.
        error: "rmse", or "psnr", whose negative is the error.
        where: Terciles of the quality and of the error.
    """
    names = [*(name for name in FRONT if study.seeds(name)), arm]
    seeds = study.seeds(*names)

    def points(measure: str, tercile: str, weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
        values = np.stack([study.values(name, measure, seeds) for name in names])
        over_seeds = np.einsum("rs,aspt->rapt", weights, values) / len(seeds)
        mask = study.mask(tercile)
        total = np.einsum("rp,pt,rapt->rat", counts, mask, over_seeds)
        return (total / (counts @ mask)[:, None]).mean(2)

    def distances(weights: np.ndarray, counts: np.ndarray) -> np.ndarray:
        qualities, errors = (points(*pair, weights, counts) for pair in zip((quality, error), where, strict=True))
        errors = -errors if error == "psnr" else errors
        return np.array([_distance(*pair) for pair in zip(errors, qualities, strict=True)])

    which, counts = _draws(len(seeds), len(study.tercile))
    weights = np.stack([np.bincount(row, minlength=len(seeds)) for row in which])
    with np.errstate(invalid="ignore"):
        drawn = distances(weights, counts)
    value = distances(np.ones((1, len(seeds))), np.ones((1, len(study.tercile))))[0]
    return _interval(float(value), drawn)


def _distance(errors: np.ndarray, qualities: np.ndarray) -> float:
    """Of the last point from the line through all others."""
    if np.isnan([errors, qualities]).any():
        return float("nan")
    *line_errors, error = errors
    *line_qualities, quality = qualities
    points = list(zip(line_errors, line_qualities, strict=True))
    reached = [height for place, height in points if place <= error]
    for (left, low), (right, high) in pairwise(points):
        if min(left, right) < error < max(left, right):
            reached.append(low + (high - low) * (error - left) / (right - left))
    # more faithful than every constant: compare with the most faithful one
    return float(quality - max(reached or [min(points)[1]]))
