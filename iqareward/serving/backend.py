"""What the front of the server reaches on Ray: the processes of a reward, their health, and the figures of a node."""

import asyncio
from typing import Any, final

from iqareward.optional import require
from iqareward.rewards.calls import Call
from iqareward.serving.dispatch import Scored
from iqareward.serving.errors import ServiceError
from iqareward.serving.replica import Failed, Rows, pack, unpack
from iqareward.serving.sleeping import is_asleep, set_asleep

# A process that dies takes the calls that it had with it. Scoring changes nothing, so they are made again elsewhere,
# but not for ever: input that kills processes must not kill them all.
ATTEMPTS = 3
PAUSE = 0.2  # seconds before the next attempt, doubled each time
RETRY_AFTER = 2  # seconds, for clients

MESSAGE_LIMIT_VARIABLE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
MAX_MESSAGE_BYTES = 2**31 - 1  # of gRPC; Ray's own default is 4 MiB


@final
class RayBackend:
    """Sends calls to whichever process of a deployment has room.

    Args:
        handle: of the deployment of `RewardReplica`.
        deployment: its name.
    """

    def __init__(self, handle: Any, deployment: str) -> None:
        self._handle, self._deployment = handle, deployment
        self._grpc = require("grpc", extra="serve", purpose="the reward server")
        self._ray = require("ray.exceptions", extra="serve", purpose="the reward server")
        self._serve = require("ray.serve.exceptions", extra="serve", purpose="the reward server")

    async def __call__(self, call: Call) -> Scored:
        """Scores of the call.

        Raises:
            ServiceError: the reward failed, its queue is full (429), no process of it answers (503), or the call is
                larger than a message between processes may be (413).
        """
        arguments = pack(call)
        why = ""
        for attempt in range(ATTEMPTS):
            try:
                result = await self._once(arguments)
            except self._serve.BackPressureError:
                raise ServiceError(429, "overloaded", "the queue is full.", retry_after=RETRY_AFTER) from None
            except self._serve.RayServeException as error:
                raise _unavailable(f"{type(error).__name__}") from error
            except self._ray.RayTaskError:
                raise  # the code of the process raised, and would again
            except self._ray.RayError as error:
                why = type(error).__name__
            except self._grpc.RpcError as error:
                if error.code() == self._grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise _too_large(call) from error
                why = f"gRPC {error.code().name}"
            else:
                if isinstance(result, Failed):
                    raise ServiceError(result.status, result.code, result.message)
                return unpack(result)
            await asyncio.sleep(PAUSE * 2**attempt)
        raise _unavailable(f"the processes of the reward were lost {ATTEMPTS} times ({why})")

    async def rest(self, asleep: bool) -> None:
        """Put every process of the deployment to sleep, or wake it, after the calls that came before.

        Raises:
            ServiceError: 503, a process could not be told, or has no room on its device. It tries again by itself, and
                the same request says later whether it has succeeded.
        """
        await asyncio.to_thread(set_asleep, self._deployment, asleep)
        try:
            results = await self._handle.broadcast("settle").results_async()
        except self._ray.RayTaskError:
            raise
        except (self._serve.RayServeException, self._ray.RayError, self._grpc.RpcError) as error:
            raise _unavailable(f"not every process could be told ({type(error).__name__})") from error
        for failed in filter(None, results):
            raise ServiceError(failed.status, failed.code, failed.message, retry_after=RETRY_AFTER)

    async def _once(self, arguments: tuple[Any, ...]) -> Rows | Failed:
        response = self._handle.score.remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()  # the images leave the queue there
            raise


def _too_large(call: Call) -> ServiceError:
    return ServiceError(
        413,
        "message_too_large",
        f"a call of {call.nbytes} bytes is larger than the gRPC messages that Ray takes here; set "
        f"{MESSAGE_LIMIT_VARIABLE} in the environment of Ray.",
    )


def _unavailable(reason: str) -> ServiceError:
    return ServiceError(503, "unavailable", f"{reason}; retry.", retry_after=RETRY_AFTER)


async def deployment_health(app_name: str, deployments: dict[str, str]) -> dict[str, str]:
    """For each reward `"ok"`, `"asleep"`, or what Ray Serve says of its deployment."""
    serve = require("ray.serve", extra="serve", purpose="the reward server")
    status = await asyncio.to_thread(serve.status)  # asks the controller, and waits
    application = status.applications.get(app_name)
    known = {} if application is None else application.deployments
    states = {}
    for reward, name in deployments.items():
        running = known[name].replica_states.get("RUNNING", 0) if name in known else 0
        states[reward] = "ok" if running else f"no process is running: {known[name].message if name in known else ''}"
    asleep = await asleep_rewards(deployments)
    return {reward: "asleep" if state == "ok" and reward in asleep else state for reward, state in states.items()}


async def asleep_rewards(deployments: dict[str, str]) -> set[str]:
    """Those of the rewards that are to sleep."""
    return await asyncio.to_thread(lambda: {reward for reward, name in deployments.items() if is_asleep(name)})


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
