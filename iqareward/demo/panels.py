"""The drawings: each puts one statement into one pair of axes, so that a page can place them as it likes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iqareward.demo.experiment import Experiment
from iqareward.demo.palette import DAY, MARKERS
from iqareward.weighting import LossWeights

LABEL_HEIGHT = 0.16
"""Inches between two labels at the ends of lines, so that they do not touch."""


def draw_curves(axes: Any, *, experiment: Experiment, reward: str) -> None:
    """A reward's score against the damage: the mean of the photographs bold, each photograph thin."""
    scores = experiment.scores[reward]
    # PSNR of a picture with itself is infinite by formula and a cap here; the curve starts at the first damage.
    first = 1 if reward == "psnr" else 0
    levels = list(range(first, scores.shape[2]))
    ends = []
    for index, degradation in enumerate(experiment.degradations):
        colour, marker = DAY.series[index], MARKERS[index]
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


def draw_weights(axes: Any, *, experiment: Experiment) -> None:
    """Both weights against difficulty: a dot per damaged picture for SFT, a line for RL."""
    steps = experiment.difficulty * 255
    order = steps.flatten().argsort(stable=True)
    sorted_steps = steps.flatten()[order]
    for weights, colour in ((experiment.weights.sft, DAY.sft), (experiment.weights.rl, DAY.rl)):
        axes.plot(sorted_steps, weights.flatten()[order], color=colour, linewidth=3, zorder=1)
    for index, degradation in enumerate(experiment.degradations):
        axes.scatter(
            steps[:, index].flatten(),
            experiment.weights.sft[:, index].flatten(),
            color=DAY.series[index],
            marker=MARKERS[index],
            s=26,
            linewidths=0,
            label=degradation.name,
            zorder=2,
        )
    for name, weights in zip(("SFT", "RL"), (experiment.weights.sft, experiment.weights.rl), strict=True):
        last = float(weights.flatten()[order[-1]])
        axes.annotate(
            name, (float(sorted_steps[-1]), last), (8, 0), textcoords="offset points", va="center", fontweight="bold"
        )
    _difficulty_axis(axes, steps)
    axes.set_ylim(-0.03, 1.06)
    axes.set_yticks([0, 0.5, 1])
    axes.set_ylabel("weight")
    axes.grid(axis="y")
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 0.03), frameon=False, handletextpad=0.2)
    for text, colour in zip(legend.get_texts(), DAY.series, strict=False):
        text.set_color(colour)
        text.set_fontweight("bold")


def _difficulty_axis(axes: Any, steps: Tensor) -> None:
    """A logarithmic axis with round numbers, and a line at the typical difficulty."""
    axes.set_xscale("log")
    low, high = float(steps.min()), float(steps.max())
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if low * 0.8 <= tick <= high * 1.25]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("difficulty: RMSE to the original, in steps of 1/255")
    centre = float(steps.log().mean().exp())
    axes.axvline(centre, color=DAY.muted, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axes.text(centre * 1.04, 0.9, f"typical error {centre:.1f}", color=DAY.muted, fontsize=8.5)


def draw_share(axes: Any, *, weights: LossWeights) -> None:
    """Both weights of all samples, stacked and sorted from easy to hard: RL below, SFT above."""
    order = weights.sft.flatten().argsort(descending=True, stable=True)  # SFT falls with difficulty
    rl, sft = weights.rl.flatten()[order], weights.sft.flatten()[order]
    edges = torch.linspace(0, 1, len(order) + 1).tolist()
    axes.stairs((rl + sft).tolist(), edges, baseline=rl.tolist(), fill=True, color=DAY.sft, linewidth=0)
    axes.stairs(rl.tolist(), edges, fill=True, color=DAY.rl, linewidth=0)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 2)
    axes.set_xticks([0, 1], ["easy", "hard"])
    for tick, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
        tick.set_horizontalalignment(side)
    axes.set_yticks([0, 1, 2])
    axes.grid(axis="y")
