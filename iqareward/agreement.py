"""Agreement of scores with human opinions: correlations, order within groups, and bootstrap intervals over inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

MEASURES = ("spearman", "pearson", "pair_accuracy")
_WEIGHTS_IN_MEMORY = 150_000  # per array, so that it stays in the processor's cache
_FIT_ROWS = 4_096  # quantiles of longer columns find the curve


class PairAccuracy(NamedTuple):
    """How often scores order two images of one group as people do.

    Attributes:
        accuracy: share of `pairs` in the same order, where equal scores count one half; NaN without pairs.
        pairs: pairs within groups whose images have scores and different human scores.
        score_ties: how many of them have equal scores.
        human_ties: pairs that were excluded because people see no difference.
        unscored: pairs that were excluded because a score is missing.
    """

    accuracy: float
    pairs: int
    score_ties: int
    human_ties: int
    unscored: int


class Estimate(NamedTuple):
    """A figure with a bootstrap interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class MetricAgreement:
    """How the scores of one metric agree with people.

    Attributes:
        name: name of the metric.
        scored: number of images that have both a score and a human score.
        spearman: Spearman's rank correlation.
        pearson: Pearson's correlation after a logistic fit; the interval holds the curve fixed.
        pair_accuracy: share of pairs within groups in the order of people.
        pairs: how the pairs were counted.
        differences: for each of `MEASURES` this metric - the baseline, over the images that both have scored; empty for
            the baseline.
    """

    name: str
    scored: int
    spearman: Estimate
    pearson: Estimate
    pair_accuracy: Estimate
    pairs: PairAccuracy
    differences: Mapping[str, Estimate]


@dataclass(frozen=True)
class Agreement:
    """Agreement of several metrics with people.

    Attributes:
        metrics: the metrics, the highest Spearman correlation first.
        baseline: name of the metric that the others are compared with.
        images: number of images.
        rated: how many have a human score.
        groups: number of inputs, which the bootstrap draws.
        confidence: Probability that each interval covers the true value, such as 0.95.
    """

    metrics: tuple[MetricAgreement, ...]
    baseline: str
    images: int
    rated: int
    groups: int
    confidence: float


def spearman(scores: Any, human: Any) -> float:
    """Compute Spearman's rank correlation; ties have their mean rank.

    Args:
        scores: N scores, an array, a tensor on the CPU, or a list.
        human: N human scores.

    Returns:
        -1 to 1; NaN if a value is missing, or one side does not vary.

    Raises:
        ValueError: the two differ in length.

    Example:
        >>> spearman([0.1, 0.4, 0.2], [1, 3, 2])
        1.0

    References:
        Spearman, "The Proof and Measurement of Association between Two Things", 1904,
        https://doi.org/10.2307/1412159
    """
    a, b = _columns(scores, human)
    if not (np.isfinite(a) & np.isfinite(b)).all():
        return np.nan
    ones = np.ones((1, len(a)))
    return float(_rank_correlation(_Order(a).ranks(ones), _Order(b).ranks(ones), ones)[0])


def pearson_after_logistic(scores: Any, human: Any) -> float:
    """Compute Pearson's correlation of human scores with scores on the fitted scale of people.

    The curve is the four-parameter logistic function of VQEG, rising. The two levels of the curve do not change a
    correlation, so that its middle and its width are found by their correlation alone: the middle between the first and
    the ninth decile of the scores, and the width from an eighth of their standard deviation to a straight line.

    Args:
        scores: N scores; higher is better.
        human: N human scores; higher is better.

    Returns:
        -1 to 1; NaN if a value is missing, or one side does not vary.

    Raises:
        ValueError: the two differ in length.

    Example:
        >>> round(pearson_after_logistic([1, 2, 3, 4, 5], [0.02, 0.1, 0.5, 0.9, 0.98]), 3)
        1.0

    References:
        VQEG, "Final report from the Video Quality Experts Group on the validation of objective models of video quality
        assessment, phase II", 2003, https://www.vqeg.org/
    """
    a, b = _columns(scores, human)
    if not (np.isfinite(a) & np.isfinite(b)).all():
        return np.nan
    return float(_correlation(_on_human_scale(a, b), b, np.ones((1, len(a))))[0])


def pair_accuracy(scores: Any, human: Any, groups: Sequence[Any]) -> PairAccuracy:
    """Compute how often scores order two images of one group as people do, which is all that a group advantage sees.

    Args:
        scores: N scores; higher is better, NaN = not scored.
        human: N human scores; higher is better, NaN = not rated.
        groups: N ids of the inputs, of any kind.

    Returns:
        `PairAccuracy`: pairs of all groups together, so that a large group counts for more than a small one.

    Raises:
        ValueError: the lengths differ.

    Example:
        >>> pair_accuracy([0.9, 0.5, 0.5, 0.1], [3, 2, 1, 1], ["a", "a", "a", "b"])
        PairAccuracy(accuracy=0.8333333333333334, pairs=3, score_ties=1, human_ties=0, unscored=0)
    """
    a, b = _columns(scores, human)
    wins, pairs, counts = _pairs(a, b, *_numbered(groups, len(a)))
    accuracy = wins.sum() / pairs.sum() if pairs.sum() else np.nan
    return PairAccuracy(float(accuracy), int(pairs.sum()), *counts)


def agreement(
    scores: Mapping[str, Any],
    human: Any,
    groups: Sequence[Any],
    *,
    baseline: str | None = None,
    resamples: int = 2_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Agreement:
    """Measure how metrics agree with people, with intervals from a bootstrap over inputs.

    Whole groups are drawn, because images of one input are not independent. All metrics see the same draws, so that
    their differences are paired.

    Args:
        scores: for each metric N scores; higher is better, NaN = not scored.
        human: N human scores; higher is better, NaN = not rated.
        groups: N ids of the inputs; images that are their own input have ids of their own.
        baseline: name of the metric that the others are compared with; by default that of the highest Spearman.
        resamples: number of bootstrap samples.
        confidence: probability that an interval covers.
        seed: seed of the draws.

    Returns:
        `Agreement`. Images without a score count in no figure of that metric, and `scored` says how many are left.

    Raises:
        ValueError: no metrics, unequal lengths, an unknown baseline, or fewer than two images with human scores.

    Example:
        >>> found = agreement({"good": [1, 2, 4, 3], "bad": [2, 1, 1, 2]}, [1, 2, 3, 4], ["a", "a", "b", "b"])
        >>> [(metric.name, metric.spearman.value, metric.pair_accuracy.value) for metric in found.metrics]
        [('good', 0.8, 0.5), ('bad', 0.0, 0.5)]

    References:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979, https://doi.org/10.1214/aos/1176344552
    """
    if not scores:
        raise ValueError("agreement expected at least one metric in `scores`, got none.")
    if baseline is not None and baseline not in scores:
        raise ValueError(f"agreement: the baseline {baseline!r} is not among the metrics {', '.join(scores)}.")
    people = _columns(human, human)[0]
    index, number = _numbered(groups, len(people))
    if np.isfinite(people).sum() < 2:
        raise ValueError(f"agreement needs at least two human scores, got {np.isfinite(people).sum()}.")
    table = {name: _Column(values, people, index, number) for name, values in scores.items()}
    plain = {name: column.figures(np.ones((1, number)), _Ranks(column.human))[:, 0] for name, column in table.items()}
    order = sorted(table, key=lambda name: -np.nan_to_num(plain[name][0], nan=-2))
    best = baseline or order[0]
    compared = {name: _together(table[name], table[best]) for name in order if name != best}
    wanted = list({id(c): c for c in [*table.values(), *(c for pair in compared.values() for c in pair)]}.values())
    drawn = _bootstrap(wanted, index, number, resamples, seed)
    tail = (1 - confidence) / 2

    def estimates(values: np.ndarray, replicates: np.ndarray) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        for measure, value, row in zip(MEASURES, values, replicates, strict=True):
            known = row[np.isfinite(row)]
            bounds = np.quantile(known, [tail, 1 - tail]) if np.isfinite(value) and len(known) else [np.nan] * 2
            found[measure] = Estimate(float(value), *map(float, bounds))
        return found

    metrics: list[MetricAgreement] = []
    for name in order:
        column, differences = table[name], dict[str, Estimate]()
        if name != best:
            pair = compared[name]
            first, second = (each.figures(np.ones((1, number)), _Ranks(each.human))[:, 0] for each in pair)
            differences = estimates(first - second, drawn[id(pair[0])] - drawn[id(pair[1])])
        counts = column.counts
        pairs = PairAccuracy(float(plain[name][2]), *counts)
        own = estimates(plain[name], drawn[id(column)])
        scored = int(column.known.sum())
        metrics.append(MetricAgreement(name=name, scored=scored, pairs=pairs, differences=differences, **own))
    return Agreement(tuple(metrics), best, len(people), int(np.isfinite(people).sum()), number, confidence)


def _columns(scores: Any, human: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 `[N]`, infinity as NaN."""
    both = [np.asarray(values, dtype=np.float64) for values in (scores, human)]
    if both[0].ndim != 1 or both[0].shape != both[1].shape:
        shapes = " and ".join(str(list(values.shape)) for values in both)
        raise ValueError(f"scores and human scores must be two lists of one length, got shapes {shapes}.")
    first, second = (np.where(np.isfinite(values), values, np.nan) for values in both)
    return first, second


def _numbered(groups: Sequence[Any], length: int) -> tuple[np.ndarray, int]:
    """Number groups from 0, `[N]`, and their count."""
    if len(groups) != length:
        raise ValueError(f"expected a group for each of {length} images, got {len(groups)}.")
    numbers: dict[Any, int] = {}
    ids = groups.tolist() if hasattr(groups, "tolist") else groups  # type: ignore[attr-defined]
    index = np.array([numbers.setdefault(group, len(numbers)) for group in ids], dtype=np.int64)
    return index, len(numbers)


class _Order:
    """The order of N values, from which ranks follow for any number of copies of each."""

    def __init__(self, values: np.ndarray) -> None:
        self.order = np.argsort(values, kind="stable")
        ordered = values[self.order]
        new = np.append(True, ordered[1:] != ordered[:-1])  # NaN, which is last, is never equal
        self._starts = None if new.all() else np.flatnonzero(new)
        self._place = np.empty_like(self.order)
        self._place[self.order] = np.cumsum(new) - 1

    def ranks(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean ranks `[R, N]` where row n stands `weights[r, n]` times in sample r, and sums of their squares `[R]`.

        Ranks are measured from their mean.
        """
        totals = weights.take(self.order, axis=1)
        if self._starts is not None:
            totals = np.add.reduceat(totals, self._starts, axis=1)
        ranks = torch.from_numpy(totals).cumsum(1).numpy()  # four times as fast as numpy's
        ranks -= totals / 2 + ranks[:, -1:] / 2
        return ranks.take(self._place, axis=1), np.einsum("rn,rn,rn->r", totals, ranks, ranks)


def _rank_correlation(
    a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray], weights: np.ndarray
) -> np.ndarray:
    """Correlation `[R]` of two results of `_Order.ranks`; NaN where all ranks are equal."""
    product = np.sqrt(a[1] * b[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(product > 0, np.einsum("rn,rn,rn->r", weights, a[0], b[0]) / product, np.nan)


def _correlation(a: np.ndarray, b: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Pearson's correlation `[R]` of a and b, `[N]` or `[R, N]`, with weights `[R, N]`; NaN where one does not vary."""
    total = weights.sum(1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (x - (weights * x).sum(1, keepdims=True) / total for x in (a, b))
        spread = [(weights * x * x).sum(1) for x in (a, b)]
        scale = [1e-24 * total[:, 0] * (np.abs(x).max(1) ** 2 + 1e-300) for x in (a, b)]
        product = np.sqrt(spread[0] * spread[1])
        flat = (spread[0] <= scale[0]) | (spread[1] <= scale[1])
        return np.where(flat, np.nan, np.clip((weights * a * b).sum(1) / product, -1, 1))


def _on_human_scale(scores: np.ndarray, human: np.ndarray) -> np.ndarray:
    """The rising logistic function of the scores that correlates best with people, up to its two levels."""
    deviation = scores.std()
    if not deviation > 0:
        return scores
    step = max(1, len(scores) // _FIT_ROWS)
    fitted = np.argsort(scores, kind="stable")[::step]
    unit = (scores - scores.mean()) / deviation
    x, y = unit[fitted], human[fitted]
    low, high = np.quantile(x, [0.1, 0.9])
    middles, widths = np.linspace(low, high, 17), np.geomspace(1 / 8, 8, 13)
    middle, width = 0.0, 8.0
    for _ in range(3):
        grid = [(m, w) for m in middles for w in widths]
        curves = np.stack([_logistic(x, m, w) for m, w in grid])
        found = _correlation(curves, y, np.ones_like(curves))
        if not np.isfinite(found).any():
            return scores
        middle, width = grid[int(np.nanargmax(found))]
        span, ratio = (middles[1] - middles[0]), widths[1] / widths[0]
        middles = np.clip(np.linspace(middle - span, middle + span, 9), low, high)
        widths = np.clip(np.geomspace(width / ratio, width * ratio, 9), 1 / 8, 8)
        if middles[0] == middles[1] or widths[0] == widths[1]:  # at a border, where steps repeat
            middles, widths = np.unique(middles), np.unique(widths)
            if len(middles) < 2 or len(widths) < 2:
                break
    return _logistic(unit, middle, width)


def _logistic(x: np.ndarray, middle: float, width: float) -> np.ndarray:
    return np.tanh((x - middle) / (2 * width))


def _pairs(
    scores: np.ndarray, human: np.ndarray, index: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int]]:
    """For each group the pairs won and counted, `[G]`; and the counts of score ties, human ties and unscored pairs.

    Rows at a distance d in the order of their groups are compared for d = 1, 2, ..., which takes memory for N values.
    """
    order = np.argsort(index, kind="stable")
    a, b, g = scores[order], human[order], index[order]
    wins, pairs = np.zeros(number), np.zeros(number)
    score_ties = human_ties = unscored = 0
    for distance in range(1, int(np.bincount(index).max(initial=0))):
        same = g[distance:] == g[:-distance]
        by_score, by_people = (x[distance:] - x[:-distance] for x in (a, b))
        rated = same & np.isfinite(by_people)
        human_ties += int((rated & (by_people == 0)).sum())
        apart = rated & (by_people != 0)
        counted = apart & np.isfinite(by_score)
        unscored += int((apart & ~counted).sum())
        score_ties += int((counted & (by_score == 0)).sum())
        won = (1 + np.sign(by_score[counted]) * np.sign(by_people[counted])) / 2
        np.add.at(wins, g[distance:][counted], won)
        np.add.at(pairs, g[distance:][counted], 1.0)
    return wins, pairs, (score_ties, human_ties, unscored)


class _Column:
    """A metric's scores beside those of people, ready for any weights of the groups.

    Only rows in `known`, which have both, count.
    """

    def __init__(
        self, values: Any, human: np.ndarray, index: np.ndarray, number: int, known: np.ndarray | None = None
    ) -> None:
        scores, human = _columns(values, human)
        both = np.isfinite(scores) & np.isfinite(human)
        self.known = both if known is None else both & known
        self.values, self.human, self.index, self.number = scores, human, index, number
        inside = np.where(self.known, scores, np.nan)
        self.wins, self.pairs, ties = _pairs(inside, human, index, number)
        self.counts = (int(self.pairs.sum()), *ties)
        self._order = _Order(inside)
        rows, self._sums = self.known, np.zeros((number, 6))
        if rows.sum() > 1:
            curve, people = _on_human_scale(scores[rows], human[rows]), human[rows]
            curve, people = curve - curve.mean(), people - people.mean()
            for place, column in enumerate((curve**0, curve, people, curve**2, people**2, curve * people)):
                self._sums[:, place] = np.bincount(index[rows], column, number)

    def figures(self, draws: np.ndarray, ranks: "_Ranks") -> np.ndarray:
        """`[3, R]` `MEASURES` where group g stands `draws[r, g]` times in sample r."""
        weights = draws.take(self.index, axis=1)
        if not self.known.all():
            weights *= self.known
        rank = _rank_correlation(self._order.ranks(weights), ranks.of(self.known, weights), weights)
        n, a, b, aa, bb, ab = np.moveaxis(draws @ self._sums, 1, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            spread = [(square - x * x / n) for square, x in ((aa, a), (bb, b))]
            flat = (spread[0] <= 1e-12 * aa) | (spread[1] <= 1e-12 * bb)
            linear = np.where(flat, np.nan, np.clip((ab - a * b / n) / np.sqrt(spread[0] * spread[1]), -1, 1))
            ordered = (draws @ self.wins) / (draws @ self.pairs)
        return np.stack([rank, linear, ordered])


class _Ranks:
    """Ranks of the human scores in one set of samples, computed once for all metrics that score the same rows."""

    def __init__(self, human: np.ndarray) -> None:
        self._order, self._found = _Order(human), dict[bytes, tuple[np.ndarray, np.ndarray]]()

    def of(self, known: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        key = known.tobytes()
        if key not in self._found:
            self._found[key] = self._order.ranks(weights)
        return self._found[key]


def _together(column: _Column, baseline: _Column) -> tuple[_Column, _Column]:
    """Both columns over the rows that both have."""
    if (column.known == baseline.known).all():
        return column, baseline
    both = column.known & baseline.known
    first, second = (_Column(each.values, each.human, each.index, each.number, both) for each in (column, baseline))
    return first, second


def _bootstrap(
    columns: Sequence[_Column], index: np.ndarray, number: int, resamples: int, seed: int
) -> dict[int, np.ndarray]:
    """For each column `[3, resamples]`, all from the same draws of groups."""
    rng, step = np.random.default_rng(seed), max(1, _WEIGHTS_IN_MEMORY // max(len(index), number))
    found: dict[int, list[np.ndarray]] = {id(column): [] for column in columns}
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(number, size=(size, number)) + number * np.arange(size)[:, None]
        draws = np.bincount(drawn.ravel(), minlength=size * number).reshape(size, number).astype(np.float64)
        ranks = _Ranks(columns[0].human)
        for column in columns:
            found[id(column)].append(column.figures(draws, ranks))
    return {key: np.concatenate(parts, axis=1) for key, parts in found.items()}
