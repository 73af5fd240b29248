"""Damage photographs, score every version, and turn the remaining errors into training weights."""

# ruff: noqa: RUF001  typographic signs are meant

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import skimage.data
import torch
from PIL import Image
from torch import Tensor

import iqareward
from iqareward.agreement import spearman
from iqareward.diffusion import Degradation

REWARDS = ("psnr", "ssim", "ms_ssim", "gmsd", "haarpsi", "niqe", "piqe")
ERROR_FACTORS = (1.0, 0.8, 0.5, 0.2)  # what remains of every error as a model improves
DETAIL = 176  # side in pixels of the part of a photograph that the report shows


class Photograph(NamedTuple):
    """A photograph of `skimage.data` that is free to use, and the centre (x, y) in [0, 1] of the part to show."""

    name: str
    credit: str
    focus: tuple[float, float]


class Damage(NamedTuple):
    """The option of `Degradation` that sets a strength, five values from mild to strong, and their text in captions."""

    option: str
    strengths: tuple[float, ...]
    text: str

    def caption(self, level: int) -> str:
        """Describe a level; level 0 is the undamaged original."""
        return self.text.format(self.strengths[level - 1]) if level else "original"


PHOTOGRAPHS = (
    Photograph("chelsea", "Chelsea the cat, Stefan van der Walt, CC0", (0.45, 0.50)),
    Photograph("astronaut", "Eileen Collins, NASA, public domain", (0.42, 0.26)),
    Photograph("coffee", "Coffee cup, Rachel Michetti for Pikolo Espresso Bar, CC0", (0.58, 0.62)),
    Photograph("rocket", "DSCOVR on its Falcon 9, SpaceX, public domain", (0.52, 0.80)),
)
DAMAGES = {
    "blur": Damage("max_sigma", (0.6, 1.2, 2.0, 3.2, 5.0), "σ {:g} px"),
    "noise": Damage("max_noise", (3, 8, 15, 28, 50), "σ {:g}/255"),
    "jpeg": Damage("min_quality", (80, 50, 30, 15, 7), "quality {:g}"),
    "resize": Damage("max_factor", (1.5, 2, 3, 4, 6), "÷{0:g} ×{0:g}"),
}


@dataclass(frozen=True)
class Measured:
    """Scores and weights of P photographs with D kinds of damage at L levels."""

    photographs: tuple[Photograph, ...]
    images: list[Tensor]  # `[D, L + 1, 3, H, W]` for each photograph, with the original at level 0
    rewards: list[Any]
    scores: dict[str, Tensor]  # by the name of the reward, `[P, D, L + 1]`
    difficulty: Tensor  # root mean squared error of each damaged image, `[P, D, L]`
    weights: dict[float, iqareward.LossWeights]  # `[P, D, L]`, by the factor on all errors


class Sample(NamedTuple):
    """A damaged image with its difficulty and weights."""

    caption: str
    detail: Tensor
    difficulty: float
    rl: float
    sft: float


def load_photograph(name: str, short_side: int | None = None) -> Tensor:
    """Load a photograph of scikit-image as `[3, H, W]` in [0, 1], shrunk so that its shorter side fits `short_side`."""
    image = Image.fromarray(getattr(skimage.data, name)())
    if short_side is not None and short_side < min(image.size):
        scale = short_side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return iqareward.to_images(image)[0]


def damaged(photo: Tensor, kind: str, num_levels: int, *, seed: int = 0) -> Tensor:
    """Return the photograph and its damaged versions, `[num_levels + 1, 3, H, W]`, rounded to 8 bits."""
    option, strengths, _ = DAMAGES[kind]
    versions = [photo[None]]
    for strength in strengths[:num_levels]:
        degradation = Degradation((kind,), **{option: strength})
        versions.append(degradation(photo[None], torch.ones(1), [seed]))
    return torch.cat(versions).mul(255).round() / 255


def score(rewards: Sequence[Any], images: Tensor) -> dict[str, Tensor]:
    """Score all versions `[D, L + 1, 3, H, W]` of a photograph; `[D, L + 1]` by the name of the reward."""
    scores = {}
    for reward in rewards:
        rows = [reward(versions, references=versions[:1].expand_as(versions)) for versions in images]
        scores[reward.name] = torch.stack(rows)
    return scores


def measure(num_photographs: int, short_side: int, num_levels: int, progress: Callable[[str], None]) -> Measured:
    """Damage, score and weigh; `progress` is called with a line of text for each photograph."""
    photographs, rewards = PHOTOGRAPHS[:num_photographs], [iqareward.load(name) for name in REWARDS]
    images, scores, difficulty = [], [], []
    for index, photograph in enumerate(photographs):
        progress(f"Scoring {photograph.name} with {len(rewards)} rewards, photograph {index + 1}/{len(photographs)}")
        photo = load_photograph(photograph.name, short_side)
        versions = torch.stack([damaged(photo, kind, num_levels, seed=index) for kind in DAMAGES])
        images.append(versions)
        scores.append(score(rewards, versions))
        references = versions[:, :1].expand_as(versions[:, 1:])
        errors = iqareward.reference_distance(versions[:, 1:].flatten(0, 1), references.flatten(0, 1))
        difficulty.append(errors.view(len(DAMAGES), num_levels))
    errors = torch.stack(difficulty)
    weighter = iqareward.AdaptiveWeighter()
    weighter.calibrate(errors.flatten())
    weights = {}
    for factor in ERROR_FACTORS:
        rl, sft = weighter(errors.flatten() * factor)
        weights[factor] = iqareward.LossWeights(rl.view_as(errors), sft.view_as(errors))
    by_name = {name: torch.stack([row[name] for row in scores]) for name in scores[0]}
    return Measured(photographs, images, rewards, by_name, errors, weights)


def detail(image: Tensor, focus: tuple[float, float]) -> Tensor:
    """Cut out the square of at most `DETAIL` pixels around `focus`."""
    side = min(DETAIL, *image.shape[1:])
    left, top = (
        min(max(round(place * size) - side // 2, 0), size - side)
        for place, size in zip(focus, (image.shape[2], image.shape[1]))
    )
    return image[:, top : top + side, left : left + side]


def samples(measured: Measured, count: int) -> list[Sample]:
    """Choose damaged images from the easiest to the hardest, evenly by rank."""
    order = measured.difficulty.flatten().argsort(stable=True)
    picks = torch.linspace(0, len(order) - 1, min(count, len(order))).round().long()
    chosen = []
    for place in order[picks]:
        p, d, level = (int(index) for index in torch.unravel_index(place, measured.difficulty.shape))
        kind, damage = list(DAMAGES.items())[d]
        chosen.append(
            Sample(
                f"{kind} {damage.caption(level + 1)}",
                detail(measured.images[p][d, level + 1], measured.photographs[p].focus),
                *(float(values[p, d, level]) for values in (measured.difficulty, *measured.weights[1.0])),
            )
        )
    return chosen


def summary(measured: Measured) -> dict[str, Any]:
    """Return rank correlations of score and damage, mistakes and mean weights as plain numbers."""
    rewards = {}
    for name, scores in measured.scores.items():
        levels, table = range(scores.shape[2]), {}
        for d, kind in enumerate(DAMAGES):
            found = [spearman(row, levels) for row in scores[:, d]]
            table[kind] = {"mean": plain(sum(found) / len(found)), "worst": plain(max(found))}  # -1 is perfect
        above = (scores[..., 1:] > scores[..., :1]).float().mean()
        rewards[name] = {"correlation": table, "above_original": plain(above)}
    return {
        "photographs": [photograph.name for photograph in measured.photographs],
        "damaged_images": measured.difficulty.numel(),
        "rewards": rewards,
        "mean_weights": [
            {"errors": factor, "rl": plain(rl.mean()), "sft": plain(sft.mean())}
            for factor, (rl, sft) in measured.weights.items()
        ],
    }


def plain(value: Tensor | float) -> float | None:
    """Round a number for JSON; None if it is not finite."""
    return round(float(value), 5) if math.isfinite(value) else None


def title(reward: str) -> str:
    """Return the usual spelling of a reward's name."""
    return {"haarpsi": "HaarPSI"}.get(reward, reward.upper().replace("_", "-"))


def write_scores(measured: Measured, path: Path) -> None:
    """Write one CSV row per image: its scores, and error and weights if it is damaged."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["photograph", "damage", "level", *measured.scores, "rmse", "w_rl", "w_sft"])
        for p, photograph in enumerate(measured.photographs):
            for d, kind in enumerate(DAMAGES):
                for level in range(measured.difficulty.shape[2] + 1):
                    scores = [plain(values[p, d, level]) for values in measured.scores.values()]
                    ours = (measured.difficulty, *measured.weights[1.0]) if level else ()
                    weights = [plain(values[p, d, level - 1]) for values in ours]
                    rows.writerow([photograph.name, kind, level, *scores, *(weights or [""] * 3)])
