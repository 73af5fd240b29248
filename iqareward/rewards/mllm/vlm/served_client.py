"""Posting to one server from any thread, with bounded concurrency, deadlines and careful retries."""

import asyncio
import email.utils
import os
import random
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar, final

from iqareward.optional import require

T = TypeVar("T")

MAX_RESPONSE_BYTES = 1 << 20
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0  # seconds
_BUSY = (429, 502, 503, 504)  # the server, or a proxy before it, did not work on the request
_JOIN_SECONDS = 5.0


class ChatServerError(RuntimeError):
    """A server did not answer a request; the message says why."""


@final
class _BusyError(ChatServerError):
    """The same, but asking again may help."""

    def __init__(self, message: str, pause: float = 0.0) -> None:
        super().__init__(message)
        self.pause = pause  # what the server asked for, in seconds


@final
class ChatClient:
    """One server, reached over connections that are kept open, from an event loop in a thread of its own.

    Every caller shares the loop, whether it is a thread or a coroutine of another loop, so that `max_in_flight` bounds
    all of them together. A request is sent again only where that is safe and can help: no connection, a connection cut
    before the answer, 429, 502, 503 and 504. Questions about an image change nothing on the server; but after a timeout
    it is probably still working on the first one, and other errors would come again.

    Args:
        url: where to post.
        max_in_flight: requests at one time.
        timeout: seconds for one attempt.
        retries: further attempts.
        api_key_variable: environment variable with the bearer token; sent if it is set. Read here, never stored.
        purpose: what needs httpx, for the error if it is missing.
    """

    def __init__(
        self, url: str, *, max_in_flight: int, timeout: float, retries: int, api_key_variable: str, purpose: str
    ) -> None:
        self._httpx = require("httpx", extra="serve", purpose=purpose)
        self._url, self._timeout, self._retries = url, timeout, retries
        self._slots = asyncio.Semaphore(max_in_flight)
        self._jitter = random.Random()  # not the module's: the caller owns its seed
        key = os.environ.get(api_key_variable)
        self._http = self._httpx.AsyncClient(
            headers={"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {}),
            limits=self._httpx.Limits(max_connections=max_in_flight, max_keepalive_connections=max_in_flight),
            timeout=self._httpx.Timeout(timeout, pool=None),
        )
        self.process = os.getpid()  # threads do not survive a fork
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="iqareward-chat", daemon=True)
        self._thread.start()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> "Future[T]":
        """Run a coroutine on the client's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    async def post(self, body: bytes, deadline: float) -> bytes:
        """The server's answer to a JSON body; only on the client's loop.

        Args:
            body: JSON.
            deadline: by when, in seconds of `time.monotonic`, all attempts included.

        Raises:
            ChatServerError: no answer in time, or an error that does not pass.
        """
        for attempt in range(self._retries + 1):
            try:
                async with _limit(deadline, f"{self._url}: the deadline passed"), self._slots:
                    return await self._attempt(body)
            except _BusyError as error:
                backoff = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt)
                pause = error.pause + self._jitter.uniform(0, backoff)
                if attempt == self._retries or time.monotonic() + pause >= deadline:
                    raise
                await asyncio.sleep(pause)
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Cancel what is under way, close the connections and end the thread."""
        if self.process != os.getpid() or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._loop.stop)
        if threading.current_thread() is not self._thread:
            self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._wind_up())
        finally:
            self._loop.close()

    async def _wind_up(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()
        await self._loop.shutdown_default_executor()

    async def _attempt(self, body: bytes) -> bytes:
        """One request."""
        httpx = self._httpx
        try:
            async with (
                _limit(time.monotonic() + self._timeout, f"no answer within {self._timeout:g} s"),
                self._http.stream("POST", self._url, content=body) as response,
            ):
                return _accepted(response, await _read(response))
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _BusyError(f"{self._url} cannot be reached: {error or type(error).__name__}") from error
        except httpx.TimeoutException as error:
            raise ChatServerError(f"{self._url}: no answer within {self._timeout:g} s") from error
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
            raise _BusyError(f"{self._url} cut the connection: {error or type(error).__name__}") from error
        except httpx.HTTPError as error:
            raise ChatServerError(f"{self._url}: {type(error).__name__}: {error}") from error


class _limit:
    """`asyncio.timeout` until a moment of `time.monotonic`, with an error that says what ran out."""

    def __init__(self, until: float, message: str) -> None:
        self._until, self._message = until, message

    async def __aenter__(self) -> None:
        self._timeout = asyncio.timeout(max(0.0, self._until - time.monotonic()))
        await self._timeout.__aenter__()

    async def __aexit__(self, *error: Any) -> None:
        try:
            await self._timeout.__aexit__(*error)
        except TimeoutError as expired:
            raise ChatServerError(self._message) from expired


async def _read(response: Any) -> bytes:
    """The body of a response, up to a limit."""
    body = bytearray()
    async for piece in response.aiter_bytes():
        body += piece
        if len(body) > MAX_RESPONSE_BYTES:
            raise ChatServerError(f"{response.url} answered with more than {MAX_RESPONSE_BYTES} bytes")
    return bytes(body)


def _accepted(response: Any, body: bytes) -> bytes:
    """The body of a good answer; the error that the status of another one stands for."""
    if response.status_code == 200:
        return body
    message = f"{response.url} answered {response.status_code}: {body[:200]!r}"
    if response.status_code in _BUSY:
        raise _BusyError(message, _pause(response.headers.get("Retry-After", "")))
    raise ChatServerError(message)


def _pause(retry_after: str) -> float:
    """Seconds that a Retry-After header asks for; 0 if it asks for nothing that can be read."""
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0
