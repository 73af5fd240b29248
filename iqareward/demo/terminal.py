"""The summary as a table for the terminal."""

# ruff: noqa: RUF001  typographic signs are meant

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from iqareward.demo.wording import label, percent, signed


def print_results(console: Console, summary: dict[str, Any], files: Mapping[Path, str]) -> None:
    """The correlations, the handover, and every file with what it holds."""
    listing = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    listing.add_column(overflow="fold")
    listing.add_column(style="dim")
    for path, content in files.items():
        listing.add_row(Text(str(path)), content)
    heading = Text("Does the score fall when the picture gets worse?", style="bold")
    explanation = Text(
        "Rank correlation of score and damage, mean over photographs (worst one); −1: it falls at every step.\n"
        "Mistakes: damaged pictures that score above their own original.",
        style="dim",
    )
    console.print(
        Group(
            Text(),
            heading,
            explanation,
            Text(),
            correlation_table(summary),
            Text(),
            handover_line(summary),
            Text(),
            listing,
        )
    )


def correlation_table(summary: dict[str, Any]) -> Table:
    """Rank correlation of score and damage by reward and degradation, and the share of mistakes; 80 columns wide."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("reward", no_wrap=True)
    for degradation in summary["settings"]["degradations"]:
        table.add_column(degradation, justify="right", no_wrap=True)
    table.add_column("mistakes", justify="right", no_wrap=True)
    for reward, row in summary["rank_correlation"].items():
        cells = [_cell(cell) for cell in row["by_degradation"].values()]
        share = percent(summary["mistakes"][reward]["above_original_share"])
        table.add_row(label(reward).title, *cells, share)
    return table


def _cell(cell: dict[str, Any]) -> Text:
    mean, worst = cell["mean"], cell["worst"]
    if mean is None:
        return Text("–", style="dim")
    style = "bold" if mean <= -0.95 else "" if mean <= -0.8 else "yellow"
    return Text.assemble((signed(mean), style), (f" ({signed(worst):>5})", "dim"))


def handover_line(summary: dict[str, Any]) -> Text:
    """The mean weights as errors shrink."""
    steps = ", ".join(
        f"×{row['errors']:g}: {signed(row['mean_rl'])} + {signed(row['mean_sft'])}" for row in summary["handover"]
    )
    return Text.assemble(("Mean weights RL + SFT as all errors shrink:\n", "dim"), steps)
