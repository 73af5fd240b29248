"""From a decoded request to its answer: calls to the processes that hold the rewards, on Ray Serve."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

import pydantic
import torch

from iqareward.optional import require
from iqareward.rewards.calls import Call
from iqareward.serving.client import together
from iqareward.serving.replica import Columns, Failed, Scored, pack
from iqareward.serving.requests import ByteSemaphore, ServiceError
from iqareward.serving.wire import RemoteFacts, ScoreAnswer, ScoreRequest
from iqareward.types import Reward, needs

# Of images, references and inputs in one call of a process, and in all calls of a request that are under way: a call is
# copied three times between Ray and gRPC.
_MAX_CALL_BYTES, _MAX_SENT_BYTES = 64 * 2**20, 128 * 2**20

# A process that dies takes the calls that it had with it. Scoring changes nothing, so they are made again elsewhere,
# but not for ever: input that kills processes must not kill them all.
_ATTEMPTS = 3
PAUSE = 0.2  # seconds before the next attempt, doubled each time
_RETRY_AFTER = 2  # seconds, for clients

MESSAGE_LIMIT_VARIABLE = "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"
MAX_MESSAGE_BYTES = 2**31 - 1  # of gRPC; Ray's own default is 4 MiB

_NAMESPACE, _PREFIX = "iqareward", "asleep:"


@pydantic.dataclasses.dataclass(frozen=True)
class ServedFacts(RemoteFacts):
    """What `/v1/rewards` says of a reward."""

    reward: str = ""
    asleep: bool = False


@dataclass(frozen=True)
class Served:
    """A reward as the HTTP routes see it."""

    facts: ServedFacts
    score: Callable[[Call], Awaitable[Scored]]  # by a process that holds the reward
    rest: Callable[[bool], Awaitable[None]]  # puts every process of the reward to sleep, or wakes it
    max_images: int = 32  # of a call; longer requests are split, and different processes may score the pieces


@dataclass(frozen=True)
class Service:
    """Everything behind the HTTP routes; rewards have the names that clients use."""

    rewards: Mapping[str, Served]
    health: Callable[[], Awaitable[dict[str, str]]]  # "ok", "asleep", or what is wrong
    asleep: Callable[[], Awaitable[set[str]]]
    metrics: Callable[[], Awaitable[str]]  # Prometheus's text format

    def find(self, name: str) -> Served:
        """The reward of that name, or error 404."""
        if name not in self.rewards:
            raise ServiceError(404, "unknown_reward", f"expected one of {sorted(self.rewards)}, got {name!r:.100}.")
        return self.rewards[name]

    async def describe(self) -> dict[str, dict[str, Any]]:
        """The facts of every reward and whether it sleeps, as JSON."""
        asleep = await self.asleep()
        return {name: asdict(served.facts) | {"asleep": name in asleep} for name, served in self.rewards.items()}


def facts_of(reward: Reward) -> ServedFacts:
    """The facts of a reward object."""
    return ServedFacts(**asdict(RemoteFacts.of(reward)), reward=reward.name)


async def answer(service: Service, request: ScoreRequest) -> ScoreAnswer:
    """Score a request with every reward that it names, all at once; nothing is answered in part."""
    started = time.perf_counter()
    chosen = {name: _checked(service, name, request) for name in request.rewards}
    under_way = ByteSemaphore(_MAX_SENT_BYTES)
    results = await together(_score(served, request, under_way) for served in chosen.values())
    scored = dict(zip(chosen, results, strict=True))
    return ScoreAnswer(
        scores={name: result.scores for name, result in scored.items()},
        components={name: result.components for name, result in scored.items() if result.components},
        timings={"score": time.perf_counter() - started},
    )


def _checked(service: Service, name: str, request: ScoreRequest) -> Served:
    served = service.find(name)
    for column in ("references", "inputs", "prompts"):
        if needs(served.facts, column) and getattr(request, column) is None:
            raise ServiceError(422, f"missing_{column}", f"{name} needs {column}; send `{column}`, one per image.")
    return served


async def _score(served: Served, request: ScoreRequest, under_way: ByteSemaphore) -> Scored:
    """One reward's scores of all images, in order; what it does not look at is not sent to it."""
    columns = {
        column: getattr(request, column) if needs(served.facts, column) else None
        for column in ("references", "inputs", "prompts")
    }
    pieces = list(Call(request.images, **columns).pieces(served.max_images, _MAX_CALL_BYTES))
    starts = itertools.accumulate((len(piece) for piece in pieces[:-1]), initial=0)
    results = await together(_score_piece(served, *pair, under_way) for pair in zip(pieces, starts, strict=True))
    if len(results) == 1:
        return results[0]
    return Scored(
        torch.cat([result.scores for result in results]),
        {part: torch.cat([result.components[part] for result in results]) for part in results[0].components},
    )


async def _score_piece(served: Served, piece: Call, start: int, under_way: ByteSemaphore) -> Scored:
    try:
        async with under_way.taken(piece.nbytes):
            return await served.score(piece)
    except ServiceError as error:
        if error.index is not None:
            error.index += start
        raise


@final
class RayBackend:
    """Sends calls to whichever process of a deployment of `RewardReplica` has room."""

    def __init__(self, handle: Any, deployment: str) -> None:
        self._handle, self._deployment = handle, deployment
        self._grpc = require("grpc", extra="serve", purpose="the reward server")
        self._ray = require("ray.exceptions", extra="serve", purpose="the reward server")
        self._serve = require("ray.serve.exceptions", extra="serve", purpose="the reward server")

    async def __call__(self, call: Call) -> Scored:
        """Scores of the call, made again elsewhere if its process dies; every failure is a `ServiceError`."""
        arguments = pack(call)
        why = ""
        for attempt in range(_ATTEMPTS):
            try:
                result = await self._once(arguments)
            except self._serve.BackPressureError:
                raise ServiceError(429, "overloaded", "the queue is full.", retry_after=_RETRY_AFTER) from None
            except self._serve.RayServeException as error:
                raise _unavailable(type(error).__name__) from error
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
                return result.unpacked()
            await asyncio.sleep(PAUSE * 2**attempt)
        raise _unavailable(f"the processes of the reward were lost {_ATTEMPTS} times ({why})")

    async def rest(self, asleep: bool) -> None:
        """Put every process of the deployment to sleep, or wake it, after the calls that came before.

        A process that could not be told, or has no room on its device, is error 503. It tries again by itself, and the
        same request says later whether it has succeeded.
        """
        await asyncio.to_thread(_set_asleep, self._deployment, asleep)
        try:
            results = await self._handle.broadcast("follow").results_async()
        except self._ray.RayTaskError:
            raise
        except (self._serve.RayServeException, self._ray.RayError, self._grpc.RpcError) as error:
            raise _unavailable(f"not every process could be told ({type(error).__name__})") from error
        for failed in filter(None, results):
            raise ServiceError(failed.status, failed.code, failed.message, retry_after=_RETRY_AFTER)

    async def _once(self, arguments: Columns) -> Any:
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
    return ServiceError(503, "unavailable", f"{reason}; retry.", retry_after=_RETRY_AFTER)


def is_asleep(deployment: str) -> bool:
    """Whether the processes of a deployment are to sleep: kept by Ray itself, so that all of them agree."""
    return bool(_store()._internal_kv_get(_PREFIX + deployment, namespace=_NAMESPACE))


def _set_asleep(deployment: str, asleep: bool) -> None:
    """Decide it, for the processes that run and for those that will."""
    if asleep:
        _store()._internal_kv_put(_PREFIX + deployment, "1", namespace=_NAMESPACE)
    else:
        _store()._internal_kv_del(_PREFIX + deployment, namespace=_NAMESPACE)


def wake_all() -> None:
    """Forget what an earlier server on this Ray decided."""
    _store()._internal_kv_del(_PREFIX, del_by_prefix=True, namespace=_NAMESPACE)


def _store() -> Any:
    return require("ray.experimental.internal_kv", extra="serve", purpose="the reward server")


async def deployment_health(app_name: str, deployments: Mapping[str, str]) -> dict[str, str]:
    """For each reward `"ok"`, `"asleep"`, or what Ray Serve says of its deployment."""
    serve = require("ray.serve", extra="serve", purpose="the reward server")
    status = await asyncio.to_thread(serve.status)  # asks the controller, and waits
    application = status.applications.get(app_name)
    known = {} if application is None else application.deployments
    asleep, states = await asleep_rewards(deployments), dict[str, str]()
    for reward, name in deployments.items():
        running = known[name].replica_states.get("RUNNING", 0) if name in known else 0
        states[reward] = "asleep" if reward in asleep else "ok"
        if not running:
            # not Ray's message: it may hold a traceback, and anyone may ask
            states[reward] = f"no process is running: {known[name].status.value if name in known else 'not deployed'}"
    return states


async def asleep_rewards(deployments: Mapping[str, str]) -> set[str]:
    """The rewards that are to sleep."""
    return await asyncio.to_thread(lambda: {reward for reward, name in deployments.items() if is_asleep(name)})


async def node_metrics() -> str:
    """The Prometheus figures of the node that this runs on, as Ray's agent there gives them; error 503 without one."""
    ray = require("ray", extra="serve", purpose="the reward server")
    httpx2 = require("httpx2", extra="serve", purpose="the reward server")
    here = ray.get_runtime_context().get_node_id()
    nodes = await asyncio.to_thread(ray.nodes)
    node = next(node for node in nodes if node["NodeID"] == here)
    try:
        async with httpx2.AsyncClient(timeout=5, trust_env=False) as client:
            found = await client.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
            found.raise_for_status()
    except httpx2.HTTPError as error:
        raise _unavailable(f"Ray's metrics agent does not answer ({type(error).__name__})") from error
    return found.text
