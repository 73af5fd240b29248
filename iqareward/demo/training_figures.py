"""The training part as PNG files, for slides."""

from pathlib import Path
from typing import Any

from iqareward.demo.degradations import to_pil
from iqareward.demo.figures import new_figure, save_figure
from iqareward.demo.training import Training
from iqareward.demo.training_panels import draw_difficulty, draw_reward, draw_shares, draw_terciles
from iqareward.demo.training_section import MEASURES, shown_rows


def save_training_figures(training: Training, folder: Path) -> tuple[Path, ...]:
    """Write `restored.png` and `training.png` into `folder`, and return their paths."""
    return (
        save_figure(lambda: _restored(training), folder / "restored.png"),
        save_figure(lambda: _training(training), folder / "training.png"),
    )


def _restored(training: Training) -> Any:
    rows = shown_rows(training).tolist()
    lines = {"damaged": "degraded", "after SFT": "before", "after RL": "after", "truth": "references"}
    figure = new_figure((1.4 * len(rows) + 0.6, 6.2))
    figure.suptitle("Held-out scenes from easy to hard", x=0.01, ha="left")
    for (title, name), cells in zip(lines.items(), figure.subplots(4, len(rows), squeeze=False), strict=True):
        for axes, row in zip(cells, rows, strict=True):
            axes.imshow(to_pil(getattr(training, name)[row]), interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
        cells[0].set_ylabel(title)
    return figure


def _training(training: Training) -> Any:
    figure = new_figure((13, 6.2))
    figure.suptitle("Before (amber) and after (violet) RL by difficulty, and the run itself", x=0.01, ha="left")
    top, bottom = figure.subfigures(2, 1)
    for axes, (name, (title, *_)) in zip(top.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        draw_terciles(axes, training=training, measure=name)
        axes.set_title(title)
    panels = {"judge, held-out scenes": draw_reward, "mean weights": draw_shares, "difficulty": draw_difficulty}
    for axes, (title, draw) in zip(bottom.subplots(1, len(panels)), panels.items(), strict=True):
        draw(axes, training=training)
        axes.set_title(title)
    return figure
