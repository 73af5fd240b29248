"""Scores of the same images from several methods: how far is each from the baseline, and which images show it?"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
AT_ONCE = 4_000_000  # drawn indices held in memory


@dataclass(frozen=True)
class Difference:
    """A reward's paired difference between a method and the baseline; positive = better than the baseline.

    Attributes:
        images: number of images that were compared.
        baseline: mean score of the baseline over these.
        mean: mean score of the method.
        difference: mean difference, method - baseline.
        low: lower end of its 95 % bootstrap interval; NaN for fewer than two images.
        high: upper end.
        wins: share of images where the method is better; ties count half.
    """

    images: int
    baseline: float
    mean: float
    difference: float
    low: float
    high: float
    wins: float

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the interval excludes zero, else `unclear`."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "unclear"

    @property
    def decimals(self) -> int:
        """Decimals that show two significant digits of the interval's half width."""
        half = (self.high - self.low) / 2
        return min(max(1 - math.floor(math.log10(half)), 0), 6) if half > 0 else 4


def difference(
    baseline: Sequence[float] | np.ndarray, method: Sequence[float] | np.ndarray, *, seed: int = 0
) -> Difference:
    """Paired comparison with a percentile bootstrap over images.

    Args:
        baseline: N scores, higher is better, NaN = not scored.
        method: scores of the same images.
        seed: seed of the bootstrap.

    Example:
        >>> found = difference([0.5, 0.6, 0.7], [0.6, 0.7, 0.8])
        >>> round(found.difference, 3), found.wins, found.verdict
        (0.1, 1.0, 'better')

    References:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979, https://doi.org/10.1214/aos/1176344552
    """
    a, b = np.asarray(baseline, dtype=np.float64), np.asarray(method, dtype=np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    change = b - a
    if not len(change):
        return Difference(0, *[float("nan")] * 6)
    low, high = _interval(change, seed)
    wins = float((change > 0).mean() + (change == 0).mean() / 2)
    return Difference(len(change), float(a.mean()), float(b.mean()), float(change.mean()), low, high, wins)


def _interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    if len(values) < 2:
        return float("nan"), float("nan")
    rng, step = np.random.default_rng(seed), max(1, AT_ONCE // len(values))
    means = [
        values[rng.integers(len(values), size=(min(step, RESAMPLES - start), len(values)))].mean(1)
        for start in range(0, RESAMPLES, step)
    ]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def disagreement(change: np.ndarray) -> np.ndarray:
    """How strongly rewards contradict each other about each image.

    Differences are divided by their root mean square per reward, so that rewards in dB and in [0, 1] can be compared.

    Args:
        change: `[N, R]` differences of N images by R rewards, NaN = not scored.

    Returns:
        `[N]`, the distance between the most and the least favourable reward; NaN unless one says better and one worse.
    """
    scored = np.isfinite(change)
    square = np.where(scored, change, 0.0) ** 2
    scale = np.sqrt(square.sum(0) / np.maximum(scored.sum(0), 1))
    unit = np.where(scored, change, 0.0) / np.where(scale > 0, scale, 1.0)
    best, worst = unit.max(1), unit.min(1)
    return np.where((best > 0) & (worst < 0), best - worst, np.nan)


class Choice(NamedTuple):
    """An image to look at in a method's folder, beside the baseline.

    Attributes:
        method: index of the folder, from 1; 0 is the baseline.
        image: index of the image.
        reason: why it was chosen.
    """

    method: int
    image: int
    reason: str


def choose(scores: np.ndarray, rewards: Sequence[str], count: int) -> list[Choice]:
    """Images to look at: those that differ most, both ways, and typical ones.

    For each method there are these lists: the images about which the rewards contradict each other most; and for each
    reward its largest gains, its largest losses, and the images whose difference is closest to the median. The lists
    of all methods take turns, each with its next image, until `count` pairs are chosen.

    Args:
        scores: `[F, N, R]` of F folders, the baseline first; NaN = not scored.
        rewards: R names.
        count: how many pairs of an image and a method to choose.

    Example:
        >>> scores = np.array([[[0.0], [0.0], [0.0]], [[1.0], [-3.0], [2.0]]])
        >>> [(choice.image, choice.reason) for choice in choose(scores, ["ssim"], 2)]
        [(2, 'largest gain by ssim'), (1, 'largest loss by ssim')]
    """
    chosen: dict[tuple[int, int], Choice] = {}
    lists = [_lists(method, scores[method] - scores[0], rewards) for method in range(1, len(scores))]
    for turn in zip_longest(*chain.from_iterable(zip(*lists, strict=True))):
        for choice in filter(None, turn):
            if choice[:2] not in chosen and len(chosen) < count:
                chosen[choice[:2]] = choice
        if len(chosen) >= count:
            break
    return list(chosen.values())


def _lists(method: int, change: np.ndarray, rewards: Sequence[str]) -> Iterator[Iterator[Choice]]:
    """A method's lists; `change` is `[N, R]`."""
    if len(rewards) > 1:
        yield _list(method, disagreement(change), "strongest contradiction between the rewards")
    for column, reward in enumerate(rewards):
        values = change[:, column]
        yield _list(method, np.where(values > 0, values, np.nan), f"largest gain by {reward}")
        yield _list(method, np.where(values < 0, -values, np.nan), f"largest loss by {reward}")
        finite = values[np.isfinite(values)]
        middle = np.median(finite) if len(finite) else 0.0
        yield _list(method, -np.abs(values - middle), f"typical by {reward}")


def _list(method: int, keys: np.ndarray, reason: str) -> Iterator[Choice]:
    """The images with a key, the largest key first."""
    for place, image in enumerate(np.argsort(-keys, kind="stable")[: np.isfinite(keys).sum()].tolist()):
        rank = "" if place == 0 or reason.startswith("typical") else f", rank {place + 1}"
        yield Choice(method, image, reason + rank)
