"""The drawings of the training part: one statement per pair of axes."""

from typing import Any

from iqareward.demo.palette import DAY
from iqareward.demo.training import TERCILES, Training


def draw_shares(axes: Any, *, training: Training) -> None:
    """Mean weights of both losses over the RL updates."""
    lines = training.history[1:]
    updates = [line["update"] for line in lines]
    for name, key, colour in (("RL", "rl_share", DAY.rl), ("SFT", "sft_share", DAY.sft)):
        values = [line[key] for line in lines]
        axes.plot(updates, values, color=colour, linewidth=2.5)
        axes.annotate(name, (updates[-1], values[-1]), (6, 0), textcoords="offset points", va="center", weight="bold")
    _over_updates(axes, updates)
    axes.set_ylim(-0.03, 1.08)
    axes.set_yticks([0, 0.5, 1])


def draw_difficulty(axes: Any, *, training: Training) -> None:
    """Mean error of the training inputs over the RL updates, in steps of 1/255."""
    lines = training.history[1:]
    updates = [line["update"] for line in lines]
    axes.plot(updates, [255 * line["difficulty"] for line in lines], color=DAY.ink, linewidth=1.8)
    _over_updates(axes, updates)
    axes.locator_params(axis="y", nbins=4)


def draw_reward(axes: Any, *, training: Training) -> None:
    """The judge's score of the held-out scenes at every look."""
    looks = [line for line in training.history if "validation/reward" in line]
    updates = [line["update"] for line in looks]
    axes.plot(
        updates, [line["validation/reward"] for line in looks], color=DAY.rl, linewidth=2.5, marker="o", clip_on=False
    )
    _over_updates(axes, updates)
    axes.locator_params(axis="y", nbins=4)


def draw_terciles(axes: Any, *, training: Training, measure: str) -> None:
    """A measure before and after RL for easy, middle and hard inputs."""
    old, new = training.scores[measure]
    factor = 255 if measure == "rmse" else 1
    for place, rows in enumerate(training.terciles.values()):
        values = [factor * float(scores[rows].mean()) for scores in (old, new)]
        axes.plot([place - 0.16, place + 0.16], values, color=DAY.line, linewidth=2, zorder=1)
        for offset, value, colour in zip((-0.16, 0.16), values, (DAY.sft, DAY.rl), strict=True):
            axes.scatter([place + offset], [value], color=colour, s=46, linewidths=0, zorder=2)
    axes.set_xticks(range(len(TERCILES)), TERCILES)
    axes.set_xlim(-0.5, len(TERCILES) - 0.5)
    axes.locator_params(axis="y", nbins=4)
    axes.grid(axis="y")


def _over_updates(axes: Any, updates: list[int]) -> None:
    axes.set_xlim(updates[0], updates[-1] + 0.12 * max(1, updates[-1] - updates[0]))
    axes.set_xlabel("update")
    axes.grid(axis="y")
