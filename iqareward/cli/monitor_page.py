"""Samples of a training run as one HTML file: every measure over the steps, and the images an alarm is about."""

from collections.abc import Sequence
from pathlib import Path
from string import Template

import iqareward
from iqareward.cli.compare import summary
from iqareward.cli.compare_page import CROP, HEAD, STYLE, escaped, picture, read_pixels
from iqareward.cli.monitor import HELD_OUT, REWARD, STATISTIC, Findings, most_changed, no_alarm, table

_WIDTH, _HEIGHT = 340, 170  # of a chart
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 12, 24
_SHOWN = 4  # images
_STYLE = (
    STYLE
    + """
.charts { display: flex; flex-wrap: wrap; gap: 20px 24px; }
svg { display: block; max-width: 100%; }
svg text { fill: var(--muted); font-size: 11px; }
.grid { stroke: var(--line); }
.line { fill: none; stroke: var(--ink); stroke-width: 1.5; }
.dot { fill: var(--ink); }
.truth { stroke: var(--better); stroke-width: 1.5; stroke-dasharray: 5 4; }
.alarm { fill: var(--worse); }
.span { fill: var(--worse); opacity: 0.12; }
figcaption b { color: var(--ink); }
.row { display: flex; flex-wrap: wrap; gap: 12px 16px; margin: 14px 0; }
tr.bad td { color: var(--worse); }
"""
)
_PAGE = (
    HEAD
    + """\
<body>
<h1>$title</h1>
$alarms
<div><table><thead><tr>$head</tr></thead><tbody>$rows</tbody></table></div>
<p class="note">Means over $count images that all steps have. Changes are paired with step $first, in standard
deviations over its images. The last column is the step since which there is an alarm: a held-out reward alarms when it
falls, a statistic when it moves away from the ground truth, or from step $first where there is none. If there is a
trained reward, both count only at steps where it has risen.</p>
$left_out
<h2>Over the steps</h2>
<p class="note">Points are means over the images, orange ones with an alarm. The shade begins where the change that led
to the first alarm began. The dashed line is the ground truth.</p>
<div class="charts">$charts</div>
<h2>Images</h2>
<p class="note">$chosen</p>
$images
<footer><p>Made by <code>iqareward monitor</code> $version.</p></footer>
</body>
</html>
"""
)


def render(findings: Findings, folder: Path) -> str:
    """The page about the samples in `folder`."""
    header, *rows = table(findings)
    kind = {0: ' class="text"', 1: ' class="text"'}
    cells = [
        f"<tr{' class=bad' if row[-1] else ''}>"
        + "".join(f"<td{kind.get(place, '')}>{escaped(cell)}</td>" for place, cell in enumerate(row))
        + "</tr>"
        for row in rows
    ]
    told = "".join(f"<li>since step {alarm.since}: {escaped(alarm.sentence)}</li>" for alarm in findings.alarms)
    lines = "".join(f"<li>{escaped(line)}</li>" for line in summary(findings.problems))
    left_out = f'<details class="note"><summary>Files that were left out</summary><ul>{lines}</ul></details>'
    chosen = "The first images." if not findings.alarms else f"Those that changed most in {findings.alarms[0].measure}."
    return Template(_PAGE).substitute(
        script_source="none",
        title=f"Samples of {escaped(folder.resolve().name)}",
        style=_STYLE,
        alarms=f'<ul class="worse">{told}</ul>' if told else f"<p>{no_alarm(findings).capitalize()}.</p>",
        head="".join(f"<th{kind.get(place, '')}>{escaped(name)}</th>" for place, name in enumerate(header)),
        rows="".join(cells),
        count=len(findings.images),
        first=next(iter(findings.steps)),
        left_out=left_out if lines else "",
        charts="".join(
            _chart(findings, name) for kind in (REWARD, HELD_OUT, STATISTIC) for name in _of(findings, kind)
        ),
        chosen=escaped(chosen),
        images="".join(_images(findings, place) for place in most_changed(findings, _SHOWN)),
        version=iqareward.__version__,
    )


def _of(findings: Findings, kind: str) -> list[str]:
    return [name for name, each in findings.kinds.items() if each == kind]


def _chart(findings: Findings, name: str) -> str:
    """One measure over the steps as SVG."""
    steps = list(findings.steps)
    known = [
        (step, report.means[name], name in report.alarmed)
        for step, report in zip(steps, findings.reports, strict=True)
        if report.means[name] == report.means[name]
    ]
    truth = findings.truth.get(name)
    values = [value for _, value, _ in known] + ([] if truth is None or truth != truth else [truth])
    if not known:
        return ""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or max(abs(high), 1e-3) * 0.05
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return _LEFT + (step - steps[0]) / (steps[-1] - steps[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts: list[str] = []
    for value in (low + margin, (low + high) / 2, high - margin):
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text x="{_LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for step, anchor in ((steps[0], "start"), (steps[-1], "end")):
        parts.append(f'<text x="{x(step):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">{step}</text>')
    since = next((alarm.since for alarm in findings.alarms if alarm.measure == name), None)
    if since is not None:
        left, height = x(since), _HEIGHT - _TOP - _BOTTOM
        parts.append(
            f'<rect class="span" x="{left:.1f}" y="{_TOP}" width="{_WIDTH - _RIGHT - left:.1f}" height="{height}"/>'
        )
    if truth is not None and truth == truth:
        parts.append(
            f'<line class="truth" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(truth):.1f}" y2="{y(truth):.1f}"/>'
        )
    points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value, _ in known)
    parts.append(f'<polyline class="line" points="{points}"/>')
    for step, value, alarmed in known:
        shape = 'class="alarm" r="4"' if alarmed else 'class="dot" r="2"'
        parts.append(f'<circle {shape} cx="{x(step):.1f}" cy="{y(value):.1f}"/>')
    drawn = f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="{escaped(name)}">{"".join(parts)}</svg>'
    label = f"since step {since}" if since is not None else findings.kinds[name]
    return f"<figure><figcaption><b>{escaped(name)}</b><span>{label}</span></figcaption>{drawn}</figure>"


def _images(findings: Findings, place: int) -> str:
    """An image at the baseline, where the first alarm began, and at the last step, and its reference."""
    steps, (path, files) = list(findings.steps), list(findings.images.items())[place]
    wanted = dict.fromkeys([steps[0], *(alarm.since for alarm in findings.alarms[:1]), steps[-1]])
    shown = [(f"step {step}", files[steps.index(step)]) for step in wanted]
    if (reference := findings.references[place]) is not None:
        shown.append(("ground truth", reference))
    figures = "".join(_figure(name, file) for name, file in shown)
    return f'<article><h3>{escaped(path)}</h3><div class="row">{figures}</div></article>'


def _figure(name: str, file: Path) -> str:
    try:
        pixels = read_pixels(file)
    except (OSError, ValueError) as error:
        return f"<figure><figcaption>{escaped(name)}: {escaped(error)}</figcaption></figure>"
    starts: Sequence[int] = [max(0, (side - CROP) // 2) for side in pixels.shape[:2]]
    crop = pixels[starts[0] : starts[0] + CROP, starts[1] : starts[1] + CROP]
    return f"<figure>{picture(crop.copy(), name)}<figcaption>{escaped(name)}</figcaption></figure>"
