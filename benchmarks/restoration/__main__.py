"""The image experiment: every weighting and reward on the same models, judges, data and noise (see protocol.md).

    python -m benchmarks.restoration --quick                      # does it run? No claim.
    python -m benchmarks.restoration --scale cpu --seeds 5
    python -m benchmarks.restoration --scale gpu --device cuda --seeds 5
    python -m benchmarks.restoration.report restoration-cpu       # tables and figures

Results lie one file per seed and arm in `--folder`; a run that was cut off goes on where it stopped.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.restoration import world
from benchmarks.restoration.arms import MAIN, arms
from benchmarks.restoration.run import run
from benchmarks.restoration.world import Job

FEWEST_SEEDS = 5  # of the main arms, before anything else runs
SIDE_SEEDS = 3  # of the other weightings and of the reward study


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest scale, one seed")
    parser.add_argument("--scale", choices=[name for name in world.SCALES if name != "quick"], default="cpu")
    parser.add_argument("--seeds", type=int, default=FEWEST_SEEDS)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after so long")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--folder", type=Path, help="default: restoration-<scale>")
    return parser.parse_args()


def ordered(num_seeds: int) -> Iterator[tuple[int, str]]:
    """(seed, arm) so that a cut leaves whole seeds: main arms, then the rest with fewer seeds, then more seeds."""
    side = [name for name in arms(1) if name not in MAIN]
    study = [name for name in side if name.startswith("reward")]
    blocks = [(range(min(FEWEST_SEEDS, num_seeds)), MAIN), (range(min(SIDE_SEEDS, num_seeds)), study)]
    blocks += [(range(min(SIDE_SEEDS, num_seeds)), [name for name in side if name not in study])]
    for seeds, names in [*blocks, (range(FEWEST_SEEDS, num_seeds), MAIN)]:
        yield from ((seed, name) for seed in seeds for name in names)


def main() -> None:
    """Run what is missing."""
    options, start = parse(), time.monotonic()
    scale = world.QUICK if options.quick else world.SCALES[options.scale]
    folder = options.folder or Path(f"restoration-{scale.name}")
    if options.device == "cpu":
        torch.set_num_threads(1)  # small convolutions gain nothing from more, and runs repeat exactly
    jobs = [Job(scale, *job, folder, options.device) for job in ordered(1 if options.quick else options.seeds)]
    for job in track(jobs, "arms", console=Console(stderr=True)):
        if time.monotonic() - start < 60 * options.minutes:
            run(job)


if __name__ == "__main__":
    main()
