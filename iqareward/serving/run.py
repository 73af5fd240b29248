"""Build the Ray Serve application of the reward server, start it here or on a running cluster, and stop it again."""

import os
import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Literal

import pydantic
from pydantic.dataclasses import dataclass
from starlette.types import ASGIApp

from iqareward.optional import require
from iqareward.rewards.catalog import load, text_of
from iqareward.rewards.specs import Spec
from iqareward.serving.app import build_app
from iqareward.serving.backend import (
    MAX_MESSAGE_BYTES,
    MESSAGE_LIMIT_VARIABLE,
    RayBackend,
    Served,
    ServedFacts,
    Service,
    asleep_rewards,
    deployment_health,
    facts_of,
    is_asleep,
    node_metrics,
    wake_all,
)
from iqareward.serving.client import token_in
from iqareward.serving.listener import Address, Listener
from iqareward.serving.replica import BatchMetrics, RewardReplica
from iqareward.serving.requests import FLOAT_BYTES, Settings
from iqareward.types import Reward

APP_NAME = "iqareward"
_MAX_QUEUED = 1024  # calls of a reward that wait in one HTTP process; further ones are answered with 429
_QUIET = {"enable_access_log": False}  # a line for every image; /metrics counts them
_BUILD_ATTEMPTS = 2  # of a process; weights that cannot be loaded twice are not there
_CORES_PER_FRONT, _MOST_FRONTS = 8, 8
_PROXY_GRACE = 10.0  # seconds by which Ray's proxy outwaits our own deadline, whose answer says more
START_TIMEOUT = 1800.0  # seconds for all processes to start; 16 GB of weights may have to be downloaded first
_UNPLACED = "to be scheduled"  # Ray Serve says so of processes that have found no node for half a minute
_SILENT_SECONDS = 5.0  # before it is told what is waited for

# For the processes of a Ray of our own, where the variables are not set.
_ENVIRONMENT = {
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


@dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))
class Deployment:
    """How each reward runs.

    Args:
        replicas: processes of each reward; `"auto"` = as many as the queue asks for, up to `max_replicas`.
        max_replicas: most processes of each reward; a cluster that grows by itself may have room for them later.
        num_gpus: GPUs of a process; a fraction lets several share one, 0 = CPU.
        num_cpus: CPUs of a process, and its threads.
        max_batch: images per call of a reward.
        max_wait_ms: how long a free process waits for more requests, or a fifth of its last batch's time if longer.
        front_replicas: processes that speak HTTP; `"auto"` = one for every 8 cores of a machine, or on a cluster as
            many as requests ask for; up to 8.
        token_env: environment variable, where the HTTP processes run, that holds the token; None = no token.
    """

    replicas: pydantic.PositiveInt | Literal["auto"] = "auto"
    max_replicas: pydantic.PositiveInt = 8
    num_gpus: pydantic.NonNegativeFloat = 0.0
    num_cpus: pydantic.NonNegativeFloat = 1.0
    max_batch: pydantic.PositiveInt = 32
    max_wait_ms: pydantic.NonNegativeFloat = 5.0
    front_replicas: pydantic.PositiveInt | Literal["auto"] = "auto"
    token_env: str | None = None


class Config(pydantic.BaseModel):
    """The `args` of a Serve config file, such as KubeRay's `serveConfigV2`."""

    model_config = pydantic.ConfigDict(extra="forbid")

    rewards: Annotated[list[str | dict[str, Any]] | dict[str, str | dict[str, Any]], pydantic.Field(min_length=1)]
    deployment: Deployment = Deployment()
    settings: Settings = Settings()


def load_rewards(specs: Sequence[Spec] | Mapping[str, Spec], num_gpus: float) -> dict[str, Reward]:
    """Rewards by the names that clients will use: those of a mapping, or what was typed, options included.

    Clients choose among these names and can name no options. Weights are loaded later, where they are needed.
    """
    names = list(specs) if isinstance(specs, Mapping) else [text_of(spec) for spec in specs]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected one or more rewards, each once, got {names}.")
    device = "cuda" if num_gpus > 0 else "cpu"
    wanted = specs.values() if isinstance(specs, Mapping) else specs
    return {name: load(spec, device=device) for name, spec in zip(names, wanted, strict=True)}


def from_config(arguments: dict[str, Any]) -> Any:
    """The application from the arguments of a Serve config file: `rewards`, `deployment` and `settings`."""
    config = Config.model_validate(arguments)
    return application(load_rewards(config.rewards, config.deployment.num_gpus), config.deployment, config.settings)


def application(
    rewards: Mapping[str, Reward], deployment: Deployment, settings: Settings, *, address: Address | None = None
) -> Any:
    """The application, ready for `ray.serve.run(..., name="iqareward")`: one deployment per reward, and one for HTTP.

    Rewards have the names that clients use. Without an address, requests come from Ray's proxies. The token is read
    where the HTTP processes run, so that it is in no message between processes.
    """
    serve = require("ray.serve", extra="serve", purpose="the reward server")
    limits = settings.limits
    if min(limits.max_bytes, 2 * FLOAT_BYTES * limits.max_pixels) > MAX_MESSAGE_BYTES - 2**20:
        raise ValueError(
            f"expected limits with which an image and its reference fit into a message of {MAX_MESSAGE_BYTES} bytes, "
            f"got {limits}. Lower `max_bytes` or `max_pixels`."
        )
    if settings.token is not None:
        raise ValueError("application expected the token in an environment variable: Deployment(token_env=...).")
    names = part_names(rewards)
    parts = [_part(serve, names[name], reward, deployment) for name, reward in rewards.items()]
    facts = {name: facts_of(reward) for name, reward in rewards.items()}

    def build() -> Any:  # a function, not a partial: that is what Ray Serve takes for a builder
        return front(names, facts, deployment, settings)

    options = {
        "name": "front",
        "ray_actor_options": {"num_cpus": 0},
        "logging_config": _QUIET,
        "health_check_period_s": 2,  # nobody is served while a lone front is gone
    }
    if address is not None:
        listener = serve.deployment(Listener).options(**options, num_replicas=address.processes)
        return listener.bind(build, address, *parts)
    ingress = serve.deployment(serve.ingress(build)()).options(
        **options,
        **_scaling(deployment.front_replicas, target=64, most=_MOST_FRONTS),
        max_ongoing_requests=settings.max_inflight_requests,
        max_surge_percent=100,  # in an update new ones start before the old ones stop: they need no room of their own
    )
    return ingress.bind(*parts)


def part_names(rewards: Iterable[str]) -> dict[str, str]:
    """The deployment of each reward: the same in every version of the application, so that Ray Serve updates it."""
    found: dict[str, str] = {}
    for name in rewards:
        part = f"reward-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-')[:40]}"
        while part in found.values():
            part += "-"
        found[name] = part
    return found


def _part(serve: Any, name: str, reward: Reward, deployment: Deployment) -> Any:
    """The deployment of one reward."""
    part = serve.deployment(RewardReplica).options(
        name=name,
        ray_actor_options={
            "num_gpus": deployment.num_gpus,
            "num_cpus": deployment.num_cpus,
            # here and not in the environment of Ray, which on a cluster is not ours to set
            "runtime_env": {"env_vars": {MESSAGE_LIMIT_VARIABLE: str(MAX_MESSAGE_BYTES)}},
        },
        max_ongoing_requests=2 * deployment.max_batch,  # one batch that is scored, one that waits
        max_queued_requests=_MAX_QUEUED,
        max_constructor_retry_count=_BUILD_ATTEMPTS,
        health_check_period_s=5,
        health_check_timeout_s=30,
        logging_config=_QUIET,
        **_scaling(deployment.replicas, target=deployment.max_batch, most=deployment.max_replicas),
    )
    return part.bind(
        reward,
        device="cuda" if deployment.num_gpus > 0 else "cpu",
        max_batch=deployment.max_batch,
        max_wait_ms=deployment.max_wait_ms,
        observer=BatchMetrics,
        told_to_sleep=partial(is_asleep, name),
    )


def _scaling(replicas: int | Literal["auto"], *, target: int, most: int) -> dict[str, Any]:
    """Options of a deployment: so many processes, or as many as keep `target` calls with each."""
    if replicas != "auto":
        return {"num_replicas": replicas}
    return {
        "autoscaling_config": {
            "min_replicas": 1,
            "max_replicas": most,
            "target_ongoing_requests": target,
            "upscale_delay_s": 10,
            "downscale_delay_s": 300,
        }
    }


def front(
    names: Mapping[str, str], facts: Mapping[str, ServedFacts], deployment: Deployment, settings: Settings
) -> ASGIApp:
    """The ASGI application of an HTTP process; called where it runs."""
    serve = require("ray.serve", extra="serve", purpose="the reward server")
    token = None
    if deployment.token_env is not None:
        token = token_in(deployment.token_env)
        if token is None:
            raise RuntimeError(
                f"expected the token in ${deployment.token_env} where the server runs, and it is not set there. "
                "Set it in the environment of Ray itself (of `ray start`, or of the pods)."
            )
    rewards: dict[str, Served] = {}
    for name, part in names.items():
        backend = RayBackend(serve.get_deployment_handle(part, APP_NAME), part)
        rewards[name] = Served(facts[name], backend, backend.rest, deployment.max_batch)
    health, asleep = partial(deployment_health, APP_NAME, names), partial(asleep_rewards, names)
    return build_app(Service(rewards, health, asleep, node_metrics), replace(settings, token=token))


def deploy(
    rewards: Mapping[str, Reward],
    deployment: Deployment,
    settings: Settings,
    *,
    host: str,
    port: int,
    everywhere: bool,
    start_timeout: float = START_TIMEOUT,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Put the rewards on the Ray cluster that this process is connected to; returns when all of them can be scored.

    If `everywhere`, Ray's proxies listen on every node; otherwise our own processes do, on this machine only. `tell`
    is called with what is waited for, when that takes long and whenever it changes.

    Raises:
        RuntimeError: a reward cannot be built, for example because its weights are missing; or not all processes have
            started after `start_timeout` seconds.
        ValueError: one machine, and it has no room for a process of each reward; or Ray Serve runs already, and listens
            elsewhere.
    """
    ray = require("ray", extra="serve", purpose="the reward server")
    serve = require("ray.serve", extra="serve", purpose="the reward server")
    address = None
    if everywhere:
        http = {"host": host, "port": port, "request_timeout_s": settings.deadline + _PROXY_GRACE}
        with suppress(ray.exceptions.RayActorError):  # a proxy that started too slowly: Ray Serve starts another one
            serve.start(proxy_location="EveryNode", http_options=http)
        _check_proxies(http)
    else:
        available = ray.cluster_resources()
        deployment = replace(deployment, max_replicas=most_replicas(len(rewards), deployment, available))
        fronts = deployment.front_replicas
        if fronts == "auto":
            fronts = min(max(int(available.get("CPU", 0)) // _CORES_PER_FRONT, 1), _MOST_FRONTS)
        address = Address(host, port, fronts)
        serve.start(proxy_location="Disabled")
    wake_all()
    built = application(rewards, deployment, settings, address=address)
    target = serve.RunTarget(target=built, name=APP_NAME, route_prefix="/" if address is None else None)
    serve.run_many([target], wait_for_applications_running=False)
    _wait_for_processes(part_names(rewards), deployment, start_timeout, tell)


def _check_proxies(wanted: Mapping[str, Any]) -> None:
    """A ValueError if Ray Serve was started earlier with other options, which it keeps until it is shut down."""
    context = require("ray.serve.context", extra="serve", purpose="the reward server")
    has = context._get_global_client().http_config
    listens = has.location != "Disabled" and (has.host, has.port) == (wanted["host"], wanted["port"])
    if listens and (not has.request_timeout_s or has.request_timeout_s >= wanted["request_timeout_s"]):
        return
    raise ValueError(
        f"Ray Serve runs on this cluster already. Its proxies ({has.location}) listen at {has.host}:{has.port} and end "
        f"requests after {has.request_timeout_s} seconds; expected {wanted['host']}:{wanted['port']} and at least "
        f"{wanted['request_timeout_s']:g} seconds. Pass the same --host and --port and a --deadline that is "
        f"{_PROXY_GRACE:g} seconds shorter, or end Ray Serve with `serve shutdown` first."
    )


def _wait_for_processes(
    parts: Mapping[str, str], deployment: Deployment, start_timeout: float, tell: Callable[[str], None] | None
) -> None:
    """Return when the application runs; a RuntimeError if it fails, or has not started in time."""
    serve = require("ray.serve", extra="serve", purpose="the reward server")
    started, told = time.monotonic(), ""
    while True:
        status = serve.status()
        found, proxies = status.applications[APP_NAME], status.proxies.values()
        if found.status == "RUNNING" and (not proxies or "HEALTHY" in proxies):
            return
        if found.status == "DEPLOY_FAILED":
            raise RuntimeError(f"the rewards could not be started: {found.message}")
        waited = time.monotonic() - started
        missing = _missing(parts, found.deployments, deployment) if waited > min(_SILENT_SECONDS, start_timeout) else ""
        if waited > start_timeout:
            raise RuntimeError(
                f"not all processes have started after {start_timeout:g} seconds: {missing}. They stay deployed and "
                "will start when they can; `serve shutdown` ends them."
            )
        if missing != told and tell is not None:
            tell(missing)
        told = missing
        time.sleep(0.2)


def _missing(parts: Mapping[str, str], deployments: Mapping[str, Any], deployment: Deployment) -> str:
    """Which processes do not run yet, what each of them takes, and what the cluster has."""
    ray = require("ray", extra="serve", purpose="the reward server")
    lacking = []
    for reward, part in parts.items():
        states = deployments[part].replica_states if part in deployments else {}
        starting = sum(count for state, count in states.items() if state not in ("RUNNING", "STOPPING"))
        if starting or not states:
            lacking.append(f"{starting} of {reward} ({states.get('RUNNING', 0)} running)")
    if not lacking:
        return "waiting for the HTTP processes"
    takes = {"GPU": deployment.num_gpus, "CPU": deployment.num_cpus}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    free = ray.available_resources()
    takes = {kind: share for kind, share in takes.items() if share}
    large_enough = sum(all(node.get(kind, 0) >= share for kind, share in takes.items()) for node in nodes)
    if large_enough and all(free.get(kind, 0) >= share for kind, share in takes.items()):
        return f"loading: {', '.join(lacking)}"
    unplaced = any(_UNPLACED in deployments[part].message for part in parts.values() if part in deployments)
    doing = "waiting for room" if unplaced or not large_enough else "loading, or waiting for room"
    return (
        f"{doing}: {', '.join(lacking)}. Each takes {_amounts(takes)} of one "
        f"node; {large_enough} of {len(nodes)} nodes have as much, and "
        f"{_amounts({kind: free.get(kind, 0.0) for kind in takes})} are free in the cluster"
    )


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {kind}" for kind, amount in resources.items()) or "nothing"


def most_replicas(num_rewards: int, deployment: Deployment, available: Mapping[str, float]) -> int:
    """How many processes of each reward a machine has room for; a ValueError if not for those that were asked for."""
    most = deployment.max_replicas
    wanted = num_rewards * (1 if deployment.replicas == "auto" else deployment.replicas)
    for kind, share, option in (("GPU", deployment.num_gpus, "num-gpus"), ("CPU", deployment.num_cpus, "num-cpus")):
        if share <= 0:
            continue
        fits = int(available.get(kind, 0) // share)
        if fits < wanted:
            raise ValueError(
                f"{wanted} processes of {share:g} {kind} each do not fit into {available.get(kind, 0):g} {kind}: "
                f"lower --{option} (a fraction shares one), or serve fewer rewards."
            )
        most = min(most, fits // num_rewards)
    return most


@contextmanager
def local_ray(**options: Any) -> Generator[None]:
    """A Ray of our own for as long as the block runs, started with these options of `ray.init`; nothing is left."""
    ray = require("ray", extra="serve", purpose="the reward server")
    serve = require("ray.serve", extra="serve", purpose="the reward server")
    for variable, value in _ENVIRONMENT.items():
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
