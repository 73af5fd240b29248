"""The two figures of the toy experiment.

python -m benchmarks.toy.figures result.json figure.png   # the front again, from a saved result
"""

import json
import sys
from pathlib import Path

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKERS = "*XPsvD^<>hpd8"


def draw_front(rows: list[dict], path: Path) -> None:
    """Mean reward against PSNR of every arm over the front of fixed shares; on the right what lies near its bend."""
    fixed = [row for row in rows if row["arm"].startswith("fixed")]
    others = [row for row in rows if not row["arm"].startswith("fixed")]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for axis in axes:
        axis.plot([row["all psnr"] for row in fixed], [row["all reward"] for row in fixed], "o-", color="0.6", ms=4)
        axis.lines[0].set_label("fixed shares, 0 to 1")
        for place, row in enumerate(others):
            ours = row["arm"] == "adaptive"
            style = {"ms": 14, "color": "C3", "zorder": 3} if ours else {"ms": 6, "color": f"C{place % 10}"}
            axis.plot(row["all psnr"], row["all reward"], MARKERS[place % 13], ls="", label=row["arm"], **style)
        axis.set_xlabel("mean PSNR over all samples (dB)")
    bend = sorted(fixed, key=lambda row: row["all psnr"])[-6:]
    axes[1].set_xlim(min(row["all psnr"] for row in bend) - 0.1, max(row["all psnr"] for row in rows) + 0.05)
    axes[1].set_ylim(min(row["all reward"] for row in bend) - 0.01, max(row["all reward"] for row in rows) + 0.01)
    axes[0].set_ylabel("mean reward over all samples")
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_weights(panels: dict[str, Tensor], path: Path) -> None:
    """SFT weight over the steps for the three thirds of sigma; solid rho = 1, dashed rho = 0."""
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 3.2), layout="constrained", sharey=True)
    for axis, (title, weights) in zip(axes, panels.items(), strict=True):
        smooth = weights.unfold(0, min(20, len(weights)), 1).mean(-1).numpy()
        for arm, line in zip(range(smooth.shape[1]), ("-", "--"), strict=False):
            for third, (label, color) in enumerate((("easy", "C2"), ("mid", "C1"), ("hard", "C3"))):
                name = f"{label} third" + (", rho = 0" if arm else "")
                axis.plot(smooth[:, arm, third], line, color=color, label=name, lw=1.2)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("optimiser step")
    axes[0].set_ylabel("SFT weight, 1 - w")
    axes[-1].legend(fontsize=6)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw_front(json.loads(Path(sys.argv[1]).read_text())["rows"], Path(sys.argv[2]))
