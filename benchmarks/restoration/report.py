"""Tables and figures from the results of the image experiment.

python -m benchmarks.restoration.report restoration-cpu                    # all: benchmarks/results, docs/assets
python -m benchmarks.restoration.report restoration-cpu --table distances # one table, on the screen
"""

import argparse
import datetime
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._harness import document, hardware, target
from benchmarks.restoration import analysis, figures, tables
from benchmarks.restoration.arms import MAIN
from benchmarks.restoration.tables import Row

ROOT = Path(__file__).parents[2]
BASELINE = "sft, all compute"


def contents(results: Sequence[Mapping[str, Any]]) -> dict[str, Callable[[], list[Row]]]:
    """What makes each table."""
    table, photographs = (analysis.tabulate(results, place) for place in ("test", "photographs"))
    main = tables.present(table, MAIN)
    return {
        "main": lambda: tables.weightings(table, main, BASELINE),
        "against sft": lambda: tables.weightings(table, main, "sft"),
        "against fixed 0.9": lambda: tables.weightings(table, main, "fixed 0.9"),
        "distances": lambda: tables.distances(table),
        "others": lambda: tables.weightings(table, tables.others(table), BASELINE),
        "photographs": lambda: tables.weightings(photographs, main, BASELINE),
        "rewards": lambda: tables.rewards(table, results),
        "cost": lambda: tables.cost(results, [*main, *tables.others(table)]),
        "absolute": lambda: absolute(table, main),
    }


def absolute(table: analysis.Table, names: Sequence[str]) -> list[Row]:
    """Means over seeds and tasks: easy, middle and hard."""
    rows = []
    for arm in names:
        cells = [means for (_, name), means in table.items() if name == arm]
        row: Row = {"arm": arm, "seeds": len(cells)}
        for measure in ("held_out", "haarpsi", "rmse", "ssim"):
            values = np.mean([means[measure] for means in cells], (0, 1))
            row[measure] = " / ".join(f"{value:.4f}" for value in values)
        rows.append(row)
    return rows


def plain(value: Any) -> Any:
    """For JSON: intervals with names, figures rounded."""
    if isinstance(value, analysis.Interval):
        return {name: plain(part) for name, part in value._asdict().items()}
    return round(value, 6) if isinstance(value, float) else value


def per_seed(table: analysis.Table) -> list[dict[str, Any]]:
    """The means everything else is made of, `[tasks][terciles]`."""
    return [
        {"seed": seed, "arm": arm} | {name: values.round(6).tolist() for name, values in means.items()}
        for (seed, arm), means in sorted(table.items())
    ]


def main() -> None:
    """Write everything, or print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table", help="print this one only")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.add_argument("--figures", type=Path, default=ROOT / "docs/assets")
    parser.add_argument("--device", type=torch.device, default="cpu", help="where the runs were made")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as in the runs, for the record of the hardware
    results = analysis.load(options.folder)
    made = contents(results)
    if options.table:
        print(tables.markdown(made[options.table]()))
        return
    rows = {name: build() for name, build in made.items()}
    checks = [target(f"Spearman({t}, u)", value, 0.7) for t, value in analysis.difficulty_check(results).items()]
    flat = [{"table": name} | {key: plain(row[key]) for key in row} for name, part in rows.items() for row in part]
    record = document("restoration", flat, checks, ["diffusers", "accelerate", "scikit-image"], options.device)
    record["per_seed"] = {place: per_seed(analysis.tabulate(results, place)) for place in ("test", "photographs")}
    device = re.sub(r"[^a-z0-9]+", "-", hardware(options.device).split(",")[0].lower()).strip("-")
    stem = f"restoration_{device}_{datetime.datetime.now(datetime.UTC).date().isoformat()}"
    options.results.mkdir(parents=True, exist_ok=True)
    (options.results / f"{stem}.json").write_text(json.dumps(record) + "\n")
    head = f"{record['hardware']}, {record['date']}, commit {record['commit']}; see benchmarks/restoration/protocol.md"
    parts = [f"## {name}\n\n{tables.markdown(part)}" for name, part in rows.items()]
    checked = "\n".join(f"- {check['name']} = {check['value']}" for check in checks)
    text = "\n\n".join([f"# The image experiment\n\n{head}", checked, *parts])
    (options.results / f"{stem}.md").write_text(text + "\n")
    figures.draw(options.folder, results, rows, options.figures)


if __name__ == "__main__":
    main()
