"""The Ray Serve application: one deployment per reward, and in front of them one that speaks HTTP."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from iqareward.optional import require
from iqareward.rewards.catalog import load
from iqareward.serving.app import build_app
from iqareward.serving.backend import (
    MAX_MESSAGE_BYTES,
    MESSAGE_LIMIT_VARIABLE,
    RayBackend,
    asleep_rewards,
    deployment_health,
    node_metrics,
)
from iqareward.serving.batch_metrics import BatchMetrics
from iqareward.serving.dispatch import Facts, Served, Service
from iqareward.serving.http_client import token_in
from iqareward.serving.listener import Address, Listener
from iqareward.serving.pictures import FLOAT_BYTES
from iqareward.serving.replica import RewardReplica
from iqareward.serving.settings import Settings
from iqareward.serving.sleeping import is_asleep
from iqareward.serving.wire import Limits
from iqareward.types import Reward

APP_NAME = "iqareward"
MAX_QUEUED = 1024  # calls of a reward that wait in one front process; further ones are answered with 429
QUIET = {"enable_access_log": False}  # a line for every image; /metrics counts them
BUILD_ATTEMPTS = 2  # of a process; weights that cannot be loaded twice are not there


@dataclass(frozen=True)
class Deployment:
    """How each reward runs.

    Args:
        replicas: processes of each reward; `"auto"` = as many as the queue asks for, up to `max_replicas`.
        max_replicas: of each reward; a cluster that grows by itself may have room for them later.
        num_gpus: GPUs of a process; a fraction lets several share one, 0 = CPU.
        num_cpus: CPUs of a process, and its threads.
        max_batch: images per call of a reward.
        max_wait_ms: how long a free process waits for more requests, or a fifth of its last batch's time if longer.
        front_replicas: processes that speak HTTP; `"auto"` = one for every 8 cores of a machine, or on a cluster as
            many as requests ask for; up to 8.
        token_env: environment variable, where the front runs, that holds the token; None = no token.
    """

    replicas: int | Literal["auto"] = "auto"
    max_replicas: int = 8
    num_gpus: float = 0.0
    num_cpus: float = 1.0
    max_batch: int = 32
    max_wait_ms: float = 5.0
    front_replicas: int | Literal["auto"] = "auto"
    token_env: str | None = None


def load_rewards(specs: Sequence[str], num_gpus: float) -> dict[str, Reward]:
    """Rewards by the names that clients will use: what was typed. Weights are loaded later, where they are needed."""
    if not specs or len(set(specs)) < len(specs):
        raise ValueError(f"expected one or more rewards, each once, got {list(specs)}.")
    return {spec: load(spec, device="cuda" if num_gpus > 0 else "cpu") for spec in specs}


def application(
    rewards: Mapping[str, Reward], deployment: Deployment, settings: Settings, *, address: Address | None = None
) -> Any:
    """The application, ready for `ray.serve.run(..., name="iqareward")`.

    Args:
        rewards: by the name that clients use; picklable, not differentiable.
        deployment: how each of them runs.
        settings: limits and deadline; its token is read from `deployment.token_env` where the front runs, so that it
            is in no message between processes.
        address: where the front listens; None = it does not, and gets its requests from Ray's proxies.
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
    if unserved := [name for name, reward in rewards.items() if getattr(reward, "needs_inputs", False)]:
        raise ValueError(f"application expected rewards that need no `inputs`, which do not travel, got {unserved}.")
    names = {name: f"reward-{index}-{_slug(name)}" for index, name in enumerate(rewards)}
    parts = [_part(serve, names[name], reward, deployment) for name, reward in rewards.items()]
    facts = {name: Facts.of(reward) for name, reward in rewards.items()}

    def build() -> Any:  # a function, not a partial: that is what Ray Serve takes for a builder
        return front(names, facts, deployment, settings)

    options = {
        "name": "front",
        "ray_actor_options": {"num_cpus": 0},
        "logging_config": QUIET,
        "health_check_period_s": 2,  # nobody is served while a lone front is gone
    }
    if address is not None:
        return (
            serve.deployment(Listener).options(**options, num_replicas=address.processes).bind(build, address, *parts)
        )
    scaling = _scaling(deployment.front_replicas, target=64, most=8)
    ingress = serve.deployment(serve.ingress(build)()).options(
        **options, **scaling, max_ongoing_requests=settings.max_inflight_requests
    )
    return ingress.bind(*parts)


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
        max_queued_requests=MAX_QUEUED,
        max_constructor_retry_count=BUILD_ATTEMPTS,
        health_check_period_s=5,
        health_check_timeout_s=30,
        logging_config=QUIET,
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


def front(names: Mapping[str, str], facts: Mapping[str, Facts], deployment: Deployment, settings: Settings) -> Any:
    """The ASGI application of a front process; called where it runs."""
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
    service = Service(
        rewards=rewards,
        health=partial(deployment_health, APP_NAME, dict(names)),
        asleep=partial(asleep_rewards, dict(names)),
        metrics=node_metrics,
    )
    return build_app(service, replace(settings, token=token))


def from_config(arguments: dict[str, Any]) -> Any:
    """The application from the `args` of a Serve config file, such as KubeRay's `serveConfigV2`.

    Args:
        arguments: `rewards`, a list of names; optionally `deployment`, `settings` and `limits`, the arguments of
            `Deployment`, `Settings` and `Limits`.
    """
    unknown = set(arguments) - {"rewards", "deployment", "settings", "limits"}
    if unknown:
        raise ValueError(
            f"expected the arguments rewards, deployment, settings and limits, got also {sorted(unknown)}."
        )
    deployment = Deployment(**arguments.get("deployment", {}))
    settings = Settings(**arguments.get("settings", {}), limits=Limits(**arguments.get("limits", {})))
    return application(load_rewards(arguments["rewards"], deployment.num_gpus), deployment, settings)


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


def _slug(name: str) -> str:
    """A name as deployments may have it."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:40]
