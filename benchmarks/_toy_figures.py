"""The two figures of the toy experiment."""

from pathlib import Path

import matplotlib
import numpy as np
from _toy_report import PSNR, REWARD, RMSE
from torch import Tensor

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw_front(names: list[str], means: np.ndarray, num_fixed: int, path: Path) -> None:
    """Mean reward against PSNR of every arm, over the front of fixed shares."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    panels = ((0, PSNR, "mean PSNR over all samples (dB)", 0, REWARD), (1, RMSE, "RMSE, easy third", 3, REWARD))
    for axis, (part_x, metric_x, label, part_y, metric_y) in zip(axes, panels, strict=True):
        x, y = means[:, part_x, metric_x], means[:, part_y, metric_y]
        axis.plot(x[:num_fixed], y[:num_fixed], "o-", color="0.6", ms=4, label="fixed shares, 0 to 1")
        for arm in range(num_fixed, len(x)):
            bold = names[arm] == "adaptive"
            axis.plot(x[arm], y[arm], "*" if bold else "x", ms=12 if bold else 6, color="C3" if bold else "C0")
            axis.annotate(names[arm], (x[arm], y[arm]), fontsize=6, xytext=(4, 2), textcoords="offset points")
        axis.set_xlabel(label)
        axis.set_ylabel("mean reward, " + ("all samples" if part_y == 0 else "hard third"))
    axes[1].invert_xaxis()
    axes[0].legend(fontsize=7)
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
