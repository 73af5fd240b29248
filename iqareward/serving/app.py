"""The HTTP application of the server: authentication and request limits, routes, and errors in one form."""

import asyncio
import base64
import binascii
import hmac
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict, replace
from typing import Any, Generic, Literal, TypeVar, final

import pydantic
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

import iqareward
from iqareward.serving.backend import ServedFacts, Service, answer
from iqareward.serving.page import page
from iqareward.serving.requests import (
    MemoryBudget,
    Reservation,
    ScoreForm,
    ServiceError,
    Settings,
    overloaded,
    read_request,
)
from iqareward.serving.wire import CONTENT_TYPE, AnswerBody, ErrorBody, Limits, WireError, encode_answer

T = TypeVar("T")

_OPEN_PATHS = ("/", "/healthz")  # a page without secrets, where a token can be typed; load balancers have no token
PAUSE = 0.002  # seconds between two answers to requests that are refused or score nothing
_DESCRIPTION = (
    "Image-quality rewards over HTTP. Scores are higher for better images; null means not scored. Every error is "
    "`{error: {code, message, index?}}`, `index` being the image at fault; 429 and 503 may be sent again after "
    "`Retry-After` seconds."
)


class _RewardsBody(pydantic.BaseModel):
    rewards: dict[str, ServedFacts]
    limits: Limits
    deadline: float


class _HealthBody(pydantic.BaseModel):
    status: Literal["ok", "degraded"]
    rewards: dict[str, str]


class _SleepBody(pydantic.BaseModel):
    asleep: bool


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody} for status in statuses}


_SCORE_ERRORS = _errors(400, 401, 404, 409, 411, 413, 415, 422, 429, 500, 503, 504)
_SLEEP_ERRORS = _errors(401, 404, 411, 413, 415, 422, 429, 503, 504)
_SCORE_BODY = {
    "required": True,
    "content": {
        CONTENT_TYPE: {"schema": {"type": "string", "format": "binary"}},
        "multipart/form-data": {"schema": ScoreForm.model_json_schema()},
    },
}


def build_app(service: Service, settings: Settings) -> ASGIApp:
    """The server as an ASGI application."""
    health, asleep = Shared(service.health), Shared(service.asleep, seconds=0.0)
    service = replace(service, health=health, asleep=asleep, metrics=Shared(service.metrics))
    api = FastAPI(
        title="iqareward", version=iqareward.__version__, description=_DESCRIPTION, docs_url=None, redoc_url=None
    )
    _add_error_handlers(api)
    _add_score_route(api, service, settings)
    _add_status_routes(api, service, settings)
    _add_sleep_routes(api, service, settings, health.forget)
    return _Gate(api, settings)


def _add_score_route(api: FastAPI, service: Service, settings: Settings) -> None:
    extra = {"requestBody": _SCORE_BODY}

    @api.post(
        "/v1/score", summary="Score images", response_model=AnswerBody, responses=_SCORE_ERRORS, openapi_extra=extra
    )
    async def score(request: Request) -> Response:
        clock = asyncio.get_running_loop().time
        started = clock()
        async with _time_limit(settings.deadline) as timeout:
            decoded = await read_request(request, settings)
            if decoded.deadline is not None:
                timeout.reschedule(started + min(decoded.deadline, settings.deadline))
            read = clock() - started
            result = await _while_connected(request, answer(service, decoded))
        timings = {"read": read} | result.timings | {"total": clock() - started}
        return Response(encode_answer(replace(result, timings=timings)), media_type="application/json")


def _add_status_routes(api: FastAPI, service: Service, settings: Settings) -> None:
    facts = {"limits": asdict(settings.limits), "deadline": settings.deadline}

    @api.get("/v1/rewards", summary="Facts and limits", response_model=_RewardsBody, responses=_errors(401, 429, 503))
    async def rewards() -> Response:
        return JSONResponse({"rewards": await service.describe()} | facts)

    @api.get(
        "/healthz",
        summary="Whether every reward can be scored, or sleeps",
        response_model=_HealthBody,
        responses={429: {"model": ErrorBody}, 503: {"model": _HealthBody | ErrorBody}},
    )
    async def healthz() -> Response:
        states = await service.health()
        healthy = all(state in ("ok", "asleep") for state in states.values())
        return JSONResponse({"status": "ok" if healthy else "degraded", "rewards": states}, 200 if healthy else 503)

    @api.get(
        "/",
        summary="A page to drop images on",
        response_class=HTMLResponse,
        responses=_errors(429),
    )
    async def root() -> Response:
        return page()

    @api.get(
        "/metrics",
        summary="Prometheus figures of this node",
        response_class=PlainTextResponse,
        responses=_errors(401, 429, 503),
    )
    async def metrics() -> Response:
        return PlainTextResponse(await service.metrics())


def _add_sleep_routes(api: FastAPI, service: Service, settings: Settings, forget_health: Callable[[], None]) -> None:
    async def rest(name: str, asleep: bool) -> Response:
        async with _time_limit(settings.deadline):
            await service.find(name).rest(asleep)
        forget_health()
        return JSONResponse({"asleep": asleep})

    # `:path`, because names of rewards may have slashes
    @api.post(
        "/v1/rewards/{name:path}/sleep",
        summary="Give the device back",
        response_model=_SleepBody,
        responses=_SLEEP_ERRORS,
    )
    async def sleep(name: str) -> Response:
        return await rest(name, asleep=True)

    @api.post(
        "/v1/rewards/{name:path}/wake",
        summary="Take the device again",
        response_model=_SleepBody,
        responses=_SLEEP_ERRORS,
    )
    async def wake(name: str) -> Response:
        return await rest(name, asleep=False)


def _add_error_handlers(api: FastAPI) -> None:
    """Every error leaves in one form, whoever raised it."""

    async def ours(_: Request, error: Any) -> Response:
        return error.response()

    async def of_wire(_: Request, error: Any) -> Response:
        return ServiceError(error.status, error.code, error.message, index=error.index).response()

    async def foreign(_: Request, error: Any) -> Response:
        names = {404: "not_found", 405: "method_not_allowed"}
        code = names.get(error.status_code, "bad_request")
        response = ServiceError(error.status_code, code, str(error.detail)).response()
        response.headers.update(error.headers or {})  # `Allow`, with 405
        return response

    async def invalid(_: Request, error: Any) -> Response:
        return ServiceError(422, "bad_request", f"{error.errors()[0]['msg']}").response()

    async def gone(_: Request, error: Any) -> Response:
        return Response(status_code=400)  # nobody is there to read it

    async def bug(_: Request, error: Exception) -> Response:
        return ServiceError(500, "internal_error", f"{type(error).__name__} in the server; see its log.").response()

    handlers: dict[type[Exception], Callable[[Request, Any], Awaitable[Response]]] = {
        ServiceError: ours, WireError: of_wire, HTTPException: foreign,
        RequestValidationError: invalid, ClientDisconnect: gone, Exception: bug,
    }  # fmt: skip
    for kind, handler in handlers.items():
        api.add_exception_handler(kind, handler)


@asynccontextmanager
async def _time_limit(seconds: float) -> AsyncGenerator[asyncio.Timeout]:
    """A deadline that answers 504; the work behind it is cancelled."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            yield timeout
    except TimeoutError:
        raise ServiceError(
            504, "deadline_exceeded", "no answer within the deadline; send fewer images or allow more time."
        ) from None


async def _while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled when the client hangs up; the body must have been read.

    Raises:
        ClientDisconnect: the client hung up first.
    """

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


@final
class Shared(Generic[T]):
    """An answer that is at most `seconds` old, however many ask for it; one question is under way at a time."""

    def __init__(self, ask: Callable[[], Awaitable[T]], *, seconds: float = 1.0, patience: float = 5.0) -> None:
        self.ask, self.seconds, self.patience = ask, seconds, patience
        self._asking: asyncio.Future[T] | None = None
        self._answered = 0.0

    async def __call__(self) -> T:
        """The answer; error 503 if there is none in time, or whatever `ask` raised."""
        if self._asking is None or self._is_old(self._asking):
            self._asking = asyncio.ensure_future(self.ask())
            self._asking.add_done_callback(self._done)
        try:
            async with asyncio.timeout(self.patience):
                return await asyncio.shield(self._asking)  # a client who leaves does not stop it for the others
        except TimeoutError:
            raise ServiceError(503, "unavailable", "not known at the moment; retry.", retry_after=1) from None

    def forget(self) -> None:
        """Let whoever asks from now on get a new answer."""
        self._asking = None

    def _is_old(self, asking: asyncio.Future[T]) -> bool:
        return asking.cancelled() or (asking.done() and time.monotonic() - self._answered > self.seconds)

    def _done(self, asking: asyncio.Future[T]) -> None:
        self._answered = time.monotonic()
        if not asking.cancelled():
            asking.exception()  # is looked at, even if all who asked have left


@final
class _Gate:
    """Checks the headers of a request before a byte of its body is read: token, size, number and memory of requests.

    The token comes as `Authorization: Bearer <token>`, or as the password of Basic authentication, which is what
    `http://user:<token>@host` becomes.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._token = None if settings.token is None else settings.token.encode()
        self._inflight = {True: 0, False: 0}  # with a body and without one, so that neither shuts the other out
        self._memory = MemoryBudget(settings.max_inflight_bytes)
        self._next_turn = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, or answer why not."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}  # the server that wrote the scope leaves out the body
        memory, has_body = Reservation(self._memory), scope["method"] in ("POST", "PUT", "PATCH")
        try:
            memory.grow(self._admit(scope, has_body))
        except ServiceError as error:
            await self._turn()
            return await error.response()(scope, receive, send)
        self._inflight[has_body] += 1
        scope["iqareward.memory"] = memory  # for what a body becomes
        try:
            if not has_body:
                await self._turn()
            await self.app(scope, receive, send)
        finally:
            self._inflight[has_body] -= 1
            memory.release()

    async def _turn(self) -> None:
        """Wait for a turn, so that clients who only ask leave the process its time for those who score."""
        now = time.monotonic()
        turn = max(now, self._next_turn)
        self._next_turn = turn + PAUSE
        await asyncio.sleep(turn - now)

    def _admit(self, scope: Scope, has_body: bool) -> int:
        """The size of the body that may be read now."""
        headers = Headers(scope=scope)
        if self._token is not None and scope["path"] not in _OPEN_PATHS:
            sent = _token_of(headers.get("authorization", ""))
            # compare_digest takes the same time wherever the first difference is
            if sent is None or not hmac.compare_digest(sent, self._token):
                raise ServiceError(401, "unauthorized", "expected the server's token as `Authorization: Bearer ...`.")
        size = _size_of(headers, self.settings.limits.max_bytes) if has_body else 0
        if self._inflight[has_body] >= self.settings.max_inflight_requests:
            raise overloaded()
        return size


def _size_of(headers: Headers, most: int) -> int:
    """The size of the body, which the headers must say if there is one."""
    if "content-length" not in headers and "transfer-encoding" not in headers:
        return 0
    length = headers.get("content-length", "")
    if not (length.isascii() and length.isdigit()):
        raise ServiceError(411, "length_required", "expected a Content-Length header: send the body in one piece.")
    size = int(length[:20])
    if size > most:
        raise ServiceError(413, "body_too_large", f"expected at most {most} bytes, got {size}.")
    coding = headers.get("content-encoding", "identity")
    if coding.lower() != "identity":  # its size when decoded would be unknown
        raise ServiceError(415, "content_encoding", f"expected a body without Content-Encoding, got {coding!r:.100}.")
    return size


def _token_of(authorization: str) -> bytes | None:
    """The token in an Authorization header, if there is one."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2].strip()
        except (binascii.Error, ValueError):
            return None
    return None
