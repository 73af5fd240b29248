"""The HTTP face of the server, without Ray: routes, deadlines, and an error that a program can read for everything."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

import iqareward
from iqareward.serving import openapi
from iqareward.serving.dispatch import Service, answer, chosen, time_limit, unknown_reward
from iqareward.serving.errors import ServiceError, error_response
from iqareward.serving.gate import Gate
from iqareward.serving.legacy import add_legacy_routes
from iqareward.serving.presence import read_body, while_connected
from iqareward.serving.recent import Recent
from iqareward.serving.settings import Settings
from iqareward.serving.uploads import read_form
from iqareward.serving.wire import CONTENT_TYPE, ScoreRequest, WireError, decode_request, encode_answer

# Bytes of a body and of its header: a quarter of a millisecond, about the way to another thread and back.
DECODED_AT_ONCE, HEADER_AT_ONCE = 2**22, 2**14


def build_app(service: Service, settings: Settings) -> ASGIApp:
    """The server as an ASGI application.

    Args:
        service: the rewards behind it.
        settings: limits, deadline, token.
    """
    health, asleep = Recent(service.health), Recent(service.asleep, seconds=0.0)
    service = replace(service, health=health, asleep=asleep, metrics=Recent(service.metrics))
    api = FastAPI(
        title="iqareward", version=iqareward.__version__, description=openapi.DESCRIPTION, docs_url=None, redoc_url=None
    )
    _add_error_handlers(api)
    _add_score_route(api, service, settings)
    _add_status_routes(api, service, settings)
    _add_sleep_routes(api, service, settings, health.forget)
    add_legacy_routes(api, service, settings)
    return Gate(api, settings)


def _add_score_route(api: FastAPI, service: Service, settings: Settings) -> None:
    @api.post("/v1/score", summary="Score images", responses=openapi.SCORE_RESPONSES, openapi_extra=openapi.SCORE_BODY)
    async def score(request: Request) -> Response:
        clock = asyncio.get_running_loop().time
        started = clock()
        async with time_limit(settings.deadline) as timeout:
            decoded = await _read(request, settings)
            if decoded.deadline is not None:
                timeout.reschedule(started + min(decoded.deadline, settings.deadline))
            read = clock() - started
            result = await while_connected(request, answer(chosen(service, decoded), decoded))
        timings = {"read": read} | result.timings | {"total": clock() - started}
        return Response(encode_answer(replace(result, timings=timings)), media_type="application/json")


async def _read(request: Request, settings: Settings) -> ScoreRequest:
    """The request in either of the two forms."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == CONTENT_TYPE:
        body = await read_body(request)
        if len(body) <= DECODED_AT_ONCE and int.from_bytes(body[:8], "little") <= HEADER_AT_ONCE:
            return decode_request(body, settings.limits)
        return await asyncio.to_thread(decode_request, body, settings.limits)
    if kind == "multipart/form-data":
        return await read_form(request, settings)
    raise ServiceError(
        415, "unsupported_content_type", f"expected {CONTENT_TYPE} or multipart/form-data, got {kind!r:.100}."
    )


def _add_status_routes(api: FastAPI, service: Service, settings: Settings) -> None:
    facts = {"limits": asdict(settings.limits), "deadline": settings.deadline}

    @api.get("/v1/rewards", summary="What is served, and within which limits", responses=openapi.REWARDS_RESPONSES)
    async def rewards() -> Response:
        return JSONResponse({"rewards": await service.describe()} | facts)

    @api.get("/healthz", summary="Whether every reward can be scored", responses=openapi.HEALTH_RESPONSES)
    async def healthz() -> Response:
        states = await service.health()
        healthy = all(state in ("ok", "asleep") for state in states.values())
        return JSONResponse({"status": "ok" if healthy else "degraded", "rewards": states}, 200 if healthy else 503)

    @api.get("/metrics", summary="Prometheus figures of this node", responses=openapi.METRICS_RESPONSES)
    async def metrics() -> Response:
        return PlainTextResponse(await service.metrics())


def _add_sleep_routes(api: FastAPI, service: Service, settings: Settings, forget_health: Callable[[], None]) -> None:
    # `:path`, because names of rewards may have slashes
    async def rest(name: str, asleep: bool) -> Response:
        served = service.rewards.get(name)
        if served is None:
            raise unknown_reward(name, service)
        async with time_limit(settings.deadline):
            await served.rest(asleep)
        forget_health()
        return JSONResponse({"asleep": asleep})

    @api.post("/v1/rewards/{name:path}/sleep", summary="Give the device back", responses=openapi.SLEEP_RESPONSES)
    async def sleep(name: str) -> Response:
        return await rest(name, asleep=True)

    @api.post("/v1/rewards/{name:path}/wake", summary="Take the device again", responses=openapi.SLEEP_RESPONSES)
    async def wake(name: str) -> Response:
        return await rest(name, asleep=False)


def _add_error_handlers(api: FastAPI) -> None:
    """Every error leaves in one form, whoever raised it."""

    async def ours(_: Request, error: Any) -> Response:
        return error_response(error)

    async def foreign(_: Request, error: Any) -> Response:
        names = {404: "not_found", 405: "method_not_allowed"}
        code = names.get(error.status_code, "bad_request")
        response = error_response(ServiceError(error.status_code, code, str(error.detail)))
        response.headers.update(error.headers or {})  # `Allow`, with 405
        return response

    async def invalid(_: Request, error: Any) -> Response:
        return error_response(ServiceError(422, "bad_request", f"{error.errors()[0]['msg']}"))

    async def gone(_: Request, error: Any) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    async def bug(_: Request, error: Exception) -> Response:
        return error_response(
            ServiceError(500, "internal_error", f"{type(error).__name__} in the server; see its log.")
        )

    handlers: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
        ServiceError: ours, WireError: ours, HTTPException: foreign,
        RequestValidationError: invalid, ClientDisconnect: gone, Exception: bug,
    }  # fmt: skip
    for kind, handler in handlers.items():
        api.add_exception_handler(kind, handler)
