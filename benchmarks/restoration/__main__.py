"""The experiment on photographs: weightings and rewards on the small restorer (see protocol.md).

    python -m benchmarks.restoration --seeds 5 --workers 2                  # all studies, in order of importance
    python -m benchmarks.restoration --study main --minutes 30
    python -m benchmarks.restoration --scale gpu --device cuda --workers 12
    python -m benchmarks.restoration --quick --results quick.json           # does it run? No claim.
    python -m benchmarks.report                                             # tables and figures from the results

Every finished run is written to the results file at once. Runs that the file has are not repeated, so an interrupted
experiment goes on where it stopped, also in a fresh clone.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks._harness import FOLDER, document, hardware
from benchmarks.restoration import world
from benchmarks.restoration.arms import SEEDS, STUDIES, Job, jobs
from benchmarks.restoration.run import prepare, work
from iqareward.atomic import atomic_write

FILES = {"cpu": "restoration_amd-epyc_2026-11-27.json", "gpu": "restoration-gpu_h100_2026-11-27.json"}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.restoration", description=__doc__, formatter_class=style)
    parser.add_argument("--study", choices=STUDIES, action="append", help="default: all")
    parser.add_argument("--arms", nargs="+", help="only these")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing new after so long")
    parser.add_argument("--scale", choices=FILES, default="cpu")
    parser.add_argument("--quick", action="store_true", help="the smallest scale")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--stlpips", help="file with the weights of ST-LPIPS; default: that of stlpips_pytorch")
    parser.add_argument("--commit", help="recorded with the results; default: what git says")
    parser.add_argument("--results", type=Path, help="default: the file of the scale in benchmarks/results")
    options = parser.parse_args(arguments)
    if options.quick and options.results is None:
        parser.error("--quick expected --results FILE, because its runs do not belong among the committed ones.")
    return options


def load(file: Path) -> list[dict[str, Any]]:
    """The runs of a results file; none if it does not exist."""
    return json.loads(file.read_text())["rows"] if file.exists() else []


def save(
    file: Path, rows: Sequence[dict[str, Any]], scale: world.Scale, device: str, commit: str | None = None
) -> None:
    """Write the results with one run per line."""
    theme = "restoration-gpu" if scale.name == "gpu" else "restoration"
    record = document(theme, [], [], ["diffusers", "accelerate"], torch.device(device))
    record = {name: value for name, value in record.items() if name != "rows"} | {"scale": vars(scale), "rows": []}
    record["commit"] = commit or record["commit"]
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as part:
        part.write((json.dumps(record)[:-2] + f"\n{lines}\n]}}\n").encode())


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing."""
    options, start, console = parse(arguments), time.monotonic(), Console(stderr=True)
    scale = world.QUICK if options.quick else world.SCALES[options.scale]
    file = options.results or FOLDER / FILES[options.scale]
    rows = load(file)
    done = {Job(*(row[name] for name in Job._fields)) for row in rows}
    todo = [job for study in options.study or STUDIES for job in jobs(study, options.seeds) if job not in done]
    todo = [job for job in dict.fromkeys(todo) if not options.arms or job.arm in options.arms]
    console.print(f"{len(done)} runs are in {file}, {len(todo)} are to do on {hardware(torch.device(options.device))}")
    waiting: set[Future[dict[str, Any]]] = set()
    context = multiprocessing.get_context("spawn")
    settings = (scale, options.device, options.stlpips)
    with ProcessPoolExecutor(options.workers, context, initializer=prepare, initargs=settings) as pool:
        while todo or waiting:
            while todo and len(waiting) < options.workers and time.monotonic() - start < 60 * options.minutes:
                waiting.add(pool.submit(work, todo.pop(0)))
            if not waiting:
                break
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            rows += [future.result() for future in finished]
            save(file, rows, scale, options.device, options.commit)
            last = ", ".join(
                f"{row['start']} {row['reward']} {row['arm']} {row['seed']}" for row in rows[-len(finished) :]
            )
            console.print(f"{time.monotonic() - start:.0f} s: {len(rows)} runs; {last}")


if __name__ == "__main__":
    main()
