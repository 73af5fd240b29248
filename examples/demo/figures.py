"""The figures of the report, and the picture of the README."""

import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .experiment import AFTER, BEFORE, Run
from .style import INK, LINE, MUTED, PAPER, RL, SERIES, SFT, STYLE

TITLES = {
    "haarpsi": "HaarPSI", "psnr": "PSNR", "ssim": "SSIM", "cvvdp": "ColorVideoVDP", "stlpips": "ST-LPIPS",
    "quick": "quick", "niqe": "NIQE", "rmse": "error in 1/255",
}  # fmt: skip
GAP, HEADING, MARGIN = 8, 34, 12  # pixels in the picture
PICTURE = (20, 6, 21)  # photographs, by their number less 1
COLUMNS = ("degraded", BEFORE, AFTER, "ground truth")


def spelled(reward: str) -> str:
    """A reward, or a sum of several, with the usual spelling of their names."""
    return re.sub(r"[a-z_]+", lambda found: TITLES.get(found[0], found[0]), reward)


def pixels(image: Tensor) -> Image.Image:
    """An image `[3, H, W]` in [0, 1] in bytes."""
    return Image.fromarray(image.clamp(0, 1).mul(255).round().byte().movedim(0, -1).numpy())


def picture(run: Run) -> Image.Image:
    """Some photographs in rows, not enlarged: degraded, restored, after RL, and the ground truth."""
    count, _, _, side = run.images["degraded"].shape
    rows = [row for row in PICTURE if row < count]
    width = 2 * MARGIN + len(COLUMNS) * (side + GAP) - GAP
    sheet = Image.new("RGB", (width, HEADING + len(rows) * (side + GAP) - GAP + MARGIN), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for column, version in enumerate(COLUMNS):
        left = MARGIN + column * (side + GAP)
        heading = "restored, after RL" if version == AFTER else version
        pen.text((left, HEADING / 2), heading, fill=INK, font=font, anchor="lm")
        for line, row in enumerate(rows):
            sheet.paste(pixels(run.images[version][row]), (left, HEADING + line * (side + GAP)))
    return sheet


def charts(results: Mapping[str, Any]) -> dict[str, bytes]:
    """Small figures as SVG, by what they show."""
    drawn = {
        "Weights of the photographs by difficulty": weights,
        "Reward over the run": reward,
        "Mean weights over the run": shares,
        "Mean difficulty of the training windows": difficulty,
        "What was not trained on": held_out,
    }
    return {title: _svg(draw, results) for title, draw in drawn.items()}


def _svg(draw: Callable[[Any, Mapping[str, Any]], None], results: Mapping[str, Any]) -> bytes:
    style: Any = STYLE
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")  # not of pyplot, which would keep it
        axes = figure.subplots()
        axes.grid(axis="y")
        draw(axes, results)
        axes.locator_params(nbins=5)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def weights(axes: Any, results: Mapping[str, Any]) -> None:
    """Both weights of every photograph against its error, before and after RL."""
    for version, fill in ((BEFORE, "none"), (AFTER, None)):
        errors = [255 * each["scores"][version]["rmse"] for each in results["photographs"]]
        for name, colour in (("rl", RL), ("sft", SFT)):
            values = [each["weights"][version][name] for each in results["photographs"]]
            label = f"{name.upper()} {'before' if version == BEFORE else 'after'} RL"
            axes.scatter(errors, values, s=26, facecolors=fill or colour, edgecolors=colour, label=label)
    axes.set(xlabel="error of the restoration in 1/255", ylabel="weight", ylim=(-0.05, 1.1))
    axes.legend(frameon=False, fontsize=8)


def reward(axes: Any, results: Mapping[str, Any]) -> None:
    """The reward in training and on the test photographs."""
    updates, looks = results["history"][1:], _looks(results)
    _line(axes, updates, "reward", MUTED, "training windows", linewidth=0.8)
    _line(axes, looks, "validation/reward", RL, "test photographs", marker="o")
    axes.set_ylabel(spelled(results["settings"]["reward"]))
    axes.legend(frameon=False, fontsize=8)


def shares(axes: Any, results: Mapping[str, Any]) -> None:
    """The mean weights of the updates."""
    for name, colour in (("rl", RL), ("sft", SFT)):
        _line(axes, results["history"][1:], f"{name}_share", colour, name.upper(), linewidth=1.2)
    axes.set_ylim(-0.05, 1.1)
    axes.legend(frameon=False, fontsize=8)


def difficulty(axes: Any, results: Mapping[str, Any]) -> None:
    """The mean error of the restored training windows."""
    records = [record | {"error": 255 * record["difficulty"]} for record in results["history"][1:]]
    _line(axes, records, "error", INK, "", linewidth=0.8)
    axes.set_ylabel("error in 1/255")


def held_out(axes: Any, results: Mapping[str, Any]) -> None:
    """The monitor's paired changes of the held-out rewards since before RL."""
    updates = [record["update"] for record in _looks(results)]
    for name, colour in zip(results["held_out"], (*SERIES, INK, SFT), strict=False):
        changes = [0.0, *(look[name] for look in results["monitor"])]
        axes.plot(updates, changes, color=colour, linewidth=2, marker="o", markersize=4, label=TITLES[name])
    axes.axhline(0, color=LINE, zorder=0)
    axes.set(xlabel="update", ylabel="change in standard deviations")
    axes.legend(frameon=False, fontsize=8, ncols=2)


def _looks(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [record for record in results["history"] if "validation/reward" in record]


def _line(
    axes: Any,
    records: list[dict[str, Any]],
    key: str,
    colour: str,
    label: str,
    *,
    linewidth: float = 2.2,
    **options: Any,
) -> None:
    values, updates = [record[key] for record in records], [record["update"] for record in records]
    axes.plot(updates, values, color=colour, label=label, linewidth=linewidth, **options)
    axes.set_xlabel("update")
