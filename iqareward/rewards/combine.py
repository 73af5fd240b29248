"""Combine rewards: log several, sum them, take the worst, require a minimum fidelity, map one to [0, 1]."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from iqareward._gradients import clamp
from iqareward.atomic import write_text
from iqareward.functional._chunks import constant
from iqareward.rewards.calls import Call
from iqareward.rewards.core import Combined, Wrapper, check_names, numbers, reward_mode
from iqareward.types import Bounds, Groups, Images, Reward, Scores


def evaluate(
    rewards: Sequence[Reward],
    images: Images,
    references: Images | None = None,
    *,
    inputs: Images | None = None,
    prompts: Sequence[str] | None = None,
    ids: Groups | None = None,
    tasks: Sequence[str] | None = None,
) -> dict[str, Scores]:
    """Score images with several rewards and return the scores by name, to log or combine them.

    Args:
        rewards: with unique names.
        images: `[B, 3, H, W]` float RGB in [0, 1], or a sequence of `[3, H, W]`.
        references: The ground truth, in the same shapes, for rewards that need it.
        inputs: the degraded images, for rewards that need them.
        prompts: one per image, for rewards that need them.
        ids: one integer per image, the same for all rollouts of an input, for rewards that need them.
        tasks: one per image, for rewards that need them.

    Returns:
        name -> unweighted `[B]` float32, higher is better, NaN = not scored.

    Raises:
        ValueError: two rewards have the same name.

    Example:
        >>> import torch, iqareward
        >>> images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> scores = iqareward.evaluate([iqareward.load("psnr"), iqareward.load("ssim")], images, references=images)
        >>> {name: score.tolist() for name, score in scores.items()}
        {'psnr': [100.0, 100.0], 'ssim': [1.0, 1.0]}
    """
    check_names("evaluate", rewards)
    call = Call(images, references, inputs, prompts, ids, tasks)
    return {reward.name: call.score(reward) for reward in rewards}


@final
class WeightedSum(Combined):
    """The weighted sum of several rewards, `sum_k weight_k * score_k`; NaN where any of them is NaN.

    Scores are added as they are. Different rewards have different scales (PSNR spans tens, SSIM one): bring them to one
    scale with `Calibrated`, or the widest decides alone. `load` does so in a sum of names. This class changes nothing,
    because rewards of your own need not declare bounds.

    Args:
        terms: (weight, reward) pairs; the names of the rewards must be unique.
        name: Name of the reward; by default the formula, e.g. `"0.7*qalign + 0.3*ssim"`.

    Raises:
        ValueError: no terms, two rewards of the same name, or a weight that is not finite in float32.
        TypeError: a term that is not a (weight, reward) pair.

    Example:
        >>> import torch, iqareward
        >>> reward = iqareward.WeightedSum([(0.5, iqareward.load("psnr[calibrated]")), (0.5, iqareward.load("ssim"))])
        >>> images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reward(images, references=images)
        tensor([1.])
    """

    def __init__(self, terms: Sequence[tuple[float, Reward]], *, name: str | None = None) -> None:
        try:
            pairs = list(terms)
            self.weights = tuple(float(weight) for weight, _ in pairs)
        except OverflowError as error:
            raise ValueError("WeightedSum expected weights that are finite in float32, got a larger one.") from error
        except (TypeError, ValueError) as error:
            raise TypeError(f"WeightedSum expected `terms` as (weight, reward) pairs, got {terms!r}.") from error
        parts = [reward for _, reward in pairs]
        check_names("WeightedSum", parts)
        if not all(abs(weight) <= torch.finfo(torch.float32).max for weight in self.weights):
            raise ValueError(f"WeightedSum expected weights that are finite in float32, got {list(self.weights)}.")
        formula = " + ".join(f"{exact(weight)}*{reward.name}" for weight, reward in zip(self.weights, parts))
        lows, highs = zip(*(_scaled(weight, reward.bounds) for weight, reward in zip(self.weights, parts)))
        super().__init__(parts, name=name or formula, bounds=(_total(lows), _total(highs)))

    def combine_rows(self, rows: Tensor) -> Scores:
        """The weighted sum of each image."""
        return torch.stack([weight * row for weight, row in zip(self.weights, rows.unbind(), strict=True)]).sum(0)


@final
class SoftMin(Combined):
    """A smooth minimum of several rewards, so that none can be traded for another; NaN where any is NaN.

    `-T log(mean_k exp(-score_k / T))`: it lies between the smallest and the mean of the scores. The scores must share a
    scale, as `load("psnr[calibrated]")` and `load("haarpsi[calibrated]")` do.

    Args:
        rewards: with unique names.
        temperature: T > 0 in units of the scores; towards 0 it becomes the plain minimum.
        name: Name of the reward; by default made from those of the parts.

    Raises:
        ValueError: no rewards, two of the same name, or a temperature that is not positive and finite.
        TypeError: the temperature is not a number.

    Example:
        >>> import torch, iqareward
        >>> parts = [iqareward.load("psnr[calibrated]"), iqareward.load("haarpsi[calibrated]")]
        >>> images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> 0.9 < iqareward.SoftMin(parts, temperature=0.1)(images, references=images).item() < 1
        True

    References:
        Boyd and Vandenberghe, "Convex Optimization", 2004, section 3.1.5 (log-sum-exp),
        https://web.stanford.edu/~boyd/cvxbook/
    """

    def __init__(self, rewards: Sequence[Reward], *, temperature: float, name: str | None = None) -> None:
        check_names("SoftMin", rewards)
        (self.temperature,) = numbers("SoftMin", temperature=temperature)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"SoftMin expected a finite `temperature` > 0 in units of the scores, got {temperature}.")
        lows, highs = zip(*(reward.bounds for reward in rewards), strict=True)
        low, total = None if None in lows else min(lows), _total(highs)
        high = None if total is None else total / len(highs)  # never above the mean
        formula = f"softmin({', '.join(reward.name for reward in rewards)})"
        super().__init__(rewards, name=name or formula, bounds=(low, high))

    def combine_rows(self, rows: Tensor) -> Scores:
        """The soft minimum of each image."""
        return -self.temperature * (torch.logsumexp(rows / -self.temperature, dim=0) - math.log(len(rows)))


@final
class FidelityFloor(Combined):
    """A no-reference reward that counts only for images whose fidelity to the reference is above a floor.

    Where `fidelity >= floor` the score is the reward's. Below, it is `low + (fidelity - floor)`: under every score
    above the floor, and rising with fidelity, so that an image which a judge likes but which lost its content cannot
    win.

    Args:
        reward: the judge.
        fidelity: a full-reference reward, e.g. `load("psnr")`.
        floor: in units of `fidelity`.
        low: the least score that `reward` gives; default: its lower bound.
        name: Name of the reward; by default made from those of the parts.

    Raises:
        ValueError: `reward` has no lower bound and `low` is not given, both have one name, or a number is not finite.
        TypeError: `floor` or `low` is not a number.

    Example:
        >>> import torch, iqareward
        >>> judge = iqareward.load("niqe[calibrated]")  # stands for a judge such as "qalign"
        >>> reward = iqareward.FidelityFloor(judge, iqareward.load("psnr"), floor=25.0)
        >>> references = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
        >>> reward(1 - references, references=references) < 0  # below every score of the judge
        tensor([True])
    """

    def __init__(
        self,
        reward: Reward,
        fidelity: Reward,
        *,
        floor: float,
        low: float | None = None,
        name: str | None = None,
    ) -> None:
        check_names("FidelityFloor", [reward, fidelity])
        low = reward.bounds[0] if low is None else low
        if low is None:
            raise ValueError(
                f"FidelityFloor expected a reward with a lower bound, but {reward.name} has none. "
                "Pass low=..., or take its calibrated form, such as load('niqe[calibrated]')."
            )
        self.floor, self.low = numbers("FidelityFloor", floor=floor, low=low)
        if not (math.isfinite(self.floor) and math.isfinite(self.low)):
            raise ValueError(f"FidelityFloor expected finite `floor` and `low`, got {floor} and {low}.")
        formula = f"{reward.name}[{fidelity.name}>={exact(self.floor)}]"
        super().__init__([reward, fidelity], name=name or formula, bounds=(None, reward.bounds[1]))

    def combine_rows(self, rows: Tensor) -> Scores:
        """The guarded score of each image."""
        scores, fidelity = rows.unbind()
        shortfall = fidelity - self.floor
        guarded = torch.where(shortfall >= 0, scores, self.low + shortfall)
        return torch.where(scores.isnan() | fidelity.isnan(), torch.nan, guarded)


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
        numbers("AffineMap", low=self.low, high=self.high)
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
        numbers("LogisticMap", center=self.center, scale=self.scale)
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
    """The share of a frozen set that an image beats: its empirical distribution function, linear between knots.

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
        for field in ("knots", "levels"):
            given = getattr(self, field)
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise TypeError(f"CDFMap expected `{field}` as a sequence of numbers, got {given!r}.")
            object.__setattr__(self, field, tuple(numbers("CDFMap", **{field: each})[0] for each in given))
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
        if not isinstance(num_knots, int) or num_knots < 2:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"CDFMap.fit expected `num_knots` as an integer >= 2, got {num_knots!r}.")
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
    """Map the scores of a reward to [0, 1] with a fixed monotone function; NaN stays NaN.

    Args:
        reward: any reward.
        score_map: `AffineMap`, `LogisticMap` or `CDFMap`; `.fit(scores)` on the scores of a frozen set makes one.
        name: Name of the result; by default that of the reward.

    Raises:
        TypeError: `reward` or `score_map` is something else.

    Example:
        >>> import torch, iqareward
        >>> psnr = iqareward.Calibrated(iqareward.load("psnr"), iqareward.AffineMap(20.0, 40.0))
        >>> references = torch.full((1, 3, 16, 16), 0.5)
        >>> psnr(references + 10 ** -1.5, references=references)  # 30 dB
        tensor([0.5000])
    """

    def __init__(self, reward: Reward, score_map: ScoreMap, *, name: str | None = None) -> None:
        super().__init__(reward)
        if not isinstance(score_map, ScoreMap):
            raise TypeError(
                "Calibrated expected `score_map` as an AffineMap, LogisticMap or CDFMap, got "
                f"{score_map!r}. Write AffineMap(low, high), or fit one: AffineMap.fit(scores)."
            )
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
        path: Where to write it; a file that is there is overwritten.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_map(AffineMap(10.0, 50.0), f"{folder}/psnr.json")
        ...     print(load_map(f"{folder}/psnr.json"))
        AffineMap(low=10.0, high=50.0)
    """
    kind = next((name for name, cls in _MAPS.items() if isinstance(score_map, cls)), None)
    if kind is None:
        raise TypeError(f"save_map expected an AffineMap, LogisticMap or CDFMap, got {score_map!r}.")
    write_text(path, json.dumps({"map": kind, **asdict(score_map)}) + "\n")


def load_map(path: str | Path) -> ScoreMap:
    """Read a map that `save_map` wrote; the numbers are exactly the saved ones.

    Args:
        path: The file.

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
        return map_of(json.loads(content))
    except Exception as error:  # whatever the decoder and the maps make of a damaged file
        raise ValueError(f"{path} is not a saved score map ({error!r}); save_map writes one.") from error


def map_of(fields: Mapping[str, Any]) -> ScoreMap:
    """The map of what `save_map` writes."""
    return _MAPS[fields["map"]](**{name: value for name, value in fields.items() if name != "map"})


def exact(number: float) -> str:
    """The shortest text that reads back as the same float64; a cache tells rewards apart by their names."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))


def _scaled(weight: float, bounds: Bounds) -> Bounds:
    """Bounds of `weight * score`."""
    if weight == 0:
        return (0.0, 0.0)
    low, high = (None if bound is None else weight * bound for bound in bounds)
    return (low, high) if weight > 0 else (high, low)


def _total(bounds: Sequence[float | None]) -> float | None:
    known = [bound for bound in bounds if bound is not None]
    return sum(known) if len(known) == len(bounds) else None


def _usable(scores: Tensor, who: str) -> Tensor:
    """The scored part of a frozen set, in float64 for exact quantiles."""
    if not isinstance(scores, Tensor):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"{who}.fit expected `scores` as a tensor [N], got {scores!r}.")
    usable = scores.detach().double().cpu()
    usable = usable[usable.isfinite()]
    if usable.numel() < 2 or bool(usable.min() == usable.max()):
        raise ValueError(
            f"{who}.fit expected the scores of a frozen set with at least two different values, "
            f"got {usable.numel()} scored images. Score more, or more different, images."
        )
    return usable
