"""Single images from many clients against the same network in process: our server, MicroBatched, and Flask.

    python -m benchmarks.bench_serving                    # twenty minutes on 2 cores; the figures of the docs
    python -m benchmarks.bench_serving --config medium    # a network for which a CPU gains nothing from batches
    python -m benchmarks.bench_serving --quick            # smoke run

Arms, taken in turns:

- `in process`: one call with a batch, the network on all cores;
- `in process, one per core`: the same in as many processes as cores, one thread each, all at once;
- `MicroBatched`: 8 threads with one image each, in one process;
- `server`: `iqareward serve --replicas <cores>`, that is one thread for each, with `RemoteReward` clients;
- `flask`: the server of pickles and JPEG that RL code bases have today, one process with all cores as they run it;
  `flask, threaded` takes requests side by side; `flask, one per core` is as many processes, one thread each.

Clients run in another process and share the cores with the servers, so what a server costs shows. The last line is
JSON.
"""

import argparse
import dataclasses
import io
import json
import os
import pickle
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
from flask import Flask, request
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks._harness import document, finish, target
from benchmarks.bench_qalign import MEDIUM, TINY, random_model
from iqareward.images import to_images
from iqareward.rewards.batching import MicroBatched
from iqareward.rewards.owl2.rewards import QAlignReward
from iqareward.serving.client import RemoteReward
from iqareward.types import Images, Reward, Scores

# `wide` has few tokens and large matrices: an image alone waits for the weights to be read; a batch reads them once.
# So does a 7B on a GPU. `medium` has the tokens of the real network; one image is enough work for a CPU.
CONFIGS = {
    "wide": dataclasses.replace(
        MEDIUM, hidden=2048, ffn=5504, heads=16, kv_heads=16, layers=4, num_queries=1, image_size=56, vision_layers=2
    ),
    "medium": MEDIUM,
    "tiny": dataclasses.replace(TINY, image_size=56, num_queries=4),
}
PICTURES = 64


def pictures(side: int) -> Tensor:
    """`[PICTURES, 3, side, side]` in [0, 1], multiples of 1/255: smooth with grain, which no codec can make vanish."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(PICTURES, 3, 16, 16, generator=rng)
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return ((smooth + 0.03 * torch.randn(smooth.shape, generator=rng)).clamp(0, 1) * 255).floor() / 255


class Judge:
    """Scores with a network of one of `CONFIGS`, on so many threads, in whichever process it is called."""

    name, bounds = "judge", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, config: str, threads: int, batch_size: int) -> None:
        self.config, self.threads, self.batch_size = config, threads, batch_size
        self._reward: QAlignReward | None = None

    def __call__(
        self, images: Images, references: Any = None, prompts: Sequence[str] | None = None, **ignored: Any
    ) -> Scores:
        """Build at the first call, then score."""
        if self._reward is None:
            torch.set_num_threads(self.threads)
            model = random_model(CONFIGS[self.config], torch.device("cpu"), torch.float32)
            self._reward = QAlignReward(model, batch_size=self.batch_size)
        return self._reward(images)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reward": None}


class Idle:
    """A reward that does nothing."""

    name, bounds = "judge", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __call__(
        self, images: Images, references: Any = None, prompts: Sequence[str] | None = None, **ignored: Any
    ) -> Scores:
        """Zeros."""
        return torch.zeros(len(images))


def score_batches(judge: Judge, images: Tensor, seconds: float) -> dict[str, Any]:
    """One whole batch after the other."""
    start, count = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        judge(images)
        count += len(images)
    return {"images": count, "seconds": time.perf_counter() - start, "latencies": []}


def judge_role(config: str, threads: int, batch: int, seconds: float, side: int) -> None:
    """Another process: warm up, wait for a line, score batches, print a line of JSON."""
    judge, images = Judge(config, threads, batch), pictures(side)[:batch]
    judge(images)
    print("ready", flush=True)
    input()
    print(json.dumps(score_batches(judge, images, seconds)), flush=True)


def flask_client(url: str) -> Callable[[Tensor], float]:
    """What flow_grpo's client does with an image: 8 bits, JPEG with Pillow's defaults, pickled there and back."""
    client = httpx2.Client(timeout=600)

    def score(image: Tensor) -> float:
        stream = io.BytesIO()
        levels = (image * 255).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
        Image.fromarray(np.ascontiguousarray(levels.numpy())).save(stream, format="JPEG")
        response = client.post(url, content=pickle.dumps({"images": [stream.getvalue()]}))
        return pickle.loads(response.content)["outputs"][0]

    return score


def our_client(remote: RemoteReward) -> Callable[[Tensor], float]:
    """The same image through `RemoteReward`, its pixels as they are."""
    return lambda image: remote(image[None]).item()


def load(
    clients: Sequence[Callable[[Tensor], float]], images: Tensor, seconds: float, warm_up: float
) -> tuple[list[float], float]:
    """Every client in a thread of its own, until the time is over; latencies of what is answered after the warm-up.

    The clients go on asking for a moment after the end, so that what is counted was answered under full load: with
    batches that take seconds, a count until the last answer would mostly measure how a server runs empty.

    Args:
        clients: score one image.
        images: dealt out in turn.
        seconds: that are counted.
        warm_up: seconds before them.

    Returns:
        Milliseconds per answer, and the seconds that were counted.
    """
    latencies: list[float] = []
    start = time.perf_counter() + warm_up
    stopped = threading.Event()

    def work(client: Callable[[Tensor], float], turn: int) -> None:
        while not stopped.is_set():
            asked = time.perf_counter()
            client(images[turn % len(images)])
            answered = time.perf_counter()
            if start <= answered < start + seconds:
                latencies.append(1e3 * (answered - asked))
            turn += 1

    threads = [threading.Thread(target=work, args=(client, index)) for index, client in enumerate(clients)]
    for thread in threads:
        thread.start()
    time.sleep(warm_up + seconds)
    stopped.set()
    for thread in threads:
        thread.join()
    return latencies, seconds


def clients_role(kind: str, urls: list[str], concurrency: int, seconds: float, warm_up: float, side: int) -> None:
    """Another process: threads that score one image at a time; prints a line of JSON.

    The line has the images answered, the seconds, the processor time with the warm-up, and latencies in milliseconds.
    """
    torch.set_num_threads(1)
    if kind == "flask":
        clients = [flask_client(urls[turn % len(urls)]) for turn in range(concurrency)]
    else:
        remote = RemoteReward(urls, "judge", max_in_flight=concurrency, timeout=600)
        clients = [our_client(remote)] * concurrency
    before = time.process_time()
    latencies, seconds = load(clients, pictures(side), seconds, warm_up)
    found = {"images": len(latencies), "seconds": seconds, "cpu_seconds": time.process_time() - before}
    print(json.dumps(found | {"latencies": latencies}), flush=True)


def flask_role(port: int, config: str, threads: int, threaded: bool) -> None:
    """Another process: the server that RL code bases have today. Flask takes a pickle of JPEG files.

    It takes one request at a time, as a synchronous gunicorn worker does; with `threaded` every request has a thread of
    its own, as in `app.run()`.
    """

    judge = Judge(config, threads, 32)
    judge(to_images(Image.new("RGB", (64, 64))))
    app = Flask(__name__)

    @app.post("/")
    def score() -> bytes:
        files = pickle.loads(request.get_data())["images"]  # the hole this benchmark is about: for our own client only
        return pickle.dumps({"outputs": judge(to_images([Image.open(io.BytesIO(file)) for file in files])).tolist()})

    app.run(host="127.0.0.1", port=port, threaded=threaded)


ROLES = {"judge": judge_role, "clients": clients_role, "flask": flask_role}


def role_command(role: str, **options: Any) -> list[str]:
    """The command of another process, for `main`."""
    return [sys.executable, "-m", "benchmarks.bench_serving", "--role", role, json.dumps(options)]


BATCH, THREADS = 32, 8


def free_port() -> int:
    """A port that is not in use."""
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
        yield f"http://127.0.0.1:{port}", serve.get_deployment_handle("reward-judge", APP_NAME)


@contextmanager
def flask_server(config: str, threads: int, threaded: bool = False) -> Iterator[str]:
    """The address of the Flask server, in a process of its own."""
    port = free_port()
    command = role_command("flask", port=port, config=config, threads=threads, threaded=threaded)
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
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
    warm_up = seconds / 2 if warm_up is None else warm_up
    command = role_command(
        "clients", kind=kind, urls=list(urls), concurrency=concurrency, seconds=seconds, warm_up=warm_up, side=side
    )
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def in_process(judge: Judge, seconds: float, side: int, batch: int) -> dict[str, Any]:
    """Whole batches, one after the other."""
    images = pictures(side)[:batch]
    judge(images)
    return score_batches(judge, images, seconds)


def one_per_core(config: str, seconds: float, side: int, batch: int, cores: int) -> dict[str, Any]:
    """Whole batches in as many processes as cores, which start at once."""
    command = role_command("judge", config=config, threads=1, batch=batch, seconds=seconds, side=side)
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
    flasks = {"flask": [(cores,)], "flask, threaded": [(cores, True)], "flask, one per core": [(1,)] * cores}
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
    parser.add_argument("--side", type=int, default=512, help="side of the square images")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=8, help="per arm and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="cores to use")
    parser.add_argument("--quick", action="store_true", help="tiny network, small images, one round of a second")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        role, arguments = options.role
        ROLES[role](**json.loads(arguments))
        return
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
