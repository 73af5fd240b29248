"""Single images from many clients against the same network in process: our server, MicroBatched, and Flask.

    python -m benchmarks.bench_serving                    # about ten minutes on 2 cores; the figures of the docs
    python -m benchmarks.bench_serving --config medium    # a network for which a CPU gains nothing from batches
    python -m benchmarks.bench_serving --haproxy          # Ray's HAProxy in place of its Python proxy
    python -m benchmarks.bench_serving --quick            # smoke run

Arms, taken in turns: `in process` is one call with a batch; `MicroBatched` is 8 threads with one image each; `server`
is `iqareward serve` with `RemoteReward` clients in another process; `flask` and `flask, threaded` are the pickle and
JPEG server of `_serving_flask.py`. Clients and servers share the cores, so what a server costs shows. The last line is
JSON.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._harness import document, finish, target
from benchmarks._serving_judge import CONFIGS, Judge
from benchmarks._serving_load import load, pictures
from iqareward.rewards.batching import MicroBatched

BATCH, THREADS = 32, 8


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def our_server(judge: Judge, threads: int) -> Iterator[tuple[str, Any]]:
    """The address of `iqareward serve` with one process of the judge, and a way to ask that process for its batches."""
    from ray import serve

    from iqareward.serving.application import APP_NAME, Deployment
    from iqareward.serving.run import deploy, local_ray
    from iqareward.serving.settings import Settings

    port = free_port()
    deployment = Deployment(replicas=1, num_cpus=threads, max_batch=BATCH, front_replicas=1)
    with local_ray(num_cpus=threads, object_store_memory=500 * 2**20, log_to_driver=False):
        deploy({"judge": judge}, deployment, Settings(deadline=600), host="127.0.0.1", port=port, everywhere=False)
        yield f"http://127.0.0.1:{port}", serve.get_deployment_handle("reward-0-judge", APP_NAME)


@contextmanager
def flask_server(judge: Judge, *options: str) -> Iterator[str]:
    """The address of the Flask server, in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks._serving_flask", "--port", str(port), "--config", judge.config]
    process = subprocess.Popen([*command, "--threads", str(judge.threads), *options], stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        else:
            raise RuntimeError("the Flask server did not start")
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.kill()
        process.wait()


def clients(kind: str, url: str, concurrency: int, seconds: float, side: int) -> dict[str, Any]:
    """Load from another process."""
    command = [sys.executable, "-m", "benchmarks._serving_load", "--kind", kind, "--url", url, "--side", str(side)]
    command += ["--concurrency", str(concurrency), "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def in_process(judge: Judge, seconds: float, side: int, batch: int) -> dict[str, Any]:
    """Whole batches, one after the other."""
    images = pictures(side)[:batch]
    judge(images)
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        judge(images)
        count += batch
    return {"images": count, "seconds": time.perf_counter() - start, "latencies": []}


def micro_batched(judge: Judge, seconds: float, side: int) -> dict[str, Any]:
    """Threads with one image each, in this process."""
    with MicroBatched(judge, max_batch=BATCH) as batched:
        calls = [lambda image: batched(image[None]).item()] * THREADS
        latencies, took = load(calls, pictures(side), seconds)
    return {"images": len(latencies), "seconds": took, "latencies": latencies}


def served(url: str, handle: Any, concurrency: int, seconds: float, side: int) -> dict[str, Any]:
    """Our server, with the images per batch that its process counted."""
    before = handle.statistics.remote().result()["judge"]
    found = clients("ours", url, concurrency, seconds, side)
    batches, images = (
        now - then for now, then in zip(handle.statistics.remote().result()["judge"], before, strict=True)
    )
    return found | {"images_per_batch": images / batches}


def arms(stack: ExitStack, judge: Judge, options: argparse.Namespace) -> dict[tuple[str, int], Callable[[], dict]]:
    """What to measure, by arm and concurrency; the servers run until the stack is closed."""
    seconds, side = options.seconds, options.side
    found: dict[tuple[str, int], Callable[[], dict]] = {
        ("in process", BATCH): partial(in_process, judge, seconds, side, BATCH),
        ("in process", THREADS): partial(in_process, judge, seconds, side, THREADS),
        ("in process", 1): partial(in_process, judge, seconds, side, 1),
        ("MicroBatched", THREADS): partial(micro_batched, judge, seconds, side),
    }
    url, handle = stack.enter_context(our_server(judge, options.threads))
    flasks = {"flask": (), "flask, threaded": ("--threaded",)}
    addresses = {name: stack.enter_context(flask_server(judge, *flags)) for name, flags in flasks.items()}
    for concurrency in options.concurrency:
        found["server", concurrency] = partial(served, url, handle, concurrency, seconds, side)
        for name, address in addresses.items():
            found[name, concurrency] = partial(clients, "flask", address, concurrency, seconds, side)
    return found


def row(arm: str, concurrency: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Median throughput of the rounds, and quantiles over the latencies of all."""
    latencies = [latency for found in rounds for latency in found["latencies"]]
    line: dict[str, Any] = {
        "arm": arm,
        "concurrency": concurrency,
        "images_per_s": round(statistics.median(found["images"] / found["seconds"] for found in rounds), 3),
    }
    for quantile in (50, 95, 99):
        line[f"p{quantile}_ms"] = round(float(np.percentile(latencies, quantile)), 1) if latencies else None
    sizes = [found["images_per_batch"] for found in rounds if "images_per_batch" in found]
    return line | {"images_per_batch": round(statistics.median(sizes), 2) if sizes else None}


def targets(rows: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    """What was promised, at the highest concurrency."""
    speed = {(line["arm"], line["concurrency"]): line["images_per_s"] for line in rows}
    return [
        target(
            f"server, {most} clients / in process, batch {BATCH}",
            speed["server", most] / speed["in process", BATCH],
            0.85,
        ),
        target(f"server / flask, {most} clients", speed["server", most] / speed["flask", most], 3.0),
        target(
            f"MicroBatched / one batch, {THREADS} threads",
            speed["MicroBatched", THREADS] / speed["in process", THREADS],
            0.9,
        ),
    ]


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=CONFIGS, default="wide")
    parser.add_argument("--side", type=int, default=512, help="of the images")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=15, help="per arm and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the network, wherever it runs")
    parser.add_argument("--haproxy", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny network, small images, one round of a second")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.config, options.side, options.concurrency = "tiny", 64, [1, 4]
        options.seconds, options.rounds, options.threads = 1.0, 1, 1
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if options.haproxy else "0"  # read when Ray is imported
    judge = Judge(options.config, options.threads, BATCH)
    results: dict[tuple[str, int], list[dict[str, Any]]] = {}
    with ExitStack() as stack:
        calls = arms(stack, judge, options)
        for _ in range(options.rounds):
            for key, call in calls.items():
                results.setdefault(key, []).append(call())
                print(f"{key}: {results[key][-1]['images']} images", file=sys.stderr, flush=True)
    rows = [row(*key, rounds) for key, rounds in results.items()]
    table = Table(*rows[0])
    for line in rows:
        table.add_row(*(str(value) for value in line.values()))
    Console(stderr=True).print(table)
    setup = {name: getattr(options, name) for name in ("config", "side", "seconds", "rounds", "threads", "haproxy")}
    record = document("serving", rows, targets(rows, max(options.concurrency)), ["ray", "flask", "httpx2"])
    finish(record | {"cores": os.cpu_count(), "setup": setup}, options.out)


if __name__ == "__main__":
    main()
