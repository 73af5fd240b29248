"""Bring a reward to [0, 1] by a fixed monotone map, so that rewards can be added, gated and compared between runs.

A map is fitted once, on the scores of a frozen set of images, and never moves with the policy: thresholds and gates
keep their meaning (facts that a running z-score would lose).
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from iqareward._gradients import clamp
from iqareward.atomic import write_text
from iqareward.functional._constants import constant
from iqareward.rewards.calls import Call
from iqareward.rewards.core import Wrapper
from iqareward.rewards.scoring import reward_mode
from iqareward.types import Reward, Scores


@final
@dataclass(frozen=True)
class AffineMap:
    """`(score - low) / (high - low)`, clamped to [0, 1].

    Args:
        low: the score that becomes 0.
        high: the score that becomes 1.

    Raises:
        ValueError: `low` is not below `high`, or one is not finite.

    Example:
        >>> AffineMap(-100.0, 0.0)(torch.tensor([-100.0, -25.0, 5.0]))
        tensor([0.0000, 0.7500, 1.0000])
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not (self.low < self.high and math.isfinite(self.high - self.low)):
            raise ValueError(f"AffineMap expected finite numbers low < high, got ({self.low}, {self.high}).")

    @classmethod
    def fit(cls, scores: Tensor) -> "AffineMap":
        """Map the 1st and 99th percentiles of `scores` `[N]` to 0 and 1, so that one outlier does not set the scale."""
        low, high = torch.quantile(_usable(scores, "AffineMap"), torch.tensor([0.01, 0.99], dtype=torch.float64))
        return cls(float(low), float(high))

    def __call__(self, scores: Tensor) -> Tensor:
        return clamp((scores - self.low) / (self.high - self.low), 0, 1)


@final
@dataclass(frozen=True)
class LogisticMap:
    """`1 / (1 + exp(-(score - center) / scale))`: smooth, never flat, outliers saturate.

    Args:
        center: the score that becomes 0.5.
        scale: > 0, in units of the score.

    Raises:
        ValueError: `scale` is not positive, or a number is not finite.

    Example:
        >>> LogisticMap.fit(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))(torch.tensor([2.0, 3.0, 4.0]))
        tensor([0.2500, 0.5000, 0.7500])
    """

    center: float
    scale: float

    def __post_init__(self) -> None:
        if not (self.scale > 0 and math.isfinite(self.center) and math.isfinite(self.scale)):
            raise ValueError(
                f"LogisticMap expected a finite center and a finite scale > 0, got {self.center} and {self.scale}."
            )

    @classmethod
    def fit(cls, scores: Tensor) -> "LogisticMap":
        """Match the median and the quartiles of `scores` `[N]`: they become 1/2, 1/4 and 3/4."""
        quartiles = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
        lower, median, upper = torch.quantile(_usable(scores, "LogisticMap"), quartiles).tolist()
        return cls(median, (upper - lower) / (2 * math.log(3)))  # logit(3/4) = ln 3

    def __call__(self, scores: Tensor) -> Tensor:
        return torch.sigmoid((scores - self.center) / self.scale)


@final
@dataclass(frozen=True)
class CDFMap:
    """The share of the frozen set that an image beats: the empirical distribution function, linear between its knots.

    Args:
        knots: strictly increasing scores.
        levels: what they become, increasing in [0, 1]; a tied score becomes the middle of its ties.

    Raises:
        ValueError: fewer than two knots, another number of levels, either does not rise, or leaves its range.

    Example:
        >>> CDFMap.fit(torch.tensor([0.0, 1.0, 2.0, 30.0, 400.0]))(torch.tensor([-1.0, 1.0, 900.0]))
        tensor([0.0000, 0.2500, 1.0000])
    """

    knots: tuple[float, ...]
    levels: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.knots[:-1], self.knots[1:], strict=True))
        rising &= all(a < b for a, b in zip(self.levels[:-1], self.levels[1:], strict=True))
        finite = all(math.isfinite(knot) for knot in self.knots) and all(0 <= level <= 1 for level in self.levels)
        if len(self.knots) < 2 or len(self.knots) != len(self.levels) or not (rising and finite):
            raise ValueError(
                "CDFMap expected at least two finite, strictly increasing knots and as many strictly increasing levels "
                f"in [0, 1], got {len(self.knots)} and {len(self.levels)}. CDFMap.fit(scores) makes them."
            )

    @classmethod
    def fit(cls, scores: Tensor, *, num_knots: int = 257) -> "CDFMap":
        """Take `num_knots` evenly spaced quantiles of `scores` `[N]`."""
        levels = torch.linspace(0, 1, num_knots, dtype=torch.float64)
        knots, tie = torch.quantile(_usable(scores, "CDFMap"), levels).unique(return_inverse=True)
        middle = torch.zeros_like(knots).index_add_(0, tie, levels) / tie.bincount()
        return cls(tuple(knots.tolist()), tuple(middle.tolist()))

    def __call__(self, scores: Tensor) -> Tensor:
        knots, levels = (constant(row, scores.dtype, scores.device) for row in (self.knots, self.levels))
        upper = torch.searchsorted(knots, scores.detach().contiguous()).clamp(1, len(self.knots) - 1)
        position = clamp((scores - knots[upper - 1]) / (knots[upper] - knots[upper - 1]), 0, 1)
        return torch.lerp(levels[upper - 1], levels[upper], position)


ScoreMap: TypeAlias = AffineMap | LogisticMap | CDFMap
_MAPS = {"affine": AffineMap, "logistic": LogisticMap, "cdf": CDFMap}


@final
class Calibrated(Wrapper):
    """A reward in [0, 1]: a reward followed by a fixed monotone map of its scores; NaN stays NaN.

    Args:
        reward: any reward.
        score_map: `AffineMap`, `LogisticMap` or `CDFMap`; `.fit(scores)` on the scores of a frozen set makes one.
        name: default: the reward's.

    Example:
        >>> import torch, iqareward
        >>> psnr = iqareward.Calibrated(iqareward.load("psnr"), iqareward.AffineMap(20.0, 40.0))
        >>> references = torch.full((1, 3, 16, 16), 0.5)
        >>> psnr(references + 10 ** -1.5, references=references)  # 30 dB
        tensor([0.5000])
    """

    def __init__(self, reward: Reward, score_map: ScoreMap, *, name: str | None = None) -> None:
        super().__init__(reward)
        self.score_map, self.name, self.bounds = score_map, name or reward.name, (0.0, 1.0)

    def score_call(self, call: Call) -> Scores:
        scores = call.score(self.reward)
        with reward_mode(differentiable=self.differentiable, device_type=scores.device.type):
            scored = scores.isfinite()
            # Masked before the map, too: its gradient at NaN would be NaN.
            return torch.where(scored, self.score_map(torch.where(scored, scores, 0.0)), torch.nan)


def save_map(score_map: ScoreMap, path: str | Path) -> None:
    """Write a map as JSON, to commit beside the run that used it.

    Args:
        score_map: `AffineMap`, `LogisticMap` or `CDFMap`.
        path: of the file; one that is there is overwritten.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_map(AffineMap(10.0, 50.0), f"{folder}/psnr.json")
        ...     print(load_map(f"{folder}/psnr.json"))
        AffineMap(low=10.0, high=50.0)
    """
    kind = next(name for name, cls in _MAPS.items() if isinstance(score_map, cls))
    write_text(path, json.dumps({"map": kind, **asdict(score_map)}) + "\n")


def load_map(path: str | Path) -> ScoreMap:
    """Read a map that `save_map` wrote; the numbers are exactly the saved ones.

    Args:
        path: of the file.

    Returns:
        The map.

    Raises:
        ValueError: the file is not such a map.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_map(LogisticMap(center=0.3, scale=0.1), f"{folder}/judge.json")
        ...     load_map(f"{folder}/judge.json")(torch.tensor([0.3]))
        tensor([0.5000])
    """
    content = Path(path).read_bytes()
    try:
        fields = json.loads(content)
        kind = _MAPS[fields.pop("map")]
        values: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in fields.items()}
        return kind(**values)
    except Exception as error:  # whatever the decoder and the maps make of a damaged file
        raise ValueError(f"{path} is not a saved score map ({error!r}); save_map writes one.") from error


def _usable(scores: Tensor, who: str) -> Tensor:
    """The scored part of a frozen set, in float64 for exact quantiles."""
    usable = scores.detach().double().cpu()
    usable = usable[usable.isfinite()]
    if usable.numel() < 2 or bool(usable.min() == usable.max()):
        raise ValueError(
            f"{who}.fit expected the scores of a frozen set with at least two different values, "
            f"got {usable.numel()} scored images. Score more, or more different, images."
        )
    return usable
