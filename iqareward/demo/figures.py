"""Panels as files: whole figures as PNG for slides, single panels as SVG for the page."""

# ruff: noqa: RUF001  typographic signs are meant

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iqareward.atomic import atomic_write
from iqareward.demo.degradations import to_pil
from iqareward.demo.experiment import NUM_SAMPLES, Experiment, samples
from iqareward.demo.palette import DAY
from iqareward.demo.panels import draw_curves, draw_share, draw_weights
from iqareward.demo.photographs import DETAIL_SIDE, detail
from iqareward.demo.wording import label
from iqareward.optional import require

DPI = 200


def save_figures(experiment: Experiment, folder: Path) -> tuple[Path, ...]:
    """Write `curves.png`, `samples.png`, `weights.png` and `handover.png` into `folder`, and return their paths."""
    figures = {"curves.png": _curves, "samples.png": _samples, "weights.png": _weights, "handover.png": _handover}
    return tuple(save_figure(lambda build=build: build(experiment), folder / name) for name, build in figures.items())


def save_figure(build: Callable[[], Any], path: Path) -> Path:
    """Write the figure that `build` makes as a PNG, and return its path."""
    with style():
        figure = build()
        figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15, wspace=0.02, hspace=0.04)
        with atomic_write(path) as file:
            figure.savefig(file, format="png", dpi=DPI, metadata={"Software": "iqareward demo"})
    return path


def panel_svg(draw: Callable[[Any], None], size: tuple[float, float]) -> str:
    """One panel as an SVG document with a transparent ground, in the colours of the day.

    Args:
        draw: `draw(axes)`.
        size: width and height in inches; a browser shows 96 pixels per inch.
    """
    stream = io.StringIO()
    with style():
        figure = new_figure(size)
        draw(figure.add_subplot())
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return stream.getvalue()


def style() -> Any:
    """Context in which matplotlib draws with quiet axes and our colours."""
    matplotlib: Any = require("matplotlib", extra="demo", purpose="iqareward demo")
    return matplotlib.rc_context(
        {
            "figure.titlesize": 13,
            "figure.titleweight": "bold",
            "figure.facecolor": DAY.paper,
            "savefig.facecolor": DAY.paper,
            "axes.facecolor": "none",
            "axes.edgecolor": DAY.line,
            "axes.labelcolor": DAY.muted,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.spines.left": False,
            "axes.titlecolor": DAY.ink,
            "axes.titlelocation": "left",
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.labelsize": 9,
            "axes.axisbelow": True,
            "font.sans-serif": ["Helvetica Neue", "Helvetica", "Arial", "Liberation Sans", "DejaVu Sans"],
            "font.size": 9,
            "grid.color": DAY.line,
            "grid.linewidth": 0.7,
            "svg.hashsalt": "iqareward",
            "text.color": DAY.ink,
            "xtick.color": DAY.muted,
            "ytick.color": DAY.muted,
            "xtick.major.size": 0,
            "ytick.major.size": 0,
        }
    )


def new_figure(size: tuple[float, float]) -> Any:
    """An empty figure that lays itself out; made without pyplot, which would keep it and choose a window system."""
    figures: Any = require("matplotlib.figure", extra="demo", purpose="iqareward demo")
    return figures.Figure(figsize=size, layout="constrained")


def _curves(experiment: Experiment) -> Any:
    figure = new_figure((13, 6.4))
    figure.suptitle(
        "Score against damage: bold for the mean over photographs, thin for each photograph", x=0.01, ha="left"
    )
    grid = figure.subplots(2, (len(experiment.scores) + 1) // 2, squeeze=False).flatten()
    for axes, reward in zip(grid, experiment.scores, strict=False):
        draw_curves(axes, experiment=experiment, reward=reward)
        axes.set_title(label(reward).title)
        axes.set_xlabel("level of damage, 0 = original")
    for axes in grid[len(experiment.scores) :]:
        axes.set_visible(False)
    return figure


def _samples(experiment: Experiment) -> Any:
    chosen = samples(experiment, NUM_SAMPLES)
    figure = new_figure((13, 3.9))
    figure.suptitle(
        "From easy to hard: weights of reinforcement learning (violet) and fine-tuning (amber)", x=0.01, ha="left"
    )
    bars, pictures = figure.subplots(2, len(chosen), squeeze=False, height_ratios=(1.2, 1))
    for bar, axes, sample in zip(bars, pictures, chosen, strict=True):
        bar.bar([0, 0], [sample.rl, sample.sft], bottom=[0, sample.rl], width=1, color=[DAY.rl, DAY.sft])
        bar.set(xlim=(-0.5, 0.5), ylim=(0, 2))
        bar.axis("off")
        bar.set_title(f"{sample.rl:.2f} + {sample.sft:.2f}")
        axes.imshow(to_pil(detail(sample.picture, sample.focus, DETAIL_SIDE)))
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(False)
        axes.set_xlabel(f"{sample.title}\nerror {255 * sample.difficulty:.1f}", loc="left")
    return figure


def _weights(experiment: Experiment) -> Any:
    figure = new_figure((8, 4.6))
    axes = figure.add_subplot()
    draw_weights(axes, experiment=experiment)
    axes.set_title("The nearer a sample is to its ground truth, the more SFT")
    return figure


def _handover(experiment: Experiment) -> Any:
    figure = new_figure((11, 3.2))
    figure.suptitle(
        "As errors shrink, SFT (amber, stacked on RL in violet) weighs more; numbers are means", x=0.01, ha="left"
    )
    for axes, (factor, weights) in zip(
        figure.subplots(1, len(experiment.handover)), experiment.handover.items(), strict=True
    ):
        draw_share(axes, weights=weights)
        axes.set_title(f"errors × {factor:g}: SFT {float(weights.sft.mean()):.2f}")
    return figure
