"""The report as one HTML file without outside resources."""

import base64
import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image
from torch import Tensor

from .experiment import DAMAGES, Measured, detail, title
from .figures import MEASURES, pixels
from .training import THIRDS, Trained

TEMPLATE = Path(__file__).with_name("report.html")


def render(measured: Measured, trained: Trained, results: dict[str, Any], figures: Sequence[Path]) -> str:
    """Fill the template, which shows each of the PNG files by its stem."""
    settings = trained.settings
    alarms = "; ".join(trained.alarms) or "it did not alarm"
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        {path.stem: f'<img src="{data_url("png", path.read_bytes())}" alt="{path.stem}">' for path in figures},
        num_rewards=len(measured.rewards),
        num_photographs=len(measured.photographs),
        num_damages=len(DAMAGES),
        num_levels=measured.difficulty.shape[2],
        damaged=results["damaged_images"],
        columns=measured.difficulty.shape[2] + 1,
        strips=strips(measured),
        correlations=correlations(measured, results["rewards"]),
        thirds=thirds(trained),
        training_settings=f"{settings.sft_updates} updates by SFT and {settings.rl_updates} by RL (DiffusionNFT), "
        f"{settings.num_scenes} scenes of {settings.size} x {settings.size} pixels",
        alarms=escape(alarms),
        made=escape(f"{results['seconds']:.0f} seconds; versions: {results['versions']}"),
        credits=escape("; ".join(photograph.credit for photograph in measured.photographs)),
    )


def strips(measured: Measured) -> str:
    """Return a strip of images with their scores for each photograph and damage; a radio button selects one."""
    parts = []
    for p, photograph in enumerate(measured.photographs):
        for d, (kind, damage) in enumerate(DAMAGES.items()):
            name = f"{photograph.name}, {kind}"
            figures = []
            for level, image in enumerate(measured.images[p][d]):
                rows = "".join(
                    score_row(title(reward), scores[p, d], level) for reward, scores in measured.scores.items()
                )
                caption = escape(damage.caption(level))
                figures.append(
                    f"<figure>{jpeg(detail(image, photograph.focus), f'{name} {caption}')}"
                    f"<figcaption><b>{caption}</b><dl>{rows}</dl></figcaption></figure>"
                )
            key, checked = f"strip{p}-{d}", "" if parts else " checked"
            parts.append(
                f'<input type="radio" name="strip" id="{key}"{checked}><label for="{key}">{escape(name)}</label>'
                f'<div class="strip">{"".join(figures)}</div>'
            )
    return "".join(parts)


def score_row(name: str, scores: Tensor, level: int) -> str:
    """Return a score with a mark if it rose although the damage grew."""
    mark = '<span class="up">▲</span> ' if level and scores[level] > scores[level - 1] else ""
    return f"<dt>{escape(name)}</dt><dd>{mark}{number(float(scores[level]))}</dd>"


def correlations(measured: Measured, rewards: dict[str, Any]) -> str:
    """Return the table of rank correlations, a row per reward."""
    lines = [row("th", ["", *DAMAGES, "above original"])]
    for reward in measured.rewards:
        found = rewards[reward.name]
        cells = [cell(item["mean"], item["worst"]) for item in found["correlation"].values()]
        share = found["above_original"]
        kind = "" if reward.needs_references else " <small>no reference</small>"
        heading = f'<th scope="row">{escape(title(reward.name))}{kind}</th>'
        lines.append(f'<tr data-reward="{escape(reward.name)}">{heading}{"".join(cells)}<td>{share:.0%}</td></tr>')
    return f"<table>{''.join(lines)}</table>"


def cell(mean: float | None, worst: float | None) -> str:
    """Return a correlation, tinted by its strength, above that of the worst photograph."""
    colour, strength = ("47 127 184" if (mean or 0) < 0 else "217 102 31"), (mean or 0) ** 4  # -0.97 and -0.85 differ
    tint = f"background: rgb({colour} / {0.42 * strength:.2f})"
    return f'<td style="{tint}">{number(mean, ".2f")}<small>{number(worst, ".2f")}</small></td>'


def thirds_rows(trained: Trained) -> list[list[str]]:
    """Return each third of the held-out scenes with every measure before and after RL, as text."""
    rows = [[third] for third in THIRDS]
    for measure, (_, factor) in MEASURES.items():
        for line, (old, new) in zip(rows, trained.thirds(measure).values(), strict=True):
            line.append(f"{number(factor * old)} → {number(factor * new)}")
    return rows


def thirds(trained: Trained) -> str:
    """Return these rows as a table."""
    heads = row("th", ["", *(heading for heading, _ in MEASURES.values())])
    return f'<table class="thirds">{heads}{"".join(row("td", line) for line in thirds_rows(trained))}</table>'


def row(tag: str, texts: Sequence[str]) -> str:
    """Return a table row."""
    return f"<tr>{''.join(f'<{tag}>{escape(text)}</{tag}>' for text in texts)}</tr>"


def number(value: float | None, digits: str = ".3g") -> str:
    """Write a number with a minus sign, or a dash where there is none."""
    return "\N{EN DASH}" if value is None else f"{value + 0.0:{digits}}".replace("-", "\N{MINUS SIGN}")


def jpeg(image: Tensor, alt: str) -> str:
    """Return an image `[3, H, W]` as an `<img>` at a quality whose own loss does not show."""
    stream = io.BytesIO()
    Image.fromarray(pixels(image)).save(stream, "JPEG", quality=92, subsampling=0)
    return f'<img src="{data_url("jpeg", stream.getvalue())}" alt="{escape(alt)}">'


def data_url(kind: str, content: bytes) -> str:
    """Return a file's content as a URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
