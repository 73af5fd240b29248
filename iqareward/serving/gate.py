"""Who may send how much: checked from the headers, before a byte of the body is read."""

import asyncio
import base64
import binascii
import hmac
import time

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from iqareward.serving.errors import ServiceError, error_response
from iqareward.serving.memory import Memory, Reservation
from iqareward.serving.settings import Settings

OPEN_PATHS = ("/healthz",)  # load balancers have no token
PAUSE = 0.002  # seconds between two answers to requests that are refused or score nothing


class Gate:
    """An ASGI application in front of another: bearer token, size of the body, number and memory of all requests.

    The token comes as `Authorization: Bearer <token>`, or as the password of Basic authentication, which is what
    `http://user:<token>@host` becomes.

    Args:
        app: the application behind the gate.
        settings: the token, and the limits.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._token = None if settings.token is None else settings.token.encode()
        # with a body and without one, so that neither shuts the other out
        self._inflight = {True: 0, False: 0}
        self._memory = Memory(settings.max_inflight_bytes)
        self._next_turn = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request in, or answer why not."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        held, has_body = Reservation(self._memory), scope["method"] in ("POST", "PUT", "PATCH")
        try:
            held.grow(self._admit(scope, has_body))
        except ServiceError as error:
            await self._turn()
            return await error_response(error)(scope, receive, send)
        self._inflight[has_body] += 1
        scope["iqareward.memory"] = held  # for what a body becomes
        try:
            if not has_body:
                await self._turn()
            await self.app(scope, receive, send)
        finally:
            self._inflight[has_body] -= 1
            held.release()

    async def _turn(self) -> None:
        """Wait for one's turn, so that clients who only ask leave the process its time for those who score."""
        now = time.monotonic()
        turn = max(now, self._next_turn)
        self._next_turn = turn + PAUSE
        await asyncio.sleep(turn - now)

    def _admit(self, scope: Scope, has_body: bool) -> int:
        """The size of the body that may be read now."""
        headers = Headers(scope=scope)
        if self._token is not None and scope["path"] not in OPEN_PATHS:
            sent = _token_of(headers.get("authorization", ""))
            # compare_digest takes the same time wherever the first difference is
            if sent is None or not hmac.compare_digest(sent, self._token):
                raise ServiceError(401, "unauthorized", "expected the server's token as `Authorization: Bearer ...`.")
        size = _size_of(headers, self.settings.limits.max_bytes) if has_body else 0
        if self._inflight[has_body] >= self.settings.max_inflight_requests:
            raise ServiceError(429, "overloaded", "the server holds as much as it may; retry.", retry_after=1)
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
