"""The report as one HTML file without outside resources."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from torch import Tensor

from .experiment import AFTER, BEFORE, RESTORED, VERSIONS, Run
from .figures import TITLES, charts, pixels, spelled

TEMPLATE = Path(__file__).with_name("report.html")
SHOWN = 12  # photographs
UNDER = ("haarpsi", "stlpips", "quick")  # scores under each image, where they are known


def render(run: Run) -> str:
    """Fill the template; every number comes from `run.results`."""
    results, settings = run.results, run.results["settings"]
    modes, measures = ["side by side", *VERSIONS], [*results["rewards"], "rmse"]
    severities = sorted({each["severity"] for each in results["photographs"]})
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        modes="".join(
            f'<input type="radio" name="mode" id="m{place}"{"" if place else " checked"}>'
            for place in range(len(modes))
        ),
        labels="".join(f'<label for="m{place}">{mode}</label>' for place, mode in enumerate(modes)),
        photographs="".join(photograph(run, row) for row in shown(results)),
        count=len(results["photographs"]),
        num_shown=len(shown(results)),
        steps=results["steps"],
        weights=f"{results['weights'] / 1e6:.1f}",
        severities=" and ".join(f"{each:g}" for each in severities),
        summary=escape(summary(results)),
        means=table(results["means"], measures),
        thirds="".join(
            f"<div><h3>{third} third</h3>{table({key: found[key] for key in RESTORED}, measures)}</div>"
            for third, found in results["thirds"].items()
        ),
        charts="".join(
            f'<figure><figcaption>{escape(title)}</figcaption><img src="{url("svg+xml", drawn)}" alt="{escape(title)}">'
            "</figure>"
            for title, drawn in charts(results).items()
        ),
        alarms=escape("; ".join(results["alarms"]) or "it raised no alarm"),
        held_out=", ".join(TITLES[name] for name in results["held_out"]),
        missing=escape("".join(f"{TITLES[name]} is missing: {why} " for name, why in results["missing"].items())),
        reward=escape(spelled(settings["reward"])),
        updates=settings["updates"],
        inputs=settings["inputs"],
        side=settings["window_side"],
        made=escape(f"{results['seconds']:.0f} seconds; versions: {results['versions']}"),
    )


def shown(results: Mapping[str, Any]) -> list[int]:
    """Every second photograph from the easiest to the hardest, in the order of their numbers."""
    order = results["by_difficulty"]
    return sorted(order[:: max(1, len(order) // SHOWN)])


def summary(results: Mapping[str, Any]) -> str:
    """What RL changed, in words: the reward, and which of the other measures got better or worse."""
    before, after = (results["means"][version] for version in (BEFORE, AFTER))
    parts: dict[str, list[str]] = {"The reward": [], "Not trained on and better": [], "Not trained on and worse": []}
    for name in (*results["rewards"], "rmse"):
        gain = (after[name] - before[name]) * (-1 if name == "rmse" else 1)
        watched = name in (*results["held_out"], "rmse")
        part = f"Not trained on and {'better' if gain > 0 else 'worse'}" if watched else "The reward"
        old, new = (number(scale(name) * found[name]) for found in (before, after))
        parts[part].append(f"{TITLES[name]} {old} → {new}")
    return " ".join(f"{part}: {', '.join(changes)}." for part, changes in parts.items() if changes)


def photograph(run: Run, row: int) -> str:
    """A photograph in all versions, with its weights and scores."""
    each = run.results["photographs"][row]
    weights, measures = each["weights"][BEFORE], [name for name in UNDER if name in run.results["rewards"]]
    error = number(255 * each["scores"][BEFORE]["rmse"])
    figures = []
    for place, version in enumerate(VERSIONS, 1):
        scores = " · ".join(f"{TITLES[name]} {number(each['scores'][version][name])}" for name in measures)
        label = f"{each['name']}, {version}"
        figures.append(
            f'<figure class="v{place}"><img src="{url("jpeg", jpeg(run.images[version][row]))}" alt="{escape(label)}">'
            f"<figcaption><b>{version}</b> {scores}</figcaption></figure>"
        )
    return (
        f'<section class="photograph"><h3>{each["name"]}: {each["task"]}, severity {each["severity"]:g}</h3>'
        f'<p class="note">Error of the restoration {error} of 255. Weights: '
        f'<span class="rl">RL {weights["rl"]:.2f}</span>, <span class="sft">SFT {weights["sft"]:.2f}</span></p>'
        f'<div class="versions" tabindex="0">{"".join(figures)}</div></section>'
    )


def table(means: Mapping[str, Mapping[str, Any]], measures: Sequence[str]) -> str:
    """Means of every measure, a row each, with a column per version; the best but for the ground truth is bold."""
    lines = [f"<tr><th></th>{''.join(f'<th>{version}</th>' for version in means)}</tr>"]
    for name in measures:
        found = {version: each[name] for version, each in means.items()}
        compared = [value for version, value in found.items() if version != "ground truth"]
        best = min(compared) if name == "rmse" else max(compared)
        cells = [f"<td{' class=best' * (value == best)}>{number(scale(name) * value)}</td>" for value in found.values()]
        lines.append(f'<tr data-measure="{name}"><th scope="row">{TITLES[name]}</th>{"".join(cells)}</tr>')
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def scale(measure: str) -> float:
    """The factor with which a measure is shown."""
    return 255.0 if measure == "rmse" else 1.0


def number(value: float) -> str:
    """At most three digits after the point, with a minus sign."""
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1.5 else 3
    return f"{value + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def jpeg(image: Tensor) -> bytes:
    """An image `[3, H, W]` at a quality whose own loss does not show."""
    file = io.BytesIO()
    pixels(image).save(file, "JPEG", quality=92, subsampling=0)
    return file.getvalue()


def url(kind: str, content: bytes) -> str:
    """A file's content as a URL."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
