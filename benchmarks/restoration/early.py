"""How early does `HackingMonitor` alarm? It looks every second update, beside measures of quality that it is not given.

    python -m benchmarks.restoration.early [--seeds 3] [--quick] [--folder restoration-early]

For each run of RL with a reward that may be exploited: the update of the first alarm and what it was, the update at
which PSNR and HaarPSI were best, and the PSNR that was lost by the alarm and by the end. The monitor watches SSIM,
GMSD, a held-out reward and its image statistics on 96 validation inputs. The last line of standard output is one JSON
document.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

import iqareward
from benchmarks._harness import document, finish
from benchmarks._tables import table
from benchmarks.restoration import world
from benchmarks.restoration.arms import arms
from benchmarks.restoration.judges import held_out_judge, trained_judge
from benchmarks.restoration.run import train, watched_inputs
from benchmarks.restoration.world import Job
from iqareward.diffusion import Validation

EXPLOITED = ("judge", "ensemble", "judge with floor", "judge, sampled", "haarpsi", "haarpsi, sampled", "niqe, sampled")
CONTROLS = ("psnr", "piqe, sampled")
QUALITY = ("psnr", "haarpsi")  # measured, but not shown to the monitor
EVERY = 2  # updates between looks


def look(job: Job) -> dict[str, Any]:
    """Train one arm under the eyes of the monitor."""
    policy, arm = world.restorer(job), arms(job.scale.rl_updates)[job.arm]
    judges: dict[str, Any] = {"judge": trained_judge(job, policy), "held_out": held_out_judge(job, policy)}
    watched = watched_inputs(job, judges, arm)
    monitor = watched.monitor
    assert monitor is not None
    named = {**watched.rewards, **{name: iqareward.load(name) for name in QUALITY}}
    validation = Validation(watched.pairs, named, num_steps=watched.num_steps, inputs_at_once=96, monitor=monitor)
    history = train(job, policy, arm, validation, EVERY)
    looks = [line for line in history if any(name.endswith("psnr") for name in line)]
    updates = [line["update"] for line in looks]
    curves = {name: [_of(line, name) for line in looks] for name in ("held_out", *QUALITY)}
    alarmed = [(), *(report.alarmed for report in monitor.history)]
    first = next((place for place, names in enumerate(alarmed) if names), None)
    firsts = {
        name: updates[next(place for place, names in enumerate(alarmed) if name in names)]
        for name in dict.fromkeys(name for names in alarmed for name in names)
    }
    row: dict[str, Any] = {"reward": job.arm.removeprefix("reward: "), "seed": job.seed}
    row |= {"alarm": None if first is None else updates[first], "by": [] if first is None else list(alarmed[first])}
    row |= {f"{name} best at": updates[int(np.argmax(curves[name]))] for name in QUALITY}
    best = max(curves["psnr"])
    row |= {"psnr lost at alarm": None if first is None else best - curves["psnr"][first]}
    row |= {
        "psnr lost at end": best - curves["psnr"][-1],
        "held_out change": curves["held_out"][-1] - curves["held_out"][0],
    }
    return row | {"first alarm of each": firsts, "updates": updates, **curves}


def _of(line: Mapping[str, Any], name: str) -> float:
    return next(float(value) for key, value in line.items() if key.split("/")[-1] == name)


def show(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with a line per reward, seeds side by side."""

    def cells(found: list[dict[str, Any]], key: str, digits: int | None = None) -> str:
        values = [row[key] for row in found]
        return ", ".join("-" if value is None else f"{value:.{digits or 0}f}" for value in values)

    lines = []
    for name in dict.fromkeys(row["reward"] for row in rows):
        found = [row for row in rows if row["reward"] == name]
        causes = ", ".join(sorted({cause for row in found for cause in row["by"]}))
        figures = [cells(found, "alarm"), cells(found, "psnr best at"), cells(found, "haarpsi best at")]
        figures += [cells(found, "psnr lost at alarm", 2), cells(found, "psnr lost at end", 2)]
        lines.append([name, causes or "-", *figures])
    header = [
        "reward",
        "first alarm by",
        "alarm at",
        "PSNR best at",
        "HaarPSI best at",
        "dB lost at alarm",
        "at the end",
    ]
    return table(header, lines, text_columns=2)


def main() -> None:
    """Run every reward with every seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="smallest scale, one seed; does it run?")
    parser.add_argument("--folder", type=Path, default=Path("restoration-early"))
    parser.add_argument("--output", type=Path, help="also write the JSON document to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    scale, rows = world.QUICK if options.quick else world.CPU, []
    jobs = [
        Job(scale, seed, f"reward: {name}", options.folder)
        for seed in range(1 if options.quick else options.seeds)
        for name in (*EXPLOITED, *CONTROLS)
    ]
    for job in track(jobs, "arms", console=Console(stderr=True)):
        rows.append(look(job))
        print(show(rows), end="\n\n", flush=True)
    finish(document("restoration-early", rows, [], ["diffusers", "accelerate"]), options.output)


if __name__ == "__main__":
    main()
