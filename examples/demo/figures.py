"""The figures of the report."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from .experiment import DAMAGES, ERROR_FACTORS, Measured, samples, title
from .style import INK, LINE, MARKERS, RL, SERIES, SFT, STYLE
from .training import THIRDS, Trained

NUM_SAMPLES, NUM_SCENES = 10, 8
MEASURES = {
    "learned": ("learned reward", 1.0),
    "rmse": ("error in 1/255", 255.0),
    "ssim": ("SSIM", 1.0),
    "gmsd": ("GMSD", 1.0),
}  # title and factor


def save_figures(measured: Measured, trained: Trained, folder: Path) -> list[Path]:
    """Write the five figures as PNG files and return their paths."""
    figures: Mapping[str, Callable[[], Figure]] = {
        "curves.png": lambda: curves(measured),
        "samples.png": lambda: weighted_samples(measured),
        "weights.png": lambda: weights(measured),
        "restored.png": lambda: restored(trained),
        "training.png": lambda: training(trained),
    }
    for name, draw in figures.items():
        with matplotlib.rc_context(STYLE):
            figure = draw()
            figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
            figure.savefig(folder / name, dpi=160)
    return [folder / name for name in figures]


def new_figure(width: float, height: float, heading: str) -> Figure:
    """Make an empty figure that lays itself out, without pyplot, which would keep it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(heading, x=0.01, ha="left")
    return figure


def pixels(image: Tensor) -> np.ndarray:
    """Return a `[3, H, W]` image in [0, 1] as `[H, W, 3]` bytes."""
    return image.clamp(0, 1).mul(255).round().byte().movedim(0, -1).numpy()


def show(axes: Any, image: Tensor) -> None:
    """Draw an image without axes."""
    axes.imshow(pixels(image), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def curves(measured: Measured) -> Figure:
    """Draw the scores of each reward against the level of damage."""
    figure = new_figure(13, 6.4, "Score against damage: bold for the mean of the photographs, thin for each of them")
    grid = figure.subplots(2, (len(measured.scores) + 2) // 2).flatten()
    for axes, (name, scores) in zip(grid, measured.scores.items(), strict=False):
        first = 1 if name == "psnr" else 0  # PSNR of an image with itself is infinite, and a cap here
        levels = range(first, scores.shape[2])
        for d, (kind, colour, marker) in enumerate(zip(DAMAGES, SERIES, MARKERS)):
            axes.plot(levels, scores[:, d, first:].T, color=colour, linewidth=0.7, alpha=0.35)
            mean = scores[:, d, first:].mean(0)
            axes.plot(levels, mean, color=colour, linewidth=2, marker=marker, markersize=4.5, label=kind)
        axes.set(title=title(name), xticks=range(scores.shape[2]), xlabel="level of damage, 0 = original")
        axes.locator_params(axis="y", nbins=4)
        axes.grid(axis="y")
    for axes in grid[len(measured.scores) :]:
        axes.axis("off")
    grid[-1].legend(*grid[0].get_legend_handles_labels(), loc="center left", frameon=False, fontsize=12)
    return figure


def weighted_samples(measured: Measured) -> Figure:
    """Draw damaged images from easy to hard below their two weights."""
    chosen = samples(measured, NUM_SAMPLES)
    figure = new_figure(13, 3.9, "From easy to hard: weights of RL (violet) and SFT (amber)")
    bars, images = figure.subplots(2, len(chosen), height_ratios=(1.2, 1))
    for bar, axes, sample in zip(bars, images, chosen, strict=True):
        bar.bar([0, 0], [sample.rl, sample.sft], bottom=[0, sample.rl], width=1, color=[RL, SFT])
        bar.set(xlim=(-0.5, 0.5), ylim=(0, 2), title=f"{sample.rl:.2f} + {sample.sft:.2f}")
        bar.axis("off")
        show(axes, sample.detail)
        axes.set_xlabel(f"{sample.caption}\nerror {255 * sample.difficulty:.1f}", loc="left")
    return figure


def weights(measured: Measured) -> Figure:
    """Draw both weights against difficulty, and their means as all errors shrink."""
    figure = new_figure(13, 4, "The nearer a sample is to its reference, the more SFT")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    errors, (rl, sft) = 255 * measured.difficulty, measured.weights[1.0]
    order = errors.flatten().argsort(stable=True)
    for name, values, colour in (("RL", rl, RL), ("SFT", sft, SFT)):
        line = values.flatten()[order]
        left.plot(errors.flatten()[order], line, color=colour, linewidth=3, zorder=1)
        label_end(left, name, float(errors.max()), float(line[-1]))
    for d, (kind, colour, marker) in enumerate(zip(DAMAGES, SERIES, MARKERS)):
        left.scatter(errors[:, d], sft[:, d], color=colour, marker=marker, s=26, linewidths=0, label=kind, zorder=2)
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if errors.min() * 0.8 <= tick <= errors.max() * 1.25]
    left.set_xscale("log")
    left.set_xticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    left.set(xlabel="difficulty: RMSE to the original in steps of 1/255", ylabel="weight", ylim=(-0.03, 1.06))
    left.grid(axis="y")
    left.legend(loc="lower left", frameon=False)
    means = torch.tensor([[float(values.mean()) for values in measured.weights[factor]] for factor in ERROR_FACTORS])
    right.bar(range(len(means)), means[:, 0], color=RL)
    right.bar(range(len(means)), means[:, 1], bottom=means[:, 0], color=SFT)
    for place, (below, share) in enumerate(means.tolist()):
        right.annotate(f"{share:.2f}", (place, below + share), (0, 4), textcoords="offset points", ha="center")
    right.set_xticks(range(len(means)), [f"{factor:g}" for factor in ERROR_FACTORS])
    right.set(xlabel="all errors multiplied by", ylim=(0, 2.2), title="mean weights as a model improves")
    right.legend(handles=[Patch(color=SFT, label="SFT"), Patch(color=RL, label="RL")], frameon=False, loc="upper left")
    return figure


def restored(trained: Trained) -> Figure:
    """Draw held-out scenes from easy to hard: damaged, restored after SFT and after RL, and the reference."""
    order = trained.scores["rmse"][0].argsort(stable=True)
    rows = order[torch.linspace(0, len(order) - 1, min(NUM_SCENES, len(order))).long()].tolist()
    figure = new_figure(1.4 * len(rows) + 0.6, 6.2, "Held-out scenes from easy to hard")
    for (name, images), cells in zip(trained.images.items(), figure.subplots(4, len(rows)), strict=True):
        for axes, row in zip(cells, rows, strict=True):
            show(axes, images[row])
        cells[0].set_ylabel(name)
    return figure


def training(trained: Trained) -> Figure:
    """Draw each measure before and after RL by difficulty, and the course of the run."""
    figure = new_figure(13, 6.2, "Before (amber) and after (violet) RL by difficulty, and the run itself")
    top, bottom = figure.subfigures(2, 1)
    for axes, (measure, (heading, factor)) in zip(top.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for place, pair in enumerate(trained.thirds(measure).values()):
            ends, values = (place - 0.16, place + 0.16), [factor * value for value in pair]
            axes.plot(ends, values, color=LINE, linewidth=2, zorder=1)
            axes.scatter(ends, values, color=(SFT, RL), s=46, linewidths=0, zorder=2)
        axes.set_xticks(range(len(THIRDS)), THIRDS)
        axes.set(title=heading, xlim=(-0.5, len(THIRDS) - 0.5))
    looks = [record for record in trained.history if "validation/reward" in record]
    updates = trained.history[1:]
    left, middle, right = bottom.subplots(1, 3)
    plot_over_updates(left, looks, "validation/reward", RL, marker="o")
    for name, key, colour in (("RL", "rl_share", RL), ("SFT", "sft_share", SFT)):
        plot_over_updates(middle, updates, key, colour)
        label_end(middle, name, updates[-1]["update"], updates[-1][key])
    plot_over_updates(right, updates, "difficulty", INK, factor=255)
    left.set_title("learned reward on held-out scenes")
    middle.set(title="mean weights", ylim=(-0.03, 1.08))
    right.set_title("mean error of the training inputs in 1/255")
    for subfigure in (top, bottom):
        for axes in subfigure.axes:
            axes.locator_params(axis="y", nbins=4)
            axes.grid(axis="y")
    return figure


def plot_over_updates(
    axes: Any, records: list[dict[str, Any]], key: str, colour: str, *, factor: float = 1.0, **options: Any
) -> None:
    """Draw a value of the trainer's records."""
    values = [factor * record[key] for record in records]
    axes.plot([record["update"] for record in records], values, color=colour, linewidth=2.2, **options)
    axes.set_xlabel("update")


def label_end(axes: Any, text: str, x: float, y: float) -> None:
    """Write a name beside the end of its line."""
    axes.annotate(text, (x, y), (8, 0), textcoords="offset points", va="center", weight="bold", annotation_clip=False)
