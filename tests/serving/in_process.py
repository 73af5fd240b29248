"""The server without Ray or sockets: the ASGI application, with rewards in this process."""

import asyncio
import socket
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any

import httpx2
from starlette.types import ASGIApp

from iqareward.rewards.calls import Call
from iqareward.serving.app import build_app
from iqareward.serving.backend import Served, ServedFacts, Service, facts_of
from iqareward.serving.replica import Failed, RewardReplica, Scored, pack
from iqareward.serving.requests import ServiceError, Settings
from iqareward.serving.wire import CONTENT_TYPE
from iqareward.types import Reward

SAFETENSORS = {"content-type": CONTENT_TYPE}
MAX_IMAGES = 4  # per call of a reward, so that small requests are split


class Rest:
    """What tells a reward in this process to sleep."""

    def __init__(self) -> None:
        self.asleep = False
        self.replica: RewardReplica | None = None

    async def __call__(self, asleep: bool) -> None:
        self.asleep = asleep
        failed = None if self.replica is None else await self.replica.follow()
        if failed is not None:
            raise ServiceError(failed.status, failed.code, failed.message)


def served(reward: Reward) -> Served:
    """A reward behind the real process object, called directly."""
    rest = Rest()
    rest.replica = replica = RewardReplica(reward, told_to_sleep=lambda: rest.asleep)

    async def score(call: Call) -> Scored:
        result = await replica.score(*pack(call))
        if isinstance(result, Failed):
            raise ServiceError(result.status, result.code, result.message)
        return result.unpacked()

    return Served(facts_of(reward), score, rest, MAX_IMAGES)


def answering(score: Callable[[Call], Awaitable[Scored]]) -> Served:
    """A reward that answers, or fails, as told."""
    return Served(ServedFacts(False, False, (None, None), reward="told"), score, Rest(), MAX_IMAGES)


def application(rewards: Mapping[str, Served], settings: Settings | None = None, **states: str) -> ASGIApp:
    """The server; `states` are those of its rewards, if not "ok"."""

    async def health() -> dict[str, str]:
        resting = await asleep()
        return {name: states.get(name, "asleep" if name in resting else "ok") for name in rewards}

    async def asleep() -> set[str]:
        return {name for name, reward in rewards.items() if isinstance(reward.rest, Rest) and reward.rest.asleep}

    async def metrics() -> str:
        return "iqareward_images 3\n"

    return build_app(Service(rewards, health, asleep, metrics), settings or Settings())


async def send(app: ASGIApp, method: str, path: str, **options: Any) -> httpx2.Response:
    """One request."""
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://server") as client:
        return await client.request(method, path, **options)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(app: ASGIApp, path: str, **options: Any) -> httpx2.Response:
    """GET, from a test that is not a coroutine."""
    return asyncio.run(send(app, "GET", path, **options))


def post(app: ASGIApp, path: str = "/v1/score", **options: Any) -> httpx2.Response:
    """POST, from a test that is not a coroutine."""
    return asyncio.run(send(app, "POST", path, **options))


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """A coroutine, from a test that is not one."""
    return asyncio.run(work)


def error_of(response: httpx2.Response) -> tuple[int, str]:
    """Status and code of an error, after a look at its form."""
    error = response.json()["error"]
    assert set(error) <= {"code", "message", "index"}
    assert error["message"]
    return response.status_code, error["code"]
