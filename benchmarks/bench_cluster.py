"""The reward server on a Ray cluster of two nodes: what it survives, and how many images it scores per second.

    python -m benchmarks.bench_cluster            # twenty minutes on 2 cores; the figures of the docs
    python -m benchmarks.bench_cluster --quick    # smoke run, three minutes

Both nodes run on this machine, made by Ray's own test cluster: with raylets, proxies and processes of their own, and
GPUs that Ray counts but that do not exist. `failures` are rows of what clients sent and got while something was done to
the cluster; `throughput` are rows of images per second. The last line is JSON.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks._harness import document, finish, target
from benchmarks.bench_serving import free_port, load, pictures
from iqareward.rewards.catalog import load as load_reward
from iqareward.serving.client import RemoteError, RemoteFacts, RemoteReward
from iqareward.serving.replica import RewardReplica
from iqareward.types import Images, Reward, Scores

PARTS = ["failures", "ssim", "double"]
SIDE = 8  # of the images whose answers are counted
NODE = {"num_cpus": 2, "num_gpus": 1, "object_store_memory": 100 * 2**20}
FACTS = {
    "double": RemoteFacts(False, False, (None, None)),
    "ssim": RemoteFacts(True, False, (-1.0, 1.0)),
}


class Double:
    """The mean of each image plus `version`, after `seconds` per image that use no processor.

    Each process appends the scores of its batches to a file of its own in `folder`, named by node and process.
    """

    name, bounds = "double", (None, None)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, folder: str = "", *, seconds: float = 0.0, version: int = 0) -> None:
        self.folder, self.seconds, self.version = folder, seconds, version

    def __call__(
        self, images: Images, references: Any = None, prompts: Sequence[str] | None = None, **ignored: Any
    ) -> Scores:
        """Scores `[B]`."""
        scores = torch.stack([image.mean() for image in images]) + self.version
        time.sleep(self.seconds * len(images))
        if images[0].shape[-1] == SIDE:  # neither the image of the warm-up nor those of a throughput
            self._write(*map(str, scores.tolist()))
        return scores

    def offload(self) -> None:
        """Write it down."""
        self._write("offloaded")

    def onload(self) -> None:
        """Write it down."""
        self._write("loaded")

    def _write(self, *lines: str) -> None:
        if self.folder:
            import ray

            node = ray.get_runtime_context().get_node_id()
            with (Path(self.folder) / f"{node}-{os.getpid()}").open("a") as file:
                file.writelines(f"{line}\n" for line in lines)


class WithoutDevice(RewardReplica):  # pyright: ignore[reportGeneralTypeIssues]  # final for users, not for a double
    """The process of a reward, on the CPU although Ray has given it a share of a GPU that does not exist."""

    def __init__(self, reward: Reward, *, device: str, **options: Any) -> None:
        super().__init__(reward, device="cpu", **options)


@contextmanager
def two_nodes(dashboard_port: int | None = None) -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` of a head and a worker, with this process connected to the head."""
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    dashboard = {"include_dashboard": dashboard_port is not None, "dashboard_port": dashboard_port}
    # Ray's own niceness of 15 would leave the server what other processes of the machine do not want
    with patch.dict(os.environ, {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}):
        # its handlers at exit hold clients that crash a forked process of Python 3.13, which drops them
        cluster = Cluster(initialize_head=True, head_node_args=NODE | dashboard, shutdown_at_exit=False)
        try:
            cluster.add_node(**NODE)
            ray.init(address=cluster.address, log_to_driver=False)
            yield cluster
        finally:
            serve.shutdown()
            ray.shutdown()
            cluster.shutdown()


def put(reward: Reward, port: int, options: dict[str, Any] | None = None, **deployment: Any) -> None:
    """Deploy a reward behind the proxies of all nodes, as `iqareward serve --address` does.

    Args:
        reward: the only one of the server.
        port: of the proxies.
        options: further arguments of `deploy`.
        deployment: how the reward runs.
    """
    from iqareward.serving import run
    from iqareward.serving.requests import Settings

    found = run.Deployment(**({"num_cpus": 0.25, "max_batch": 4} | deployment))
    with patch.object(run, "RewardReplica", WithoutDevice):
        run.deploy(
            {reward.name: reward}, found, Settings(), host="127.0.0.1", port=port, everywhere=True, **(options or {})
        )


def running(reward: str = "double") -> int:
    """Processes of a reward that run, as Ray Serve sees them."""
    from ray import serve

    from iqareward.serving.run import APP_NAME, part_names

    part = serve.status().applications[APP_NAME].deployments[part_names([reward])[reward]]
    return part.replica_states.get("RUNNING", 0)


def wait_until(reached: Callable[[], bool], seconds: float = 300.0) -> float:
    """Seconds until it is so; a TimeoutError if it never is."""
    start = time.monotonic()
    while not reached():
        if time.monotonic() > start + seconds:
            raise TimeoutError(f"not reached within {seconds:g} seconds")
        time.sleep(0.1)
    return time.monotonic() - start


class Load:
    """Threads that send one image each, again and again, every image another one, until `stop` is called.

    Args:
        urls: of the server.
        threads: that ask at the same time.
        folder: where the processes of `Double` write what they scored.
        versions: of `Double`, whose answers are right.
    """

    def __init__(self, urls: Sequence[str], threads: int, folder: Path, versions: Sequence[int] = (0,)) -> None:
        self.folder, self.versions = folder, versions
        self.outcomes: Counter[str] = Counter()
        self.longest = 0.0
        self._sent, self._lock, self._stop = itertools.count(), threading.Lock(), threading.Event()
        self._remote = RemoteReward(urls, "double", max_in_flight=threads, timeout=180, facts=FACTS["double"])
        self._before = self._scored()
        self._pool = ThreadPoolExecutor(threads)
        self._work = [self._pool.submit(self._ask) for _ in range(threads)]

    @property
    def answered(self) -> int:
        """Answers so far, right or not."""
        return sum(count for name, count in self.outcomes.items() if name != "sent")

    def wait_for(self, more: int, seconds: float = 300.0) -> float:
        """Wait for so many more answers; the seconds that took."""
        goal = self.answered + more
        return wait_until(lambda: self.answered >= goal, seconds)

    def stop(self) -> dict[str, Any]:
        """End the threads after their last answers, and count.

        Returns:
            Images sent; those that were lost (an error) or got a wrong score; how often an image was scored once more,
            because its first process was gone; the longest wait of a client; right answers by version.
        """
        self._stop.set()
        for thread in self._work:
            thread.result()
        self._remote.close()
        scored = self._scored() - self._before
        sent, right = self.outcomes["sent"], {v: self.outcomes[f"version {v}"] for v in self.versions}
        return {
            "sent": sent,
            "lost": sent - sum(right.values()) - self.outcomes["wrong"],
            "wrong": self.outcomes["wrong"],
            "scored_again": sum(count - 1 for count in scored.values()),
            "longest_wait_s": round(self.longest, 2),
            "by_version": {str(version): count for version, count in right.items()},
            "errors": {name: count for name, count in self.outcomes.items() if name.startswith("error")},
        }

    def _ask(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                number = next(self._sent)
                self.outcomes["sent"] += 1
            value = (number % 2**18 + 1) / 2**19  # the mean of a flat image of it is exact
            image, asked = torch.full((1, 3, SIDE, SIDE), value), time.monotonic()
            try:
                version = self._remote(image).item() - value
                outcome = f"version {int(version)}" if version in self.versions else "wrong"
            except RemoteError as error:
                outcome = f"error {error.status} {error.code}"
            with self._lock:
                self.outcomes[outcome] += 1
                self.longest = max(self.longest, time.monotonic() - asked)

    def _scored(self) -> Counter[str]:
        """How often each score was given, by all processes."""
        return Counter(line for file in self.folder.iterdir() for line in file.read_text().splitlines())


def nodes_in(folder: Path) -> int:
    """On how many nodes processes have scored."""
    return len({file.name.partition("-")[0] for file in folder.iterdir()})


def node_lost(
    cluster: Any, port: int, folder: Path, *, replicas: int = 4, threads: int = 16, images: int = 500
) -> dict[str, Any]:
    """The worker node is killed while clients score through the proxies of both nodes; another one joins later."""
    put(Double(str(folder), seconds=0.005), port, replicas=replicas, front_replicas=2)
    sending = Load([f"http://127.0.0.1:{port}"], threads, folder)
    sending.wait_for(images)
    nodes = nodes_in(folder)
    (worker,) = cluster.worker_nodes
    cluster.remove_node(worker, allow_graceful=False)
    sending.wait_for(images)
    cluster.add_node(**NODE)
    joined = wait_until(lambda: running() == replicas)
    sending.wait_for(images)
    return sending.stop() | {"nodes": nodes, "all_processes_after_s": joined}


def rolling_restart(port: int, folder: Path, *, replicas: int, threads: int = 16, images: int = 500) -> dict[str, Any]:
    """A new version of the reward with another batch size takes the place of the old one while clients score."""
    put(Double(str(folder), seconds=0.005), port, replicas=replicas)
    sending = Load([f"http://127.0.0.1:{port}"], threads, folder, versions=(0, 1))
    sending.wait_for(images)
    start = time.monotonic()
    put(Double(str(folder), seconds=0.005, version=1), port, replicas=replicas, max_batch=8)
    took = time.monotonic() - start
    sending.wait_for(images)
    return sending.stop() | {"replicas": replicas, "restart_s": took}


def sleeping(cluster: Any, port: int, folder: Path) -> dict[str, Any]:
    """A reward sleeps on both nodes, one node is lost and another joins meanwhile, and it is woken."""
    put(Double(str(folder)), port, replicas=2)
    with RemoteReward(f"http://127.0.0.1:{port}", "double", facts=FACTS["double"]) as remote:

        def code(number: int) -> str:
            try:
                return "right" if remote(torch.full((1, 3, SIDE, SIDE), 0.5)).item() == 0.5 else "wrong"
            except RemoteError as error:
                return error.code

        awake = Counter(map(code, range(40)))
        nodes = nodes_in(folder)
        remote.offload()
        asleep = Counter(map(code, range(40)))
        (worker,) = cluster.worker_nodes
        cluster.remove_node(worker, allow_graceful=False)
        wait_until(lambda: running() < 2)
        lost = Counter(map(code, range(40)))
        cluster.add_node(**NODE)
        wait_until(lambda: running() == 2)
        joined = Counter(map(code, range(40)))
        start = time.monotonic()
        remote.onload()
        took, woken = time.monotonic() - start, Counter(map(code, range(40)))
    return {
        "nodes": nodes,
        "awake": awake,
        "asleep": asleep,
        "asleep_node_lost": lost,
        "asleep_process_joined": joined,
        "woken": woken,
        "wake_s": took,
    }


def shared_gpu(port: int, folder: Path) -> dict[str, Any]:
    """Two rewards of half a GPU each on every GPU of two nodes; one process more does not fit, and that is told."""
    put(Double(str(folder)), port, replicas=4, num_gpus=0.5)
    sending = Load([f"http://127.0.0.1:{port}"], 8, folder)
    sending.wait_for(200)
    row, told = sending.stop(), list[str]()
    try:
        options = {"start_timeout": 15.0, "tell": told.append}
        put(Double(str(folder)), port, options, replicas=5, num_gpus=0.5)
    except RuntimeError as error:
        told.append(str(error))
    return row | {"told": told}


def autoscaled(port: int, folder: Path) -> dict[str, Any]:
    """Processes are added while many clients wait, and removed while few do."""
    put(Double(str(folder), seconds=0.02), port, replicas="auto", max_replicas=3)
    sending = Load([f"http://127.0.0.1:{port}"], 32, folder)
    grown = wait_until(lambda: running() == 3)
    many = sending.stop()
    few = Load([f"http://127.0.0.1:{port}"], 1, folder)
    shrunk = wait_until(lambda: running() == 1, 900)
    found = few.stop()
    total = {name: many[name] + found[name] for name in ("sent", "lost", "wrong", "scored_again")}
    return total | {
        "longest_wait_s": max(many["longest_wait_s"], found["longest_wait_s"]),
        "grown_s": grown,
        "shrunk_s": shrunk,
    }


def ask_role(urls: list[str], reward: str, side: int, concurrency: int, batch: int, seconds: float) -> None:
    """Another process: threads that send requests of so many images each; prints the images per second.

    The images are multiples of 1/255, which travel in a byte for each value.
    """
    torch.set_num_threads(1)
    images = pictures(side)[:batch]
    references = images.flip(0) if FACTS[reward].needs_references else None
    remote = RemoteReward(urls, reward, max_in_flight=concurrency, timeout=600, facts=FACTS[reward])
    expected = remote(images, references=references)
    wrong = Counter[bool]()

    def ask(_: Tensor) -> float:
        wrong[not torch.equal(remote(images, references=references), expected)] += 1
        return 0.0

    before = time.process_time()
    latencies, seconds = load([ask] * concurrency, images, seconds, seconds / 2)
    cpu = (time.process_time() - before) / wrong.total()
    found = {
        "images_per_s": batch * len(latencies) / seconds,
        "p50_ms": sorted(latencies)[len(latencies) // 2],
        "wrong": wrong[True],
        "client_cpu_ms_per_image": 1e3 * cpu / batch,
    }
    print(json.dumps(found), flush=True)


def asked(**options: Any) -> dict[str, Any]:
    """What `ask_role` finds, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_cluster", "--role", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def throughput(port: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of images per second, by reward, side, processes and fronts; each is the median of the rounds."""
    kinds = [("ssim", side, 0.0) for side in options.sides] if "ssim" in options.parts else []
    if "double" in options.parts:
        kinds += [("double", options.sides[0], seconds) for seconds in options.costs]
    for name, side, seconds in kinds:
        for replicas, fronts in options.processes:
            reward = load_reward("ssim") if name == "ssim" else Double(seconds=seconds)
            put(reward, port, replicas=replicas, front_replicas=fronts, num_cpus=0.25, max_batch=options.batch)
            ask = partial(
                asked,
                urls=[f"http://127.0.0.1:{port}"],
                reward=name,
                side=side,
                concurrency=options.concurrency,
                batch=options.batch // 4,
                seconds=options.seconds,
            )
            rounds = sorted((ask() for _ in range(options.rounds)), key=lambda found: found["images_per_s"])
            middle = rounds[len(rounds) // 2]
            ideal = replicas / seconds if seconds else None
            yield {
                "reward": f"double, {1e3 * seconds:g} ms per image" if name == "double" else name,
                "side": side,
                "processes": replicas,
                "fronts": fronts,
                **{key: round(value, 2) for key, value in middle.items()},
                "of_ideal": None if ideal is None else round(middle["images_per_s"] / ideal, 3),
            }


def targets(failures: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was promised: nothing lost, nothing wrong."""
    lost = sum(row.get("lost", 0) for row in failures)
    wrong = sum(row.get("wrong", 0) for row in [*failures, *rows])
    return [target("images lost", lost, 0, "lower"), target("wrong scores", wrong, 0, "lower")]


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A table on standard error."""
    if rows:
        table = Table(*rows[0])
        for row in rows:
            table.add_row(*map(str, row.values()))
        Console(stderr=True, width=200).print(table)


def main() -> None:
    """Break things, measure, print tables, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[256, 512])
    parser.add_argument(
        "--costs",
        type=float,
        nargs="+",
        default=[0.02, 0.002],
        help="seconds per image of the double, at the first side",
    )
    parser.add_argument("--batch", type=int, default=32, help="most images in a call; a request has a quarter")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at the same time")
    parser.add_argument("--seconds", type=float, default=3, help="per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="small images, short rounds, no autoscaling down")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--role", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        ask_role(**json.loads(options.role))
        return
    options.processes = [(1, 1), (2, 1), (2, 2)]
    if options.quick:
        options.sides, options.costs, options.processes, options.seconds, options.rounds = (
            [64],
            [0.02],
            [(1, 1)],
            1.0,
            1,
        )
    port, failures, rows = free_port(), list[dict[str, Any]](), list[dict[str, Any]]()
    record: dict[str, Any] = {}
    with two_nodes() as cluster:
        scenarios: dict[str, Callable[[Path], dict[str, Any]]] = {
            "a node is lost under load": partial(node_lost, cluster, port),
            "a new version under load, one process": partial(rolling_restart, port, replicas=1),
            "a new version under load, two processes": partial(rolling_restart, port, replicas=2),
            "two processes on each of two GPUs": partial(shared_gpu, port),
            "sleep, a node is lost, wake": partial(sleeping, cluster, port),
            "autoscaling up and down": partial(autoscaled, port),
        }
        if options.quick:
            del scenarios["autoscaling up and down"]
        if "failures" not in options.parts:
            scenarios.clear()
        work: Iterator[tuple[list[dict[str, Any]], dict[str, Any]]] = itertools.chain(
            ((failures, row) for row in broken(scenarios)),
            ((rows, row) for row in throughput(port, options)),
        )
        for kind, row in work:
            kind.append(row)
            print(row, file=sys.stderr, flush=True)
            record = document("cluster", rows, targets(failures, rows), ["ray", "httpx2"]) | {"failures": failures}
            if options.out is not None:
                options.out.write_text(json.dumps(record, indent=1) + "\n")
    show(rows)
    finish(record | {"cores": os.cpu_count(), "nodes": 2}, options.out)


def broken(scenarios: dict[str, Callable[[Path], dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """What became of the images in each scenario."""
    for name, scenario in scenarios.items():
        with TemporaryDirectory() as folder:
            row = scenario(Path(folder))
        yield {"scenario": name} | {key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()}


if __name__ == "__main__":
    main()
