"""Latency, throughput and memory of every reward that can be built here, beside what a user would call instead.

    python -m benchmarks.latency                    # half an hour on two cores
    python -m benchmarks.latency --rewards ssim lpips
    python -m benchmarks.latency --device cuda
    python -m benchmarks.latency --quick            # smoke run

Rewards are timed as a trainer calls them, with the whole contract around the formula; peers are bare functions. In each
setting all calls are taken in turns. Networks have seeded random weights: speed does not depend on them. `ratio` is our
images per second over those of the fastest peer. The last line of standard output is one JSON document.
`bench_classical` compares the bare formulas; `bench_qalign` and `bench_vlm` the multimodal models at any size.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks._harness import CPU, document, elapsed, finish
from benchmarks._latency_subjects import Score, Subject, subjects
from benchmarks._peak_memory import peak_of
from benchmarks.bench_classical import photographs

PACKAGES = ["pyiqa", "piq", "lpips", "torchmetrics", "kornia", "scikit-image", "pytorch-msssim", "piqa", "pillow"]
MAX_SECONDS = 8.0  # a call that takes longer is timed once, and its library is left out of larger settings
OURS = "iqareward"


def build(subject: Subject, device: torch.device = CPU) -> tuple[dict[str, Score], dict[str, str]]:
    """Calls by library, and why the others are missing; networks are made on the device."""
    with device:
        calls, missing = {OURS: subject.make()}, {}
    for library, make in subject.peers.items():
        if library == "scikit-image" and device.type != "cpu":
            missing[library] = "it computes on the CPU only"
            continue
        try:
            with device:
                calls[library] = make()
        except (ImportError, OSError) as error:
            missing[library] = str(error).splitlines()[0][:120]
    return calls, missing


def seconds_of(
    calls: dict[str, Callable[[], object]], rounds: int, device: torch.device = CPU
) -> dict[str, list[float]]:
    """Seconds of every call, taken in turns after one to warm up; a slow call is timed once."""
    times: dict[str, list[float]] = {}
    slow = set()
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if name in slow:
                continue
            taken = elapsed(call, device)
            if turn or taken > MAX_SECONDS:
                times.setdefault(name, []).append(taken)
            slow |= {name} if taken > MAX_SECONDS else set()
    return times


def measure(
    subject: Subject, settings: list[tuple[int, int]], rounds: int, device: torch.device = CPU
) -> list[dict[str, Any]]:
    """A row per size and batch."""
    calls, missing = build(subject, device)
    rows = []
    for size, batch in settings:
        pixels = photographs(batch, size, device)
        bound = {name: partial(call, *pixels) for name, call in calls.items()}
        with torch.no_grad():
            times = seconds_of(bound, rounds, device)
            peak = peak_of(bound[OURS], device)
        speed = {name: batch / statistics.median(values) for name, values in times.items()}
        peers = {name: value for name, value in speed.items() if name != OURS}
        fastest = max(peers, key=lambda name: peers[name], default=None)
        row = {"reward": subject.name, "size": size, "batch": batch, "images_per_second": speed[OURS]}
        row |= {"p50_ms": 1e3 * statistics.median(times[OURS]), "p95_ms": 1e3 * float(np.quantile(times[OURS], 0.95))}
        row |= {"peak_mb": peak, "peers": peers, "missing": missing, "fastest_peer": fastest}
        rows.append(row | {"ratio": None if fastest is None else speed[OURS] / peers[fastest]})
        calls = {name: call for name, call in calls.items() if name == OURS or times[name][0] <= MAX_SECONDS}
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """One line per reward and setting."""
    table = Table(title="Rewards as a trainer calls them", title_justify="left")
    for column in ("reward", "size", "batch", "images/s", "p50 ms", "p95 ms", "MB", "fastest peer", "ratio"):
        table.add_column(column, justify="left" if column in ("reward", "fastest peer") else "right")
    for row in rows:
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        numbers = (f"{row[name]:.1f}" for name in ("images_per_second", "p50_ms", "p95_ms", "peak_mb"))
        table.add_row(row["reward"], str(row["size"]), str(row["batch"]), *numbers, row["fastest_peer"] or "-", ratio)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="three rewards, 64 pixels, two rounds")
    parser.add_argument("--device", type=torch.device, default=CPU, help="what to measure")
    parser.add_argument("--json", type=Path, help="also write the document here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    wanted = options.rewards or (["ssim", "piqe", "fsim"] if options.quick else None)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = [subject for subject in subjects(Path(folder)) if wanted is None or subject.name in wanted]
        for subject in track(chosen, "timing", console=Console(stderr=True), transient=True):
            settings = [(64, 2)] if options.quick else [(size, b) for size in subject.sizes for b in subject.batches]
            rows += measure(subject, settings, 2 if options.quick else options.rounds, options.device)
    show(rows, Console(width=120))
    # no targets: a reward does more than a bare function, and bench_classical compares functions with functions
    finish(document("latency", rows, [], PACKAGES, options.device), options.json)


if __name__ == "__main__":
    main()
