"""Start the server on this machine or on a running Ray cluster, and stop it again."""

import ipaddress
import os
import signal
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from iqareward.optional import require
from iqareward.serving.application import APP_NAME, Deployment, application
from iqareward.serving.listener import Address
from iqareward.serving.settings import Settings
from iqareward.serving.sleeping import wake_all
from iqareward.types import Reward

# For the processes of a Ray of our own, where the variables are not set.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Our code never blocks a loop, so it needs none of its own, and every request saves the way there and back.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # Images that go straight from process to process cost less than through Ray's store of objects.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # at 0.1 the controller takes 4 % of a core
    # Ray gives its workers a niceness of 15: beside a trainer on the same cores they would get 3 % of the time.
    "RAY_worker_niceness": "0",
    # Batches are tensors of 100 MB, which malloc maps anew each time: page faults took 3.7 ms per image of 512x512,
    # with huge pages 0.9.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
CORES_PER_FRONT, MOST_FRONTS = 8, 8
PROXY_GRACE = 10.0  # seconds by which Ray's proxy outwaits our own deadline, whose answer says more


def deploy(
    rewards: Mapping[str, Reward], deployment: Deployment, settings: Settings, *, host: str, port: int, everywhere: bool
) -> None:
    """Put the rewards on the Ray cluster that this process is connected to; returns when all of them can be scored.

    Args:
        rewards: by the name that clients use.
        deployment: how each of them runs.
        settings: what a request may be.
        host: address to listen at.
        port: port to listen at.
        everywhere: a cluster: Ray's proxies listen, on every node. Otherwise the front listens, on this machine only.

    Raises:
        RuntimeError: a reward cannot be built, for example because its weights are missing.
        ValueError: one machine, and it has no room for a process of each reward.
    """
    serve = require("ray.serve", extra="serve", purpose="the reward server")
    address = None
    if everywhere:
        http = {"host": host, "port": port, "request_timeout_s": settings.deadline + PROXY_GRACE}
        serve.start(proxy_location="EveryNode", http_options=http)
    else:
        deployment = replace(deployment, max_replicas=_room(len(rewards), deployment))
        address = Address(host, port, _fronts(deployment))
        serve.start(proxy_location="Disabled")
    wake_all()
    built = application(rewards, deployment, settings, address=address)
    serve.run(built, name=APP_NAME, route_prefix="/" if address is None else None)


def _fronts(deployment: Deployment) -> int:
    """How many processes speak HTTP on this machine."""
    if deployment.front_replicas != "auto":
        return deployment.front_replicas
    ray = require("ray", extra="serve", purpose="the reward server")
    return min(max(int(ray.cluster_resources().get("CPU", 0)) // CORES_PER_FRONT, 1), MOST_FRONTS)


def _room(num_rewards: int, deployment: Deployment) -> int:
    """How many processes of each reward this machine has room for."""
    ray = require("ray", extra="serve", purpose="the reward server")
    here = ray.cluster_resources()
    room = deployment.max_replicas
    for kind, share, option in (("GPU", deployment.num_gpus, "num-gpus"), ("CPU", deployment.num_cpus, "num-cpus")):
        fits = int(here.get(kind, 0) // share) if share > 0 else room * num_rewards
        wanted = num_rewards * (1 if deployment.replicas == "auto" else deployment.replicas)
        if fits < wanted:
            raise ValueError(
                f"{wanted} processes of {share:g} {kind} each do not fit into {here.get(kind, 0):g} {kind}: "
                f"lower --{option} (a fraction shares one), or serve fewer rewards."
            )
        room = min(room, fits // num_rewards)
    return room


@contextmanager
def local_ray(**options: Any) -> Generator[None]:
    """A Ray of our own for as long as the block runs; nothing of it is left behind.

    Args:
        options: of `ray.init`.
    """
    ray = require("ray", extra="serve", purpose="the reward server")
    serve = require("ray.serve", extra="serve", purpose="the reward server")
    for variable, value in ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    ray.init(address="local", include_dashboard=False, **options)  # whatever $RAY_ADDRESS says
    try:
        yield
    finally:
        serve.shutdown()
        ray.shutdown()


@contextmanager
def cluster_ray(address: str) -> Generator[None]:
    """A connection to a Ray cluster that runs on without us."""
    ray = require("ray", extra="serve", purpose="the reward server")
    ray.init(address=address)
    try:
        yield
    finally:
        ray.shutdown()


def wait_for_stop() -> None:
    """Return when this process is asked to end, by Ctrl-C or SIGTERM."""
    stopped = threading.Event()
    before = {kind: signal.signal(kind, lambda *_: stopped.set()) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        stopped.wait()
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
