"""The drawings: each puts one statement into one pair of axes, so that a page can place them as it likes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iqareward.demo.experiment import Experiment
from iqareward.demo.palette import MARKERS, Palette

LABEL_HEIGHT = 0.16
"""Inches between two labels at the ends of lines, so that they do not touch."""


def draw_curves(axes: Any, *, experiment: Experiment, reward: str, palette: Palette) -> None:
    """A reward's score against the damage: the mean of the photographs bold, each photograph thin."""
    scores = experiment.scores[reward]
    # PSNR of a picture with itself is infinite by formula and a cap here; the curve starts at the first damage.
    first = 1 if reward == "psnr" else 0
    levels = list(range(first, scores.shape[2]))
    ends = []
    for index, degradation in enumerate(experiment.degradations):
        colour, marker = palette.series[index], MARKERS[index]
        for row in scores[:, index, first:]:
            axes.plot(levels, row.tolist(), color=colour, linewidth=0.7, alpha=0.35, zorder=2)
        mean = scores[:, index, first:].mean(0).tolist()
        axes.plot(levels, mean, color=colour, linewidth=2, marker=marker, markersize=4.5, zorder=3)
        ends.append((mean[-1], degradation.name, colour))
    axes.set_xticks(range(scores.shape[2]))
    axes.set_xlim(-0.2, scores.shape[2] - 0.85)
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y")
    low, high = axes.get_ylim()
    ends = [end for end in ends if end[0] == end[0]]  # a reward without a score here has no line to label
    gap = LABEL_HEIGHT / (axes.get_position().height * axes.figure.get_figheight())
    places = spread([(value - low) / (high - low) for value, _, _ in ends], gap)
    for (_, name, colour), place in zip(ends, places, strict=True):
        axes.text(
            1.02, place, name, color=colour, transform=axes.transAxes, va="center", fontweight="bold", fontsize=8.5
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places moved apart until neighbours are `gap` away, as little as possible, in the same order.

    Example:
        >>> [round(place, 2) for place in spread([0.5, 0.1, 0.52], 0.1)]
        [0.46, 0.1, 0.56]
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    moved = [places[index] for index in order]
    for _ in range(100):  # each pass resolves the overlaps that the last one made; few labels need few passes
        for i in range(len(moved) - 1):
            overlap = gap - (moved[i + 1] - moved[i])
            if overlap > 1e-9:
                moved[i] -= overlap / 2
                moved[i + 1] += overlap / 2
    result = [0.0] * len(places)
    for place, index in zip(moved, order, strict=True):
        result[index] = place
    return result


def draw_weights(axes: Any, *, experiment: Experiment, palette: Palette) -> None:
    """RL weight against difficulty, a dot per damaged picture."""
    steps = experiment.difficulty * 255
    order = steps.flatten().argsort()
    axes.plot(steps.flatten()[order], experiment.rl.flatten()[order], color=palette.line, linewidth=3, zorder=1)
    for index, degradation in enumerate(experiment.degradations):
        axes.scatter(
            steps[:, index].flatten(),
            experiment.rl[:, index].flatten(),
            color=palette.series[index],
            marker=MARKERS[index],
            s=26,
            linewidths=0,
            alpha=0.85,
            label=degradation.name,
            zorder=2,
        )
    centre = float(steps.log().mean().exp())
    axes.axvline(centre, color=palette.muted, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.text(
        centre * 1.04,
        0.02,
        f"typical error {centre:.1f}: half and half",
        color=palette.muted,
        fontsize=8.5,
        va="bottom",
    )
    axes.set_xscale("log")
    low, high = float(steps.min()), float(steps.max())
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if low * 0.8 <= tick <= high * 1.25]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.5, 1], ["all SFT", "half", "all RL"])
    axes.grid(axis="y")
    axes.set_xlabel("difficulty: RMSE to the original, in steps of 1/255")
    legend = axes.legend(loc="upper left", bbox_to_anchor=(0, 0.96), frameon=False, handletextpad=0.2)
    for text, colour in zip(legend.get_texts(), palette.series, strict=False):
        text.set_color(colour)
        text.set_fontweight("bold")


def draw_share(axes: Any, *, rl: Tensor, palette: Palette) -> None:
    """RL weights of all samples, sorted from easy to hard: the filled area is the share of RL."""
    weights = rl.flatten().sort().values
    edges = torch.linspace(0, 1, len(weights) + 1).tolist()
    axes.fill_between([0, 1], 1, color=palette.sft, linewidth=0)
    axes.stairs(weights.tolist(), edges, fill=True, color=palette.rl, linewidth=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    axes.set_xticks([0, 1], ["easy", "hard"])
    for tick, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        tick.set_horizontalalignment(side)
    axes.set_yticks([0, 1])
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
