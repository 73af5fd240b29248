"""The image experiment: every weighting on the same models, judges, data and noise (see protocol.md).

    python -m benchmarks.restoration --quick                      # does it run? No claim.
    python -m benchmarks.restoration --scale cpu --seeds 5
    python -m benchmarks.restoration --scale gpu --device cuda --seeds 5

Results lie one file per task, seed and arm in `--folder`; a run that was cut off goes on where it stopped. The last
line of standard output is one JSON document.
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks._harness import document, finish, target
from benchmarks.restoration import analysis, world
from benchmarks.restoration.arms import arms
from benchmarks.restoration.run import Job, run

ALWAYS = ("frozen", "sft, all compute")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest scale, one seed, one task")
    parser.add_argument("--scale", choices=[name for name in world.SCALES if name != "quick"], default="cpu")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=list(world.TASKS), default=list(world.TASKS))
    parser.add_argument("--arms", nargs="+", help="default: all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="default: restoration-<scale>")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser.parse_args()


def show(lines: list[dict], console: Console) -> None:
    """Differences to `sft` in each tercile."""
    table = Table("task", "arm", "tercile", *analysis.MEASURES, title="difference to sft, mean over seeds")
    for line in lines:
        cells = [f"{line[measure]['mean']:+.4f}" for measure in analysis.MEASURES]
        table.add_row(line["task"], line["arm"], line["tercile"], *cells)
    console.print(table)


def main() -> None:
    """Run what is missing, analyse everything."""
    options, console = parse(), Console(stderr=True)
    scale = world.QUICK if options.quick else world.SCALES[options.scale]
    folder = options.folder or Path(f"restoration-{scale.name}")
    tasks, seeds = (options.tasks[:1], range(1)) if options.quick else (options.tasks, range(options.seeds))
    names = [*ALWAYS, *(options.arms or arms(scale.rl_updates))]
    if "sft" not in names:
        names.append("sft")  # every difference is to it
    jobs = [Job(scale, task, seed, arm, folder, options.device) for task in tasks for seed in seeds for arm in names]
    results = [run(job) for job in track(jobs, "arms", console=console)]
    lines = analysis.against(analysis.summary(results), "sft")
    show([line for line in lines if line["tercile"] != "middle"], console)
    checks = [
        target(f"Spearman(error, severity), {task}", value, 0.7)
        for task, value in analysis.difficulty_check(results).items()
    ]
    record = document("restoration", lines, checks, ["diffusers", "accelerate"])
    finish(record | {"scale": scale.name, "seeds": len(seeds), "summary": analysis.summary(results)}, options.out)


if __name__ == "__main__":
    main()
