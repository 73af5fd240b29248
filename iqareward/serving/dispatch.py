"""From a decoded request to its answer: which rewards, in which pieces, and what is an error before scoring."""

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from iqareward.rewards.calls import Call
from iqareward.serving.errors import ServiceError
from iqareward.serving.memory import Room
from iqareward.serving.wire import ScoreAnswer, ScoreRequest
from iqareward.types import Bounds, Reward, Scores

T = TypeVar("T")

# Of images and references in one call of a process, and in all calls of a request that are under way: a call is copied
# three times between Ray and gRPC.
MAX_CALL_BYTES, MAX_SENT_BYTES = 64 * 2**20, 128 * 2**20


@dataclass(frozen=True)
class Scored:
    """Scores of a call `[b]`, and those of the parts of a weighted sum."""

    scores: Scores
    components: dict[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class Facts:
    """What a client must know of a reward."""

    reward: str
    needs_references: bool
    needs_prompts: bool
    bounds: Bounds

    @classmethod
    def of(cls, reward: Reward) -> "Facts":
        """The facts of a reward object."""
        return cls(reward.name, reward.needs_references, reward.needs_prompts, reward.bounds)


@dataclass(frozen=True)
class Served:
    """A reward as the front of the server sees it.

    Args:
        facts: of the reward.
        score: sends a call to a process that holds the reward; raises `ServiceError`.
        rest: puts every process of the reward to sleep, or wakes it; raises `ServiceError`.
        max_images: of one call; longer requests, and those above `MAX_CALL_BYTES`, are split, and the pieces may be
            scored by different processes.
    """

    facts: Facts
    score: Callable[[Call], Awaitable[Scored]]
    rest: Callable[[bool], Awaitable[None]]
    max_images: int = 32


@dataclass(frozen=True)
class Service:
    """Everything behind the HTTP routes.

    Args:
        rewards: by the name that clients use.
        health: reward -> `"ok"`, `"asleep"`, or what is wrong with it.
        asleep: the rewards that sleep.
        metrics: figures in Prometheus's text format.
    """

    rewards: Mapping[str, Served]
    health: Callable[[], Awaitable[dict[str, str]]]
    asleep: Callable[[], Awaitable[set[str]]]
    metrics: Callable[[], Awaitable[str]]

    async def describe(self) -> dict[str, dict[str, Any]]:
        """The facts of every reward and whether it sleeps, as JSON."""
        asleep = await self.asleep()
        return {name: asdict(served.facts) | {"asleep": name in asleep} for name, served in self.rewards.items()}


@asynccontextmanager
async def time_limit(seconds: float) -> AsyncGenerator[asyncio.Timeout]:
    """A deadline that answers 504; the work behind it is cancelled."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield timeout
    except TimeoutError:
        raise ServiceError(
            504, "deadline_exceeded", "no answer within the deadline; send fewer images or allow more time."
        ) from None


def chosen(service: Service, request: ScoreRequest) -> dict[str, Served]:
    """The rewards that a request names, if they have what they need.

    Raises:
        ServiceError: an unknown reward, or missing references or prompts.
    """
    return {name: _checked(service, name, request) for name in request.rewards}


async def answer(rewards: Mapping[str, Served], request: ScoreRequest) -> ScoreAnswer:
    """Score a request with every reward that was `chosen`, all at once.

    Raises:
        ServiceError: a reward failed; then nothing is answered in part.
    """
    started = time.perf_counter()
    room = Room(MAX_SENT_BYTES)
    results = await together([_score(served, request, room) for served in rewards.values()])
    return ScoreAnswer(
        scores={name: result.scores for name, result in zip(rewards, results, strict=True)},
        components={
            name: result.components for name, result in zip(rewards, results, strict=True) if result.components
        },
        timings={"score": time.perf_counter() - started},
    )


def _checked(service: Service, name: str, request: ScoreRequest) -> Served:
    """The reward of that name, if it has what it needs."""
    served = service.rewards.get(name)
    if served is None:
        raise unknown_reward(name, service)
    if served.facts.needs_references and request.references is None:
        raise ServiceError(422, "missing_references", f"{name} compares with references; send `references`.")
    if served.facts.needs_prompts and request.prompts is None:
        raise ServiceError(422, "missing_prompts", f"{name} reads prompts; send `prompts`, one per image.")
    return served


def unknown_reward(name: str | None, service: Service) -> ServiceError:
    """The error for a name that is not served."""
    return ServiceError(404, "unknown_reward", f"expected one of {sorted(service.rewards)}, got {name!r:.100}.")


async def _score(served: Served, request: ScoreRequest, room: Room) -> Scored:
    """One reward's scores of all images, in order; what it does not look at is not sent to it."""
    references = request.references if served.facts.needs_references else None
    prompts = request.prompts if served.facts.needs_prompts else None
    pieces = list(Call(request.images, references, prompts=prompts).pieces(served.max_images, MAX_CALL_BYTES))
    starts = list(itertools.accumulate((len(piece) for piece in pieces[:-1]), initial=0))
    results = await together([_score_piece(served, *pair, room) for pair in zip(pieces, starts, strict=True)])
    if len(results) == 1:
        return results[0]
    return Scored(
        torch.cat([result.scores for result in results]),
        {part: torch.cat([result.components[part] for result in results]) for part in results[0].components},
    )


async def _score_piece(served: Served, piece: Call, start: int, room: Room) -> Scored:
    try:
        async with room.taken(piece.nbytes):
            result = await served.score(piece)
    except ServiceError as error:
        if error.index is not None:
            error.index += start
        raise
    _check_shape(result.scores, piece)
    return result


def _check_shape(scores: Tensor, piece: Call) -> None:
    if scores.shape != (len(piece),):
        raise ServiceError(
            500, "reward_failed", f"the reward gave {list(scores.shape)} scores for {len(piece)} images."
        )


async def together(coroutines: list[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, or the first error as it was raised, with the others cancelled."""
    if len(coroutines) == 1:
        return [await coroutines[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except* Exception as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
