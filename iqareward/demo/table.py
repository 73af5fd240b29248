"""The rank correlations as a table of coloured cells."""

# ruff: noqa: RUF001  typographic signs are meant

from html import escape
from typing import Any

from iqareward.demo.wording import label, percent, signed

STRONGEST = 42
"""Per cent of its colour in the strongest cell, so that text on it stays readable."""


def correlation_table(summary: dict[str, Any], with_original: dict[str, bool]) -> str:
    """Rewards by degradations; every cell has the figure of `results.json` as `data-value`.

    Args:
        summary: of `summarise`.
        with_original: reward -> whether it compares with the original.
    """
    degradations = list(summary["settings"]["degradations"])
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in degradations)
    bodies = []
    for sees, title in ((True, "compare with the original"), (False, "see the picture alone")):
        rows = [_row(summary, reward, degradations) for reward, flag in with_original.items() if flag == sees]
        if rows:
            head = f'<tr><th class="group" scope="rowgroup" colspan="{len(degradations) + 2}">{title}</th></tr>'
            bodies.append(f"<tbody>{head}{''.join(rows)}</tbody>")
    return (
        f'<table><thead><tr><th scope="col"></th>{heads}<th scope="col">above own<br>original</th></tr></thead>'
        f"{''.join(bodies)}</table>"
    )


def _row(summary: dict[str, Any], reward: str, degradations: list[str]) -> str:
    correlations = summary["rank_correlation"][reward]["by_degradation"]
    share = summary["mistakes"][reward]["above_original_share"]
    cells = [_correlation_cell(correlations[name]) for name in degradations]
    cells.append(f'<td data-value="{share}" style="{_tint("bad", 3 * share)}">{percent(share)}</td>')
    return f'<tr data-reward="{escape(reward)}"><th scope="row">{escape(label(reward).title)}</th>{"".join(cells)}</tr>'


def _correlation_cell(cell: dict[str, Any]) -> str:
    mean, worst = cell["mean"], cell["worst"]
    if mean is None:
        return '<td data-value="">–</td>'
    below = ""
    if signed(worst) != signed(mean):
        below = f'<small>{signed(worst)} <span class="photo">{escape(cell["worst_photograph"])}</span></small>'
    # The fourth power, because between useful rewards the difference of -0.97 and -0.85 is what matters.
    style = _tint("good" if mean < 0 else "bad", mean**4)
    return f'<td data-value="{mean}" style="{style}">{signed(mean)}{below}</td>'


def _tint(tone: str, share: float) -> str:
    return f"--tone: var(--{tone}); --mix: {STRONGEST * min(1.0, share):.0f}%"
