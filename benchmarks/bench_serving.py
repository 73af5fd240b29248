"""Single images from many clients against the same network in process: our server, MicroBatched, and Flask.

    python -m benchmarks.bench_serving                    # twenty minutes on 2 cores; the figures of the docs
    python -m benchmarks.bench_serving --config medium    # a network for which a CPU gains nothing from batches
    python -m benchmarks.bench_serving --quick            # smoke run

Arms, taken in turns:

- `in process`: one call with a batch, the network on all cores;
- `in process, one per core`: the same in as many processes as cores, one thread each, all at once;
- `MicroBatched`: 8 threads with one image each, in one process;
- `server`: `iqareward serve --replicas <cores>`, that is one thread for each, with `RemoteReward` clients;
- `flask`: the server of pickles and JPEG of `_serving_flask.py`, one process with all cores as code bases run it;
  `flask, threaded` takes requests side by side; `flask, one per core` is as many processes, one thread each.

Clients run in another process and share the cores with the servers, so what a server costs shows. The last line is
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks._harness import document, finish, target
from benchmarks._serving_judge import CONFIGS, Judge, pictures, score_batches
from benchmarks._serving_load import load
from iqareward.rewards.batching import MicroBatched
from iqareward.types import Reward

BATCH, THREADS = 32, 8


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def our_server(judge: Reward, processes: int) -> Iterator[tuple[str, Any]]:
    """The address of `iqareward serve` with so many processes of the judge, and a handle to them."""
    from ray import serve

    from iqareward.serving.requests import Settings
    from iqareward.serving.run import APP_NAME, Deployment, deploy, local_ray

    port = free_port()
    deployment = Deployment(replicas=processes, max_batch=BATCH)
    with local_ray(num_cpus=processes, object_store_memory=500 * 2**20, log_to_driver=False):
        deploy({"judge": judge}, deployment, Settings(deadline=600), host="127.0.0.1", port=port, everywhere=False)
        yield f"http://127.0.0.1:{port}", serve.get_deployment_handle("reward-0-judge", APP_NAME)


@contextmanager
def flask_server(config: str, threads: int, *options: str) -> Iterator[str]:
    """The address of the Flask server, in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks._serving_flask", "--port", str(port), "--config", config]
    process = subprocess.Popen([*command, "--threads", str(threads), *options], stderr=subprocess.DEVNULL)
    try:
        for _ in range(3000):  # five minutes: on a busy machine its imports alone take one
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


def clients(
    kind: str, urls: Sequence[str], concurrency: int, seconds: float, side: int, warm_up: float | None = None
) -> dict[str, Any]:
    """Load from another process, after a warm-up that is half as long unless told otherwise."""
    command = [sys.executable, "-m", "benchmarks._serving_load", "--kind", kind, "--side", str(side)]
    command += [part for url in urls for part in ("--url", url)]
    command += [
        "--concurrency",
        str(concurrency),
        "--seconds",
        str(seconds),
        "--warm-up",
        str(seconds / 2 if warm_up is None else warm_up),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def in_process(judge: Judge, seconds: float, side: int, batch: int) -> dict[str, Any]:
    """Whole batches, one after the other."""
    images = pictures(side)[:batch]
    judge(images)
    return score_batches(judge, images, seconds)


def one_per_core(config: str, seconds: float, side: int, batch: int, cores: int) -> dict[str, Any]:
    """Whole batches in as many processes as cores, which start at once."""
    command = [sys.executable, "-m", "benchmarks._serving_judge", "--config", config, "--threads", "1"]
    command += ["--batch", str(batch), "--seconds", str(seconds), "--side", str(side)]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) for _ in range(cores)]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    found = [json.loads(process.communicate()[0]) for process in processes]
    speed = sum(one["images"] / one["seconds"] for one in found)
    return {"images": speed * seconds, "seconds": seconds, "latencies": []}


def micro_batched(judge: Judge, seconds: float, side: int) -> dict[str, Any]:
    """Threads with one image each, in this process."""
    with MicroBatched(judge, max_batch=BATCH) as batched:
        calls = [lambda image: batched(image[None]).item()] * THREADS
        latencies, took = load(calls, pictures(side), seconds, seconds / 4)
    return {"images": len(latencies), "seconds": took, "latencies": latencies}


def counted(handle: Any, processes: int) -> tuple[int, int]:
    """Batches and images of all processes of the judge; each call reaches one of them."""
    found: dict[int, tuple[int, int]] = {}
    while len(found) < processes:
        process, parts = handle.statistics.remote().result()
        found[process] = parts["judge"]
    batches, images = zip(*found.values(), strict=True)
    return sum(batches), sum(images)


def served(url: str, handle: Any, processes: int, concurrency: int, seconds: float, side: int) -> dict[str, Any]:
    """Our server, with the images per batch that its processes counted."""
    before = counted(handle, processes)
    found = clients("ours", [url], concurrency, seconds, side)
    batches, images = (now - then for now, then in zip(counted(handle, processes), before, strict=True))
    return found | {"images_per_batch": images / batches}


def arms(stack: ExitStack, judge: Judge, options: argparse.Namespace) -> dict[tuple[str, int], Callable[[], dict]]:
    """What to measure, by arm and concurrency; the servers run until the stack is closed."""
    seconds, side, cores, config = options.seconds, options.side, options.threads, options.config
    found: dict[tuple[str, int], Callable[[], dict]] = {
        ("in process", BATCH): partial(in_process, judge, seconds, side, BATCH),
        ("in process", THREADS): partial(in_process, judge, seconds, side, THREADS),
        ("in process", 1): partial(in_process, judge, seconds, side, 1),
        ("in process, one per core", BATCH): partial(one_per_core, config, seconds, side, BATCH, cores),
        ("MicroBatched", THREADS): partial(micro_batched, judge, seconds, side),
    }
    url, handle = stack.enter_context(our_server(Judge(config, 1, BATCH), cores))
    flasks = {"flask": [(cores,)], "flask, threaded": [(cores, "--threaded")], "flask, one per core": [(1,)] * cores}
    addresses = {
        name: [stack.enter_context(flask_server(config, *flags)) for flags in servers]
        for name, servers in flasks.items()
    }
    most = max(options.concurrency)
    for concurrency in options.concurrency:
        found["server", concurrency] = partial(served, url, handle, cores, concurrency, seconds, side)
        for name, urls in addresses.items():
            if name == "flask" or concurrency == most:
                found[name, concurrency] = partial(clients, "flask", urls, concurrency, seconds, side)
    return found


def row(arm: str, concurrency: int, rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Throughput and quantiles of the latencies, over all rounds together."""
    latencies = [latency for found in rounds for latency in found["latencies"]]
    line: dict[str, Any] = {
        "arm": arm,
        "concurrency": concurrency,
        "images_per_s": round(sum(found["images"] for found in rounds) / sum(found["seconds"] for found in rounds), 3),
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
    parser.add_argument("--seconds", type=float, default=8, help="per arm and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores to use")
    parser.add_argument("--quick", action="store_true", help="tiny network, small images, one round of a second")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.config, options.side, options.concurrency = "tiny", 64, [1, 4]
        options.seconds, options.rounds, options.threads = 1.0, 1, 1
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
    setup = {name: getattr(options, name) for name in ("config", "side", "seconds", "rounds", "threads")}
    record = document("serving", rows, targets(rows, max(options.concurrency)), ["ray", "flask", "httpx2"])
    finish(record | {"cores": os.cpu_count(), "setup": setup}, options.out)


if __name__ == "__main__":
    main()
