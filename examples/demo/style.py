"""Colours and style of the figures of the demo and the documentation."""

from typing import Any

PAPER, INK, MUTED, LINE, RL, SFT = "#fbfaf8", "#1c1b1a", "#66625d", "#e3dfd9", "#4a3fb0", "#e9a93c"
# Okabe and Ito, "Color Universal Design" (2008), darkened until text has a contrast of 4.5 with the paper.
SERIES, MARKERS = ("#0068a6", "#b84c00", "#007a58", "#a34d82"), ("o", "s", "^", "D")
STYLE: dict[str, Any] = {
    "figure.titlesize": 13,
    "figure.titleweight": "bold",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "font.size": 9,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
