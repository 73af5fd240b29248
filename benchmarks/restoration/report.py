"""Tables and figures of the experiment on photographs, each from a results file alone."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from benchmarks._tables import table
from benchmarks.restoration.analysis import Interval, Study, above_front, difference
from benchmarks.restoration.arms import (
    EARLY,
    FRONT,
    MAIN,
    PICTURED,
    REWARD_ARMS,
    REWARDS,
    SAMPLED_REWARDS,
    SFT,
    STUDIES,
    UNTRAINED,
    VARIANTS,
    Job,
    jobs,
)
from benchmarks.restoration.world import SHOWN, unstrip
from examples.demo.style import MUTED, RL, SERIES, STYLE
from examples.demo.style import SFT as SFT_COLOUR
from examples.small_restorer.tasks import TASKS

Document = Mapping[str, Any]
MARGIN = 1.0  # percent of RMSE on the easy tercile
HARD, ALL = ("hard", "easy"), ("all", "all")  # where quality and error are measured
HEADS = {
    "haarpsi": "HaarPSI",
    "stlpips": "ST-LPIPS",
    "cvvdp": "cvvdp",
    "psnr": "PSNR",
    "rmse": "RMSE",
    "ssim": "SSIM",
    "quick": "quick",
    "niqe": "NIQE",
}
COLOURS = {"easy": SERIES[2], "middle": SFT_COLOUR, "hard": SERIES[1]}
DIGITS = {"psnr": 2, "cvvdp": 2, "niqe": 2}


def study(document: Document, start: str, reward: str = "haarpsi") -> Study:
    """The runs of a start."""
    return Study(document["rows"], start, reward)


def ordered(found: Study) -> list[str]:
    """The arms that have runs: what is not trained, the front, and the rest."""
    names = dict.fromkeys([*UNTRAINED, SFT, *FRONT, *MAIN, *EARLY])
    return [name for name in names if found.runs.get(name)]


def cell(found: Interval, digits: int = 4) -> str:
    """`+0.012 [+0.010, +0.014]`, bold if the interval excludes 0."""
    text = f"{found.value:+.{digits}f} [{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"**{text}**" if found.sign else text


def absolute(document: Document, start: str) -> str:
    """Means of all arms over all test inputs."""
    found = study(document, start)
    names = ("haarpsi", "stlpips", "cvvdp", "psnr", "ssim", "quick", "niqe")
    lines = [
        [arm, "" if arm in UNTRAINED else str(len(found.runs[arm]))]
        + [f"{found.mean(arm, name):.{DIGITS.get(name, 4)}f}" for name in names]
        for arm in ordered(found)
    ]
    return table(["arm", "seeds", *(HEADS[name] for name in names)], lines)


def weightings(document: Document, start: str) -> str:
    """Every arm less SFT with all of the compute: the primary outcome and what goes with it."""
    found, lines = study(document, start), []
    for arm in ordered(found):
        if arm in (SFT, "degraded") or not found.seeds(arm, SFT):
            continue
        met = []
        for trimmed in (True, False):
            hard = difference(found, arm, SFT, "stlpips", "hard", trimmed=trimmed)
            easy = difference(found, arm, SFT, "rmse", "easy", relative=True, trimmed=trimmed)
            met.append("**yes**" if hard.sign > 0 and easy.high <= MARGIN else "no")
        lines.append([
            arm, cell(difference(found, arm, SFT, "stlpips", "hard")),
            cell(difference(found, arm, SFT, "rmse", "easy", relative=True), 2), *met[::-1],
            cell(difference(found, arm, SFT, "haarpsi", "hard")),
            cell(difference(found, arm, SFT, "rmse", "hard", relative=True), 2),
            cell(difference(found, arm, SFT, "psnr"), 2),
        ])  # fmt: skip
    head = ["arm", "ST-LPIPS, hard", "RMSE easy, %", "primary outcome", "as registered", "HaarPSI, hard"]
    return table([*head, "RMSE hard, %", "PSNR, all"], lines)


def variants(document: Document) -> str:
    """Variants of arms, less the start with the same sampler."""
    found, lines = study(document, "converged"), []
    for arm, variant in VARIANTS.items():
        if arm not in UNTRAINED and found.runs.get(arm):
            baseline = "one step" if variant.steps == 1 else "frozen"
            lines.append([arm, str(len(found.runs[arm])), *differences(found, arm, baseline)])
    return table(["arm", "seeds", *DIFFERENCES], lines)


def tasks(document: Document, start: str) -> str:
    """Some arms less the start as it was, task by task, over all inputs of a task."""
    found, lines = study(document, start), []
    for arm in (name for name in ("one step", "fixed 0.5", "fixed 0.75", "adaptive", "rl") if found.runs.get(name)):
        for measure, digits in (("haarpsi", 3), ("stlpips", 3), ("rmse", 1)):
            relative = measure == "rmse"
            cells = [
                cell(difference(found, arm, "frozen", measure, relative=relative, task=task), digits) for task in TASKS
            ]
            lines.append([arm, HEADS[measure] + ", %" * relative, *cells])
    return table(["arm", "measure", *TASKS], lines, text_columns=2)


def distances(document: Document, start: str) -> str:
    """Every weighting that is no constant against the front of constants."""
    found, lines = study(document, start), []
    for arm in ordered(found):
        if arm in (*UNTRAINED, *FRONT, SFT):
            continue
        hard, whole = (above_front(found, arm, "stlpips", where=where) for where in (HARD, ALL))
        met = hard.sign > 0 and whole.sign >= 0
        lines.append([
            arm, cell(hard), cell(whole), "**yes**" if met else "no",
            cell(above_front(found, arm, "cvvdp", where=HARD), 3), cell(above_front(found, arm, "cvvdp"), 3),
            cell(above_front(found, arm, "haarpsi", where=HARD)), cell(above_front(found, arm, "haarpsi")),
            cell(above_front(found, arm, "haarpsi", "psnr")),
        ])  # fmt: skip
    head = [
        "arm",
        "ST-LPIPS, hard",
        "ST-LPIPS, all",
        "rule met",
        "cvvdp, hard",
        "cvvdp, all",
        "HaarPSI, hard",
        "HaarPSI, all",
    ]
    return table([*head, "HaarPSI, all, at equal PSNR"], lines)


DIFFERENCES = (
    "HaarPSI, hard", "HaarPSI, easy", "ST-LPIPS, hard", "ST-LPIPS, easy", "RMSE hard, %", "RMSE easy, %", "PSNR, all",
)  # fmt: skip


def differences(found: Study, arm: str, baseline: str) -> list[str]:
    """The cells of `DIFFERENCES`: an arm less another one."""
    differ = partial(difference, found, arm, baseline)
    qualities = [cell(differ(name, where)) for name in ("haarpsi", "stlpips") for where in ("hard", "easy")]
    errors = [cell(differ("rmse", where, relative=True), 2) for where in ("hard", "easy")]
    return [*qualities, *errors, cell(differ("psnr"), 2)]


def constants(document: Document, start: str) -> str:
    """The default weighting less each constant share: what choosing the share by hand would gain or lose."""
    found = study(document, start)
    arms = [name for name in FRONT if found.seeds("adaptive", name)]
    return table(["adaptive less", *DIFFERENCES], [[arm, *differences(found, "adaptive", arm)] for arm in arms])


def gains(document: Document, start: str) -> str:
    """Every arm less the start as it was."""
    found = study(document, start)
    arms = [arm for arm in ordered(found) if arm not in ("degraded", "frozen")]
    return table(["arm", *DIFFERENCES], [[arm, *differences(found, arm, "frozen")] for arm in arms])


def rewards(document: Document) -> str:
    """What every reward does to every measure, over all inputs, against the start."""
    names, lines = ("haarpsi", "stlpips", "cvvdp", "psnr", "quick", "niqe"), []
    for reward in ("haarpsi", *REWARDS, *SAMPLED_REWARDS):
        found = study(document, "converged", reward)
        for arm in (name for name in REWARD_ARMS if found.runs.get(name)):
            changes = (cell(difference(found, arm, "frozen", name), DIGITS.get(name, 3)) for name in names)
            stopped = sum("stopped" in run for run in found.runs[arm].values())
            seeds = f"{len(found.runs[arm])}" + f", {stopped} stopped" * bool(stopped)
            lines.append([reward, arm, seeds, *changes])
    return table(["reward", "arm", "seeds", *(HEADS[name] for name in names)], lines, text_columns=2)


def hand_over(document: Document, start: str) -> str:
    """Weights, error and reward at the beginning and at the end of the runs: means over the seeds."""
    found, lines = study(document, start), []
    for arm in ordered(found):
        histories = [run["history"] for run in found.runs[arm].values() if run["history"]]
        if histories and arm != "headroom":  # whose difficulty is no error
            quarters = [
                f"{np.mean([history[name][:5] for history in histories]):.{digits}f}, "
                f"{np.mean([history[name][-5:] for history in histories]):.{digits}f}"
                for name, digits in (("rl_share", 2), ("sft_share", 2), ("difficulty", 4), ("reward", 4))
            ]
            lines.append([arm, *quarters, f"{np.mean([run['seconds'] for run in found.runs[arm].values()]):.0f}"])
    return table(["arm", "RL weight", "SFT weight", "error", "reward", "s of a run"], lines)


def progress(document: Document) -> str:
    """How much of each study has been run, and which arms lack seeds."""
    done, lines = {Job(*(row[name] for name in Job._fields)) for row in document["rows"]}, []
    for name in STUDIES:
        planned = list(jobs(name))
        missing = [job for job in planned if job not in done]
        arms = dict.fromkeys(job.arm if name != "rewards" else f"{job.reward}: {job.arm}" for job in missing)
        lines.append([name, f"{len(planned) - len(missing)} of {len(planned)}", "; ".join(arms) or "nothing"])
    return table(["study", "runs", "arms that lack seeds"], lines, text_columns=3)


def groups(document: Document) -> str:
    """Spread of HaarPSI within a group of rollouts by the size of a patch, and its share of what could be gained."""
    lines = [
        [row["sampler"], str(row["side"]), f"{row['score']:.3f}", f"{row['within']:.4f}", f"{row['between']:.3f}",
         f"{row['best']:.4f}", f"{row['within'] / row['headroom']:.1%}"]
        for row in document["rows"]
    ]  # fmt: skip
    head = ["noise of the sampler", "side, pixels", "HaarPSI", "std within a group", "std between inputs"]
    return table([*head, "best of 8 less mean", "std / headroom"], lines)


def figure_file(theme: str, name: str) -> str:
    """The figures of the experiment before have the name of the theme itself."""
    return f"{theme.replace('restoration', 'photographs')}_{name}.png"


def images(document: Document) -> str:
    """The figures, as a page shows them."""
    theme, captions = document["theme"], {
        "front": "Quality over error for all arms, with the front of constant shares",
        "arms": "Every arm less SFT with all of the compute, by tercile",
        "time": "SFT weight, error and reward over the updates",
        "pictures": "Test inputs, degraded and restored by several arms",
    }  # fmt: skip
    return "\n\n".join(f"![{text}](../assets/{figure_file(theme, name)})" for name, text in captions.items())


def fronts(document: Document) -> Figure:
    """Held-out quality and reward over error, on hard inputs and on all, for each start."""
    starts = [start for start in ("converged", "early") if study(document, start).runs.get("rl")]
    panels = [("stlpips", HARD), ("stlpips", ALL), ("haarpsi", ALL)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.9 * len(starts)), layout="constrained")
        axes = figure.subplots(len(starts), len(panels), squeeze=False)
        for row, start in zip(axes, starts, strict=True):
            found = study(document, start)
            names = [arm for arm in ordered(found) if arm not in ("degraded", "one step")]
            for axis, (quality, (there, here)) in zip(row, panels, strict=True):
                at = {arm: (found.mean(arm, "rmse", here), found.mean(arm, quality, there)) for arm in names}
                line = [name for name in FRONT if name in at]
                axis.plot(*np.array([at[name] for name in line]).T, "o-", color=MUTED, ms=4, lw=1.2, label="constant")
                for name in line:
                    axis.annotate(name.removeprefix("fixed "), at[name], (4, -9), textcoords="offset points", size=7)
                for arm in (name for name in names if name not in FRONT):
                    ours, number = (
                        arm == "adaptive",
                        MAIN.index(arm),
                    )  # 10 colours and 11 markers, the same for both starts
                    style = {"ms": 13, "color": RL} if ours else {"ms": 6, "color": f"C{number}"}
                    axis.plot(*at[arm], "*" if ours else "sD^vPX<>hdp"[number % 11], ls="", label=arm, **style)
                axis.set(xlabel=f"RMSE, {here} inputs (left is better)", ylabel=f"{HEADS[quality]}, {there} inputs")
                axis.set_title(f"{start}: {HEADS[quality]}, {there} inputs", size=9)
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    return figure


def by_tercile(document: Document) -> Figure:
    """Every arm less SFT with all of the compute, by tercile, with intervals."""
    found = study(document, "converged")
    names = [arm for arm in ordered(found) if arm not in (SFT, "degraded", "one step") and found.seeds(arm, SFT)][::-1]
    panels = {"stlpips": "ST-LPIPS (held out)", "haarpsi": "HaarPSI (the reward)", "rmse": "RMSE, % (left is better)"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 0.33 * len(names) + 1.6), layout="constrained")
        axes = figure.subplots(1, 3, sharey=True)
        for axis, (measure, title) in zip(axes, panels.items(), strict=True):
            axis.axvline(0, color=MUTED, lw=0.8)
            for shift, (tercile, colour) in zip((0.25, 0, -0.25), COLOURS.items(), strict=True):
                cells = [difference(found, arm, SFT, measure, tercile, relative=measure == "rmse") for arm in names]
                # the mean of the middle half may lie outside of the interval of its resamples by rounding alone
                reach = np.abs([[each.value - each.low, each.high - each.value] for each in cells]).T
                places = np.arange(len(names)) + shift
                centres = [each.value for each in cells]
                axis.errorbar(
                    centres, places, xerr=reach, fmt="o", ms=3.5, lw=1, color=colour, label=f"{tercile} inputs"
                )
            axis.set_title(title)
        axes[0].set_yticks(range(len(names)), names)
        figure.suptitle(f"Difference to `{SFT}`, 95 % intervals")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def over_time(document: Document) -> Figure:
    """SFT weight, error and reward over the updates for each start."""
    starts = [start for start in ("converged", "early") if study(document, start).runs.get("rl")]
    names = ("sft", "rl", "adaptive", "adaptive, convex", "reversed", "inverse square", "learning progress")
    titles = {"sft_share": "SFT weight", "difficulty": "RMSE of the rollouts", "reward": "reward of the rollouts"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9 * len(starts)), layout="constrained")
        axes = figure.subplots(len(starts), 3, squeeze=False)
        for row, start in zip(axes, starts, strict=True):
            found = study(document, start)
            for axis, (key, title) in zip(row, titles.items(), strict=True):
                for arm in (name for name in names if found.runs.get(name)):
                    histories = [run["history"] for run in found.runs[arm].values()]
                    style = (
                        {"lw": 2.4, "color": RL} if arm == "adaptive" else {"lw": 1.1, "color": f"C{names.index(arm)}"}
                    )
                    curve = np.mean([history[key] for history in histories], 0)
                    axis.plot(histories[0]["update"], curve, label=arm, **style)
                axis.set_title(f"{start}: {title}", size=9)
                axis.set_xlabel("update")
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right", frameon=False, fontsize=8)
    return figure


def pictures(document: Document) -> Figure:
    """One test input of each task: degraded, and restored by several arms of seed 0."""
    found = study(document, "converged")
    shown = [arm for arm in PICTURED if "strip" in found.runs.get(arm, {}).get(0, {})]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.15 * len(shown) + 0.3))
        figure.subplots_adjust(left=0.1, right=0.995, top=0.995, bottom=0.03, hspace=0.05)
        for axis, arm in zip(figure.subplots(len(shown), 1, squeeze=False)[:, 0], shown, strict=True):
            image = unstrip(found.runs[arm][0]["strip"])
            axis.imshow(image, interpolation="nearest")
            axis.set_yticks([image.height / 2], [arm.replace(", ", ",\n")])
            axis.tick_params(length=0)
            side, count = image.height, image.width // image.height
            tasks = [list(TASKS)[row % len(TASKS)] for row in SHOWN[:count]]
            axis.set_xticks([side * (place + 0.5) for place in range(count)], tasks)
            axis.xaxis.set_visible(arm == shown[-1])
    return figure


FIGURES: dict[str, Callable[[Document], Figure]] = {
    "front": fronts,
    "arms": by_tercile,
    "time": over_time,
    "pictures": pictures,
}
TABLES: dict[str, Callable[[Document], str]] = {
    "progress": progress,
    "rewards": rewards,
    "variants": variants,
    "figures": images,
}
for start in ("converged", "early"):
    for build in (absolute, gains, tasks, weightings, distances, constants, hand_over):
        TABLES[f"{build.__name__.replace('_', ' ')} {start}"] = partial(build, start=start)
