"""What a request with one image costs in processor time, process by process, with a reward that does nothing.

    python -m benchmarks.bench_requests            # two minutes on 2 cores
    python -m benchmarks.bench_requests --quick    # smoke run

Clients are `RemoteReward` in threads of another process, each waiting for its answer. `front` speaks HTTP, `reward` is
the process that would score, `ray` is all the rest of Ray. The last line is JSON.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from benchmarks._harness import document, finish
from benchmarks.bench_serving import Idle, clients, our_server


def processor_seconds() -> dict[str, float]:
    """Used so far by the processes that this one has started, by role."""
    used = {"front": 0.0, "reward": 0.0, "ray": 0.0}
    for process in psutil.Process().children(recursive=True):
        try:
            name, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:  # it has ended meanwhile
            continue
        role = "front" if ":front" in name else "reward" if ":reward-" in name else "ray"
        used[role] += times.user + times.system
    return used


def measure(url: str, side: int, concurrency: int, seconds: float) -> dict[str, Any]:
    """A row: throughput, latency, and milliseconds of processor per request."""
    clients("ours", [url], concurrency, 1.0, side, warm_up=0.0)
    before = processor_seconds()
    found = clients("ours", [url], concurrency, seconds, side, warm_up=0.0)
    after = processor_seconds()
    row: dict[str, Any] = {
        "side": side,
        "concurrency": concurrency,
        "requests_per_s": round(found["images"] / found["seconds"], 1),
        "p50_ms": round(float(np.percentile(found["latencies"], 50)), 1),
    }
    costs = {role: after[role] - before[role] for role in before} | {"client": found["cpu_seconds"]}
    return row | {f"{role}_ms": round(1e3 * cost / found["images"], 2) for role, cost in costs.items()}


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--quick", action="store_true", help="small images, two clients, a second")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.sides, options.concurrency, options.seconds = [32], [2], 1.0
    with our_server(Idle(), 1) as (url, _):
        rows = []
        for side in options.sides:
            for concurrency in options.concurrency:
                rows.append(measure(url, side, concurrency, options.seconds))
                print(rows[-1], file=sys.stderr, flush=True)
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(stderr=True).print(table)
    record = document("requests", rows, [], ["ray", "uvicorn", "httpx2"])
    finish(record | {"cores": os.cpu_count(), "setup": {"seconds": options.seconds}}, options.out)


if __name__ == "__main__":
    main()
