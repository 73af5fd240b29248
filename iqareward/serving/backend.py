"""What the front of the server reaches on Ray: the processes of a reward, their health, and the figures of a node."""

import asyncio
from typing import Any, final

from iqareward.optional import require
from iqareward.rewards.calls import Call
from iqareward.serving.dispatch import Scored
from iqareward.serving.errors import ServiceError
from iqareward.serving.replica import Failed, Rows, pack, unpack

# A process that dies takes the calls that it had with it. Scoring changes nothing, so they are made again elsewhere,
# but not for ever: input that kills processes must not kill them all.
ATTEMPTS = 3
PAUSE = 0.2  # seconds before the next attempt, doubled each time
RETRY_AFTER = 2  # seconds, for clients


@final
class RayBackend:
    """Sends calls to whichever process of a deployment has room.

    Args:
        handle: of the deployment of `RewardReplica`.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        ray = require("ray", extra="serve", purpose="the reward server")
        self._errors = require("ray.serve.exceptions", extra="serve", purpose="the reward server")
        self._lost: tuple[type[Exception], ...] = (ray.exceptions.RayActorError, ray.exceptions.NodeDiedError)

    async def __call__(self, call: Call) -> Scored:
        """Scores of the call.

        Raises:
            ServiceError: the reward failed, its queue is full (429), or no process of it answers (503).
        """
        arguments = pack(call)
        for attempt in range(ATTEMPTS):
            try:
                result = await self._once(arguments)
            except self._errors.BackPressureError:
                raise ServiceError(429, "overloaded", "the queue is full.", retry_after=RETRY_AFTER) from None
            except self._lost:
                await asyncio.sleep(PAUSE * 2**attempt)
                continue
            except (self._errors.DeploymentUnavailableError, self._errors.RequestCancelledError) as error:
                raise _unavailable(f"{type(error).__name__}") from error
            if isinstance(result, Failed):
                raise ServiceError(result.status, result.code, result.message)
            return unpack(result)
        raise _unavailable(f"the processes of the reward died {ATTEMPTS} times")

    async def _once(self, arguments: tuple[Any, ...]) -> Rows | Failed:
        response = self._handle.score.remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # the images leave the queue there
            raise


def _unavailable(reason: str) -> ServiceError:
    return ServiceError(503, "unavailable", f"{reason}; retry.", retry_after=RETRY_AFTER)


async def deployment_health(app_name: str, deployments: dict[str, str]) -> dict[str, str]:
    """For each reward `"ok"`, or what Ray Serve says of its deployment."""
    serve = require("ray.serve", extra="serve", purpose="the reward server")
    status = await asyncio.to_thread(serve.status)  # asks the controller, and waits
    application = status.applications.get(app_name)
    known = {} if application is None else application.deployments
    states = {}
    for reward, name in deployments.items():
        running = known[name].replica_states.get("RUNNING", 0) if name in known else 0
        states[reward] = "ok" if running else f"no process is running: {known[name].message if name in known else ''}"
    return states


async def node_metrics() -> str:
    """The Prometheus figures of the node that this runs on, as Ray's agent there gives them.

    Raises:
        ServiceError: 503, the agent does not answer.
    """
    ray = require("ray", extra="serve", purpose="the reward server")
    httpx2 = require("httpx2", extra="serve", purpose="the reward server")
    here = ray.get_runtime_context().get_node_id()
    nodes = await asyncio.to_thread(ray.nodes)
    node = next(node for node in nodes if node["NodeID"] == here)
    try:
        async with httpx2.AsyncClient(timeout=5, trust_env=False) as client:
            answer = await client.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
            answer.raise_for_status()
    except httpx2.HTTPError as error:
        raise _unavailable(f"Ray's metrics agent does not answer ({type(error).__name__})") from error
    return answer.text
