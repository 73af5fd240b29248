"""Serve rewards over HTTP from the command line."""

import ipaddress
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from rich.console import Console

from iqareward.cli.text import say
from iqareward.optional import require


class Job(NamedTuple):
    """The arguments of `iqareward serve`."""

    rewards: Sequence[str]
    host: str
    port: int
    address: str | None
    replicas: str
    num_gpus: float
    num_cpus: float
    max_batch: int
    max_wait_ms: float
    max_body_mib: int
    max_images: int
    deadline: float
    jpeg: str
    start_timeout: float
    token_env: str


def run(job: Job, messages: Console) -> None:
    """Serve until told to stop; with an address, deploy there and return."""
    require("ray.serve", extra="serve", purpose="iqareward serve")
    from pydantic import ValidationError

    from iqareward.serving.client import token_in
    from iqareward.serving.listener import Address
    from iqareward.serving.requests import Settings
    from iqareward.serving.run import (
        Deployment,
        cluster_ray,
        deploy,
        load_rewards,
        local_ray,
        wait_for_stop,
    )
    from iqareward.serving.wire import Limits, first_error

    secured = token_in(job.token_env) is not None
    try:
        deployment = Deployment(
            replicas=int(job.replicas) if job.replicas.isdecimal() else job.replicas,  # pyright: ignore
            num_gpus=job.num_gpus,
            num_cpus=job.num_cpus,
            max_batch=job.max_batch,
            max_wait_ms=job.max_wait_ms,
            token_env=job.token_env if secured else None,
        )
        limits = Limits(max_bytes=job.max_body_mib * 2**20, max_images=job.max_images)
        settings = Settings(
            limits=limits,
            max_inflight_bytes=max(Settings.max_inflight_bytes, 2 * limits.max_bytes),
            deadline=job.deadline,
            jpeg=job.jpeg,  # pyright: ignore[reportArgumentType]
        )
    except ValidationError as error:
        raise ValueError(f"--{first_error(error)}") from None
    rewards = load_rewards(job.rewards, job.num_gpus)
    address = Address(job.host, job.port)
    if job.address is None:
        address.bind().close()  # a port that is taken is an error before Ray takes its time to start
    for warning in _warnings(job, str(address), secured):
        say(messages, warning, label="warning:", style="yellow")
    with local_ray() if job.address is None else cluster_ray(job.address):
        deploy(
            rewards,
            deployment,
            settings,
            host=job.host,
            port=job.port,
            everywhere=job.address is not None,
            start_timeout=job.start_timeout,
            tell=partial(say, messages),
        )
        say(messages, f"{', '.join(job.rewards)}: http://{address}")
        if job.address is None:
            wait_for_stop()


def _warnings(job: Job, address: str, secured: bool) -> list[str]:
    """What somebody who starts this server should know."""
    if _is_loopback(job.host):
        return []
    found = ["the connection is not encrypted: put a proxy that speaks TLS in front, or use a private network."]
    if not secured:
        found.append(
            f"anyone who can reach {address} can use this server: ${job.token_env} is not set. "
            "Set it to a secret, which clients then send as a bearer token."
        )
    return found


def _is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
