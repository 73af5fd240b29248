"""Two sets of scores of the same inputs: which is better, by how much, and where do the rewards disagree?"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
AT_ONCE = 4_000_000  # drawn indices held in memory


@dataclass(frozen=True)
class Difference:
    """One reward's verdict; positive = the second set is better.

    Attributes:
        reward: its name.
        pairs: how many pairs both have a score.
        first: mean score of the first set over these.
        second: of the second set.
        mean: mean difference, second - first.
        low: end of its 95 % bootstrap interval; NaN for fewer than two pairs.
        high: the other end.
        wins: share of pairs where the second is better; ties count half.
    """

    reward: str
    pairs: int
    first: float
    second: float
    mean: float
    low: float
    high: float
    wins: float

    @property
    def verdict(self) -> str:
        """Which set is better, if the interval excludes zero."""
        if self.low > 0:
            return "second"
        return "first" if self.high < 0 else "unclear"


def difference(reward: str, first: Sequence[float], second: Sequence[float], *, seed: int = 0) -> Difference:
    """Paired comparison with a percentile bootstrap over pairs.

    Args:
        reward: its name.
        first: N scores, higher is better, NaN = not scored.
        second: those of the same inputs.
        seed: of the bootstrap.

    Example:
        >>> found = difference("ssim", [0.5, 0.6, 0.7], [0.6, 0.7, 0.8])
        >>> round(found.mean, 3), found.wins, found.verdict
        (0.1, 1.0, 'second')

    References:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979, https://doi.org/10.1214/aos/1176344552
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    change = b - a
    if not len(change):
        return Difference(reward, 0, *[float("nan")] * 6)
    low, high = _interval(change, seed)
    wins = float((change > 0).mean() + (change == 0).mean() / 2)
    return Difference(reward, len(change), float(a.mean()), float(b.mean()), float(change.mean()), low, high, wins)


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


def disagreement(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How much the rewards contradict each other about each pair; with one reward, how far apart it finds the two.

    Differences are divided by their root mean square per reward, so that rewards in dB and in [0, 1] can be compared.
    The answer is the distance between the most favourable and the least favourable of them.

    Args:
        first: `[N, R]` scores of N inputs by R rewards, NaN = not scored.
        second: of the same shape.

    Returns:
        `[N]`, larger = look at it first; NaN where fewer rewards than two (or than one, if there is one) have a score.
    """
    change = second - first
    scored = np.isfinite(change)
    square = np.where(scored, change, 0.0) ** 2
    scale = np.sqrt(square.sum(0) / np.maximum(scored.sum(0), 1))
    unit = change / np.where(scale > 0, scale, 1.0)
    if change.shape[1] == 1:
        return np.abs(unit[:, 0])
    spread = np.where(scored, unit, -np.inf).max(1) - np.where(scored, unit, np.inf).min(1)
    return np.where(scored.sum(1) >= 2, spread, np.nan)
