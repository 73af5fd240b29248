"""The figures of the image experiment."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.restoration import world
from benchmarks.restoration.analysis import FRONT, TERCILES, Table, difference, seeds_of, tabulate, terciles
from benchmarks.restoration.arms import MAIN
from benchmarks.restoration.tables import Row, present
from benchmarks.restoration.world import TASKS, Job
from examples.demo.style import INK, LINE, MUTED, RL, SERIES, SFT

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

BASELINE = "sft, all compute"
COLOURS = {"easy": SERIES[2], "middle": SFT, "hard": SERIES[1]}
PICTURED = ("frozen", BASELINE, "fixed 0.5", "rl", "adaptive", "reversed", "reward: judge")
WEIGHED = ("adaptive", "adaptive, convex", "reversed", "inverse error", "cosine", "target tracking")
STUDIED = {
    "own reward": "own\nreward",
    "held_out": "held-out\njudge",
    "judge": "judge",
    "haarpsi": "HaarPSI",
    "ssim": "SSIM",
    "gmsd": "GMSD",
    "piqe": "PIQE",
    "niqe": "NIQE",
    "psnr": "PSNR",
}


def draw(folder: Path, results: Sequence[Mapping[str, Any]], rows: Mapping[str, list[Row]], into: Path) -> None:
    """All figures, as PNG."""
    into.mkdir(parents=True, exist_ok=True)
    table = tabulate(results)
    made = {
        "front": front(table),
        "arms": arms(table),
        "weights": weights(results),
    }
    if rows["rewards"]:
        made["rewards"] = rewards(rows["rewards"], table)
    if (folder / "images").exists():
        made["pictures"] = pictures(folder, results)
    for name, figure in made.items():
        figure.savefig(into / f"restoration_{name}.png", dpi=110)
        plt.close(figure)


def front(table: Table) -> Any:
    """Left: quality on the hard tercile over error on the easy one; right: means over all inputs."""
    names = present(table, MAIN)
    seeds = seeds_of(table, names)
    figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), layout="constrained")
    for axis, aggregate in zip(axes, (False, True), strict=True):
        places = {}
        for arm in names:
            error, quality = (
                np.mean([table[seed, arm][measure].mean(0) for seed in seeds], 0) for measure in ("rmse", "held_out")
            )
            places[arm] = (error.mean(), quality.mean()) if aggregate else (error[0], quality[2])
        line = np.array([places[name] for name in FRONT])
        axis.plot(*line.T, "o-", color=MUTED, ms=5, lw=1.5, label="fixed shares of RL", zorder=1)
        for name, place in zip(FRONT, line, strict=True):
            axis.annotate(name.removeprefix("fixed "), place, (4, -10), textcoords="offset points", fontsize=8)
        for number, arm in enumerate(name for name in names if name not in FRONT):
            ours = arm == "adaptive"
            style = {"ms": 15, "color": RL, "zorder": 3} if ours else {"ms": 7, "color": f"C{number}", "zorder": 2}
            axis.plot(*places[arm], "*" if ours else "sD^vPX<>"[number % 8], ls="", label=arm, **style)
        where = ("easy", "hard") if not aggregate else ("all", "all")
        axis.set_xlabel(f"RMSE, {where[0]} inputs (lower is better)")
        axis.set_ylabel(f"held-out reward, {where[1]} inputs (higher is better)")
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("hard inputs better, easy ones as faithful?", fontsize=10)
    axes[1].set_title("all inputs", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right", frameon=False)
    return figure


def arms(table: Table) -> Any:
    """Every main arm less SFT with all of the compute, by tercile, with intervals."""
    names = [name for name in present(table, MAIN) if name != BASELINE][::-1]
    panels = {
        "held_out": "held-out reward",
        "haarpsi": "HaarPSI (the reward)",
        "rmse": "RMSE, % (left is better)",
    }
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 5), layout="constrained", sharey=True)
    for axis, (measure, title) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color=MUTED, lw=0.8)
        if measure == "rmse":
            axis.axvspan(-0.02, 1, color=LINE, zorder=0)
        for shift, tercile in zip((0.25, 0.0, -0.25), TERCILES, strict=True):
            found = [difference(table, arm, BASELINE, measure, tercile, relative=measure == "rmse") for arm in names]
            centre = np.array([part.value for part in found])
            # The mean of the middle half may lie outside of the interval of its resamples by rounding alone.
            reach = np.abs([[part.value - part.low, part.high - part.value] for part in found]).T
            places = np.arange(len(names)) + shift
            axis.errorbar(centre, places, xerr=reach, fmt="o", ms=4, color=COLOURS[tercile], label=f"{tercile} inputs")
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(names)), names)
    figure.suptitle(f"difference to `{BASELINE}`; 95 % intervals; grey: 1 % margin", fontsize=10)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    return figure


def weights(results: Sequence[Mapping[str, Any]]) -> Any:
    """RL weight and SFT weight over the updates, means over the inputs of an update and the seeds."""
    names = [name for name in WEIGHED if any(row["arm"] == name for row in results)]
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained", sharey=True)
    for axis, (key, title) in zip(axes, (("rl_share", "RL weight"), ("sft_share", "SFT weight")), strict=True):
        for number, arm in enumerate(names):
            lines = [[line[key] for line in row["history"]] for row in results if row["arm"] == arm]
            smooth = np.convolve(np.mean(lines, 0), np.full(5, 0.2), mode="valid")
            style = {"lw": 2.5, "color": RL} if arm == "adaptive" else {"lw": 1.2, "color": f"C{number % 10}"}
            axis.plot(np.arange(len(smooth)) + 3, smooth, label=arm, **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("update")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside right", frameon=False)
    return figure


def rewards(rows: Sequence[Row], table: Table) -> Any:
    """Change of every measure under every reward, in standard deviations between cells of the frozen model."""
    names = [row["arm"] for row in rows]
    spread = {}
    for name in STUDIED:
        if name != "own reward":
            spread[name] = np.std([table[key][name] for key in table if key[1] == "frozen"])
    figure, axis = plt.subplots(figsize=(9.5, 0.5 * len(rows) + 1.6), layout="constrained")
    values = np.array([[row[name].value / spread.get(name, np.nan) for name in STUDIED] for row in rows])
    axis.imshow(np.clip(values, -1.5, 1.5), cmap="RdBu", vmin=-1.5, vmax=1.5, aspect="auto", alpha=0.85)
    for line, row in enumerate(rows):
        for column, name in enumerate(STUDIED):
            found = row[name]
            sure = found.low > 0 or found.high < 0
            text = ("up" if found.value > 0 else "down") if name == "own reward" else f"{values[line, column]:+.2f}"
            weight, colour = ("bold", INK) if sure else ("normal", MUTED)
            colour = "white" if abs(values[line, column]) > 1 else colour
            axis.text(column, line, text, ha="center", va="center", fontsize=8, weight=weight, color=colour)
        axis.text(len(STUDIED) - 0.4, line, row["alarms"].split(" seeds")[0], va="center", fontsize=8)
    axis.set_xticks(range(len(STUDIED)), list(STUDIED.values()), fontsize=8)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(names)), [f"RL with {name}" for name in names], fontsize=9)
    axis.text(len(STUDIED) - 0.4, -0.95, "alarms, seeds", fontsize=8, va="center")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    note = "change from the frozen model in standard deviations; blue is better; bold: interval excludes 0"
    axis.set_xlabel(note, fontsize=8)
    return figure


def pictures(folder: Path, results: Sequence[Mapping[str, Any]]) -> Any:
    """Seed 0: an easy and a hard input of each task (the middle of its tercile), degraded, restored and true."""
    rows = [row for row in results if row["seed"] == 0 and row["arm"] in PICTURED]
    frozen = next(row for row in rows if row["arm"] == "frozen")
    scale = next(scale for scale in world.SCALES.values() if scale.test_inputs == len(frozen["test"]["rmse"]))
    kept = world.pairs(scale, world.TEST, 0)
    chosen, titles = [], []
    for number, task in enumerate(TASKS):
        groups = terciles(frozen["test"]["rmse"][number :: len(TASKS)])
        for name, group in (("easy", groups[0]), ("hard", groups[2])):
            chosen.append(number + len(TASKS) * int(group[len(group) // 2]))
            titles.append(f"{task}\n{name}")
    lines: dict[str, Tensor] = {"degraded": kept.degraded[chosen]}
    for arm in PICTURED:
        file = folder / "images" / f"{Job(scale, 0, arm, folder).name}.safetensors"
        if file.exists():
            lines[arm] = load_file(file)["images"][chosen].float() / 255
    lines["ground truth"] = kept.references[chosen]
    figure, axes = plt.subplots(len(lines), len(chosen), figsize=(7, 1.02 * len(lines) + 0.5), layout="constrained")
    for (name, images), row in zip(lines.items(), axes, strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_xticks([], [])
            axis.set_yticks([], [])
            axis.spines[:].set_visible(False)
        label = name.replace(", ", ",\n").replace(": ", ":\n")
        row[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    return figure
