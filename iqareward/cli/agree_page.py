"""Agreement with people as one HTML file or SVG picture: figures with intervals, and scores against human scores."""

import math
from collections.abc import Sequence
from string import Template

import iqareward
from iqareward.agreement import MEASURES, Agreement
from iqareward.cli.agree import TITLES, Findings, notes, tables
from iqareward.cli.compare_page import HEAD, STYLE, escaped

_ROW, _NAME, _PANEL, _GAP, _TOP, _BOTTOM = 22, 150, 200, 36, 26, 26  # pixels of the chart of figures
_LETTERS = 20  # of a name in the chart of figures
_SIDE, _MARGIN, _POINTS = 190, 12, 400  # of a chart of scores
_SVG_STYLE = """
svg { font: 12px system-ui, sans-serif; max-width: 100%; }
svg text { fill: var(--ink); }
svg .axis { fill: var(--muted); font-size: 11px; }
.grid { stroke: var(--line); }
.zero { stroke: var(--muted); stroke-dasharray: 3 3; }
.bar { stroke: var(--better); stroke-width: 2; }
.dot { fill: var(--better); }
.point { fill: var(--better); opacity: 0.55; }
"""
_PAGE_STYLE = """
svg[viewBox] { height: auto; }
table { margin-top: 20px; }
td.text, th.text { white-space: normal; min-width: 7.5em; }
.charts { display: flex; flex-wrap: wrap; gap: 20px 24px; }
"""
_COLOURS = STYLE[STYLE.index(":root") : STYLE.index("body {")]
_PAGE = (
    HEAD
    + """\
<body>
<h1>$title</h1>
<div>$chart</div>
$tables
<ul class="note">$notes</ul>
<p class="note">The dashed line is chance. Pearson's correlation is taken after a rising four-parameter logistic fit,
whose curve the intervals hold fixed. Pairs are two images of one input, which is all that a group advantage sees.
Differences are paired.</p>
<h2>Scores and people</h2>
<p class="note">Human scores upwards, scores (higher is better) to the right.</p>
<div class="charts">$scatters</div>
<footer><p>Made by <code>iqareward agree</code> $version.</p></footer>
</body>
</html>
"""
)


def render(found: Findings) -> str:
    """The page."""
    return Template(_PAGE).substitute(
        script_source="none",
        title=f"Agreement with people: {escaped(found.source)}",
        style=f"{STYLE}{_SVG_STYLE}{_PAGE_STYLE}figure {{ width: {_SIDE}px; }}",
        chart=chart(found.overall),
        tables="".join(map(_table, tables(found))),
        notes="".join(f"<li>{escaped(line)}</li>" for line in notes(found)),
        scatters="".join(_scatter(name, scores, found.human) for name, scores in found.scores.items()),
        version=iqareward.__version__,
    )


def picture(found: Findings) -> str:
    """The chart of figures as a picture of its own, which follows the light or dark scheme of its viewer."""
    drawn = chart(found.overall)
    start = drawn.index(">") + 1
    opened = drawn[: start - 1] + ' xmlns="http://www.w3.org/2000/svg">'
    style = f"{_COLOURS}{_SVG_STYLE}svg {{ background: var(--paper); }}"  # readable on a page of the other scheme too
    return f"{opened}<style>{style}</style>{drawn[start:]}\n"


def _table(lines: Sequence[Sequence[str]]) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        kinds = [' class="text"', *[""] * (len(row) - 1)]
        return "".join(f"<{tag}{kind}>{escaped(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    header, *rows = lines
    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<div><table><thead><tr>{cells('th', header)}</tr></thead><tbody>{body}</tbody></table></div>"


def chart(found: Agreement) -> str:
    """A row for each metric and a panel for each measure: figures as dots, intervals as bars."""
    measures = [
        name for name in MEASURES if any(not math.isnan(getattr(metric, name).value) for metric in found.metrics)
    ]
    width = _NAME + len(measures) * (_PANEL + _GAP)
    height = _TOP + _ROW * len(found.metrics) + _BOTTOM
    parts: list[str] = []
    for row, metric in enumerate(found.metrics):
        y = _TOP + _ROW * (row + 0.5)
        name = metric.name if len(metric.name) <= _LETTERS else metric.name[: _LETTERS - 1] + "…"
        parts.append(f'<text x="{_NAME - 12}" y="{y + 4}" text-anchor="end">{escaped(name)}</text>')
    for panel, measure in enumerate(measures):
        left = _NAME + panel * (_PANEL + _GAP)
        figures = [getattr(metric, measure) for metric in found.metrics]
        low = min([0.0, *(math.floor(5 * each.low) / 5 for each in figures if not math.isnan(each.low))])
        ticks = [low + 0.2 * step for step in range(round((1 - low) / 0.2) + 1)]

        def x(value: float, left: float = left, low: float = low) -> float:
            return left + (value - low) / (1 - low) * _PANEL

        parts.append(f'<text x="{left + _PANEL / 2}" y="14" text-anchor="middle">{TITLES[measure]}</text>')
        chance = 0.5 if measure == "pair_accuracy" else 0.0
        for tick in ticks:
            parts.append(_line("grid", x(tick), _TOP, x(tick), height - _BOTTOM))
            if round(tick / 0.2) % 2 == 0 or len(ticks) < 7:
                label = f"{tick:.1f}".replace("-0.0", "0.0")
                parts.append(
                    f'<text class="axis" x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{label}</text>'
                )
        parts.append(_line("zero", x(chance), _TOP, x(chance), height - _BOTTOM))
        for row, figure in enumerate(figures):
            if not math.isnan(figure.value):
                y = _TOP + _ROW * (row + 0.5)
                parts.append(_line("bar", x(figure.low), y, x(figure.high), y))
                parts.append(f'<circle class="dot" r="4" cx="{x(figure.value):.1f}" cy="{y}"/>')
    label = "Agreement of each metric with people, with intervals"
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg>"
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _scatter(name: str, scores: Sequence[float], human: Sequence[float]) -> str:
    """Human scores over the scores of a metric; of many images every n-th."""
    points = [(a, b) for a, b in zip(scores, human, strict=True) if math.isfinite(a) and math.isfinite(b)]
    points = points[:: max(1, math.ceil(len(points) / _POINTS))]
    if not points:
        return ""
    edges = [(min(values), max(values)) for values in zip(*points, strict=True)]

    def place(value: float, axis: int) -> float:
        low, high = edges[axis]
        return _MARGIN + (value - low) / ((high - low) or 1) * (_SIDE - 2 * _MARGIN)

    dots = "".join(
        f'<circle class="point" r="3" cx="{place(a, 0):.1f}" cy="{_SIDE - place(b, 1):.1f}"/>' for a, b in points
    )
    frame = _line("grid", _MARGIN, _SIDE - 4, _SIDE - _MARGIN, _SIDE - 4) + _line(
        "grid", 4, _MARGIN, 4, _SIDE - _MARGIN
    )
    return (
        f'<figure><figcaption>{escaped(name)}</figcaption><svg width="{_SIDE}" height="{_SIDE}" role="img" '
        f'aria-label="{escaped(name)} against human scores">{frame}{dots}</svg></figure>'
    )
