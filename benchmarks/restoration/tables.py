"""The tables of the report, each from the results alone, as lists of dictionaries of cells."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.restoration import analysis
from benchmarks.restoration.analysis import FRONT, Interval, Table, above_front, difference, seeds_of
from benchmarks.restoration.arms import MAIN

Row = dict[str, Any]
MARGIN = 1.0  # percent of RMSE on the easy tercile
HARD = {"held-out reward, hard": "held_out", "HaarPSI, hard": "haarpsi", "SSIM, hard": "ssim"}


def present(table: Table, names: Sequence[str]) -> list[str]:
    """Those arms that have a result."""
    return [name for name in names if any(arm == name for _, arm in table)]


def others(table: Table) -> list[str]:
    """Weightings beside the main ones."""
    return sorted({arm for _, arm in table if arm not in MAIN and not arm.startswith("reward")})


def weightings(table: Table, names: Sequence[str], baseline: str) -> list[Row]:
    """Primary outcome and the rest of the hard tercile, each arm less the baseline."""
    rows = []
    for arm in present(table, names):
        if arm == baseline:
            continue
        easy = difference(table, arm, baseline, "rmse", "easy", relative=True)
        row: Row = {"arm": arm, "seeds": len(seeds_of(table, [arm, baseline]))}
        row |= {title: difference(table, arm, baseline, name, "hard") for title, name in HARD.items()}
        row |= {
            "RMSE easy, %": easy,
            "RMSE hard, %": difference(table, arm, baseline, "rmse", "hard", relative=True),
            "HaarPSI, all": difference(table, arm, baseline, "haarpsi", "all"),
            "non-inferior": easy.high <= MARGIN,
        }
        rows.append(row | {"primary": row["non-inferior"] and row["held-out reward, hard"].low > 0})
    return rows


def distances(table: Table) -> list[Row]:
    """Every weighting that is no constant against the front of constants."""
    rows = []
    for arm in [*present(table, MAIN), *others(table)]:
        if arm in FRONT or not seeds_of(table, [*FRONT, arm]):
            continue
        row: Row = {"arm": arm, "seeds": len(seeds_of(table, [*FRONT, arm]))}
        for title, aggregate in (("hard", False), ("aggregate", True)):
            for label, name in (("held-out reward", "held_out"), ("HaarPSI", "haarpsi")):
                row[f"{label}, {title}"] = above_front(table, arm, name, aggregate=aggregate)
        rows.append(row)
    return rows


def cost(results: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Row]:
    """What each arm took, and its weights: means over seeds."""
    rows = []
    for arm in names:
        mine = [row for row in results if row["arm"] == arm]
        row: Row = {"arm": arm, "network evaluations": mine[0]["evaluations"]}
        row["processor s"], row["wall s"] = (
            round(float(np.mean([line[key] for line in mine])), 1) for key in ("processor_seconds", "seconds")
        )
        lines = [[line for line in row["history"] if "rl_share" in line] for row in mine]
        for name in ("rl_share", "sft_share", "has_signal") if lines[0] else ():
            values = np.array([[line[name] for line in history] for history in lines])
            quarter = max(1, values.shape[1] // 4)
            first, last = float(values[:, :quarter].mean()), float(values[:, -quarter:].mean())
            row[f"{name}, first and last quarter"] = f"{first:.2f}, {last:.2f}"
        rows.append(row)
    return rows


def rewards(table: Table, results: Sequence[Mapping[str, Any]]) -> list[Row]:
    """The reward study: change of every measure from the frozen model, over all inputs, and what the monitor said."""
    rows = []
    for arm in sorted({arm for _, arm in table if arm.startswith("reward")}):
        row: Row = {"arm": arm.removeprefix("reward: "), "seeds": len(seeds_of(table, [arm, "frozen"]))}
        for name in analysis.MEASURES:
            row[name] = difference(table, arm, "frozen", name, "all", relative=name == "rmse")
        histories = [line["history"] for line in results if line["arm"] == arm]
        row["own reward"] = analysis.interval(np.array([[_gain(history)] for history in histories]))
        alarmed = [[line for line in history if line.get("alarms")] for history in histories]
        first = [str(lines[0]["update"]) for lines in alarmed if lines]
        row["alarms"] = f"{len(first)} of {len(histories)} seeds" + (f", first at {', '.join(first)}" if first else "")
        row["what fell"] = sorted({part.split(" ")[0] for lines in alarmed for line in lines for part in _parts(line)})
        row["hacked"] = row["own reward"].low > 0 and row["held_out"].high < 0
        rows.append(row)
    return rows


def _gain(history: Sequence[Mapping[str, Any]]) -> float:
    """Of the reward on the validation inputs."""
    seen = [line["validation/reward"] for line in history if "validation/reward" in line]
    return seen[-1] - seen[0]


def _parts(line: Mapping[str, Any]) -> list[str]:
    return [part for part in line["alarms"].split("; ") if part]


def cell(value: Any) -> str:
    """A table cell."""
    if isinstance(value, Interval):
        size = max(abs(value.value), abs(value.low), abs(value.high))
        digits = 4 if size < 0.1 else 3 if size < 1 else 2 if size < 10 else 1
        return f"{value.value:+.{digits}f} [{value.low:+.{digits}f}, {value.high:+.{digits}f}] ({value.agree})"
    if isinstance(value, bool | np.bool_):
        return "**yes**" if value else "no"
    if isinstance(value, list):
        return ", ".join(value)
    return str(value)


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    if not rows:
        return "(nothing was run)"
    names = list(max(rows, key=len))
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(cell(row.get(name, "")) for name in names) + " |" for row in rows]
    return "\n".join(lines)
