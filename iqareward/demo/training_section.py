"""The part of the page about training; every sentence with a number is written from the run."""

# ruff: noqa: RUF001  typographic signs are meant

from functools import partial
from html import escape
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from iqareward.demo.embed import drawing, picture
from iqareward.demo.training import Training
from iqareward.demo.training_panels import draw_difficulty, draw_reward, draw_shares, draw_terciles
from iqareward.demo.wording import signed

NUM_SHOWN = 8
ENLARGED = 4  # pictures of 32 pixels are shown at 128
MEASURES = {
    "judge": ("judge, the reward", 2, 1.0, True),
    "rmse": ("error, in steps of 1/255", 1, 255.0, False),
    "ssim": ("SSIM, not in the reward", 3, 1.0, True),
    "gmsd": ("GMSD, not in the reward", 3, 1.0, True),
}


def section(training: Training, figures: dict[str, Any]) -> str:
    """The section as HTML.

    Args:
        training: gives pictures and curves.
        figures: of `training_summary`, gives every figure in the text.
    """
    panels = {
        "judge on held-out scenes": draw_reward,
        "mean weights": draw_shares,
        "difficulty of the inputs": draw_difficulty,
    }
    curves = "".join(
        f"<figure><h3>{title}</h3>{drawing(partial(draw, training=training), (3.7, 2.3), title)}</figure>"
        for title, draw in panels.items()
    )
    terciles = "".join(
        f"<figure><h3>{escape(title)}</h3>"
        + drawing(partial(draw_terciles, training=training, measure=name), (2.8, 2.1), title)
        + "</figure>"
        for name, (title, *_) in MEASURES.items()
    )
    return (
        f"<section><h2>Now a model is trained with it</h2><p>{_introduction(training, figures)}</p>"
        f'<div class="wide restored">{_pictures(training)}</div>'
        f'<p class="note" style="margin-top: 10px">From easy to hard. Top to bottom: damaged, restored after SFT, '
        f"restored after RL, ground truth.</p>"
        f"<ul>{_outcome(figures)}</ul>"
        f'<div class="wide panels">{terciles}</div><p class="note"><span class="sft">before</span> and '
        f'<span class="rl">after</span> RL; easy, middle and hard thirds of the held-out scenes.</p>'
        f'<div class="wide panels">{curves}</div><p style="margin-top: 26px">{_monitor(figures)}</p></section>'
    )


def shown_rows(training: Training) -> Tensor:
    """Some held-out scenes, evenly from easy to hard."""
    order = training.scores["rmse"][0].argsort(stable=True)
    return order[torch.linspace(0, len(order) - 1, min(NUM_SHOWN, len(order))).long()]


def _pictures(training: Training) -> str:
    columns = []
    for row in shown_rows(training).tolist():
        images = []
        for name in ("degraded", "before", "after", "references"):
            pixels = F.interpolate(getattr(training, name)[row : row + 1], scale_factor=ENLARGED)[0]
            images.append(picture(pixels, f"scene {row}, {name}"))
        columns.append(f"<figure>{''.join(images)}</figure>")
    return "".join(columns)


def _introduction(training: Training, figures: dict[str, Any]) -> str:
    settings = training.settings
    return (
        f"A small diffusion model learns to restore synthetic scenes of {settings.size}×{settings.size} pixels, first "
        f"by supervised fine-tuning ({settings.sft_updates} updates). A small judge learns to rank damage. Then "
        f"<code>DifficultyAdaptiveTrainer</code> goes on for {settings.rl_updates} updates with the judge as reward "
        f"(DiffusionNFT, {settings.group_size} restorations of each of {settings.inputs} scenes), each scene weighted "
        f"by how far it still is from its ground truth. Scenes that neither has seen: error "
        f"{255 * figures['degraded_rmse']:.1f} damaged, in steps of 1/255."
    )


def _outcome(figures: dict[str, Any]) -> str:
    parts = []
    for name, (title, decimals, factor, higher) in MEASURES.items():
        words = []
        for tercile, cells in figures["terciles"].items():
            old, new = (factor * cells[name][when] for when in ("before", "after"))
            words.append(f"{tercile} {signed(old, decimals)} → {signed(new, decimals)}")
        better = "higher is better" if higher else "lower is better"
        parts.append(f"<li><b>{escape(title)}</b> ({better}): {', '.join(words)}</li>")
    return "".join(parts)


def _monitor(figures: dict[str, Any]) -> str:
    if figures["alarms"]:
        listed = "; ".join(escape(alarm) for alarm in figures["alarms"])
        return f"The monitor, which watches what is not in the reward, alarmed: {listed}."
    strongest = max((name for name in figures["changes"] if name != "reward"), key=lambda n: abs(figures["changes"][n]))
    return (
        "The monitor, which watches what is not in the reward, did not alarm. What moved most on the held-out scenes: "
        f"{escape(strongest)}, by {signed(figures['changes'][strongest])} standard deviations; the reward by "
        f"{signed(figures['changes']['reward'])}."
    )
