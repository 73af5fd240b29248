"""How a student agrees with its teacher on images that it has not seen, and on which kinds of images it does not."""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from iqareward.agreement import agreement
from iqareward.image_files import read_image
from iqareward.images import to_images
from iqareward.types import Reward

from .training import Group

_FEWEST_PAIRS = 20  # of a kind of which a warning can speak
_TRUSTED = 0.75  # share of the pairs in the teacher's order below which a kind gets a warning
_BIASED = 0.15  # mean difference between student and teacher from which a kind gets one
_BATCH = 16
LIGHT_NOISE = 3.0  # of 255
_NAME = re.compile(r"(?P<kind>.+)-(?P<level>\d+(?:\.\d+)?)")


class Report(NamedTuple):
    """Agreement on held-out inputs.

    Attributes:
        spearman: rank correlation over all images.
        pairs: (share of the pairs within an input in the teacher's order, low, high), an interval by bootstrap over
            inputs.
        kinds: for each kind of images `pairs` (of one with another image of its input, in the teacher's order), their
            number `count`, `bias` (mean of student - teacher), the same for the lowest and highest third of the levels,
            and `warning`, empty if there is no reason for one.
        light_noise: share of the images whose score light noise lowers.
        images: number of images.
        inputs: number of inputs.
    """

    spearman: float
    pairs: tuple[float, float, float]
    kinds: dict[str, dict[str, Any]]
    light_noise: float
    images: int
    inputs: int


def report(student: Reward, groups: Sequence[Group], *, seed: int = 0) -> Report:
    """Compare scores of the student with the targets that the groups carry in place of the teacher's scores."""
    scores = [_scores(student, group) for group in groups]
    wanted, found = np.concatenate([group.scores for group in groups]), np.concatenate(scores)
    names = [group.name for group in groups for _ in group.files]
    (metric,) = agreement({"student": found}, wanted, names, seed=seed).metrics
    draws = np.random.default_rng(seed)
    noisy = np.concatenate([_scores(student, group, draws) for group in groups])
    return Report(
        metric.spearman.value, tuple(metric.pair_accuracy), _by_kind(groups, scores), float((noisy < found).mean()),
        len(wanted), len(groups),
    )  # fmt: skip


def kind_and_level(stem: str) -> tuple[str, float]:
    """The kind and level in a file's name such as "noise-12.5"; other names are of one kind, "image"."""
    match = _NAME.fullmatch(stem)
    return (match["kind"], float(match["level"])) if match else ("image", math.nan)


def _scores(student: Reward, group: Group, noise: np.random.Generator | None = None) -> np.ndarray:
    images = [to_images(read_image(file), value_range=(0, 1))[0] for file in group.files]
    if noise is not None:
        patterns = [torch.from_numpy(noise.standard_normal(image.shape, dtype=np.float32)) for image in images]
        images = [
            (image + LIGHT_NOISE / 255 * pattern).clamp(0, 1) for image, pattern in zip(images, patterns, strict=True)
        ]
    parts = [student(images[begin : begin + _BATCH]) for begin in range(0, len(images), _BATCH)]
    return torch.cat(parts).cpu().double().numpy()


def _by_kind(groups: Sequence[Group], scores: Sequence[np.ndarray]) -> dict[str, dict[str, Any]]:
    # of each image: its level, student - teacher, and of its pairs how many agree and how many there are
    rows: dict[str, list[tuple[float, float, float, int]]] = {}
    for group, found in zip(groups, scores, strict=True):
        for place, file in enumerate(group.files):
            kind, level = kind_and_level(file.stem)
            gaps, ours = group.scores[place] - group.scores, found[place] - found
            told = (gaps != 0) & np.isfinite(ours)
            agree = float(((np.sign(gaps) * np.sign(ours))[told] + 1).sum() / 2)
            row = (level, float(found[place] - group.scores[place]), agree, int(told.sum()))
            rows.setdefault(kind, []).append(row)
    return {kind: _summary(found) for kind, found in sorted(rows.items())}


def _summary(rows: list[tuple[float, float, float, int]]) -> dict[str, Any]:
    levels = [row[0] for row in rows]
    facts = _figures(rows)
    reasons = []
    if facts["count"] >= _FEWEST_PAIRS:
        if facts["pairs"] < _TRUSTED:
            reasons.append(f"only {facts['pairs']:.2f} of its pairs are in the teacher's order")
        if abs(facts["bias"]) > _BIASED:
            side = "higher" if facts["bias"] > 0 else "lower"
            reasons.append(f"scored {abs(facts['bias']):.2f} {side} than by the teacher")
    if len(rows) >= 3 and len(set(levels)) > 1:
        low, high = np.quantile(levels, [1 / 3, 2 / 3])
        facts["lowest levels"] = _figures([row for row in rows if row[0] <= low])
        facts["highest levels"] = _figures([row for row in rows if row[0] >= high])
        for part in ("lowest levels", "highest levels"):
            if not reasons and facts[part]["count"] >= _FEWEST_PAIRS and facts[part]["pairs"] < _TRUSTED:
                reasons.append(f"only {facts[part]['pairs']:.2f} of the pairs of its {part} are in the teacher's order")
    return {**facts, "warning": " and ".join(reasons)}


def _figures(rows: Sequence[tuple[float, float, float, int]]) -> dict[str, Any]:
    count = sum(row[3] for row in rows)
    agree = sum(row[2] for row in rows)
    return {
        "pairs": agree / count if count else math.nan, "count": count, "bias": float(np.mean([row[1] for row in rows]))
    }  # fmt: skip
