"""The HTTP client of what scores over a network: bounded, retrying where it is safe, with a total deadline."""

import asyncio
import email.utils
import itertools
import json
import math
import os
import random
import threading
import time
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, final

from iqareward.optional import require
from iqareward.rewards.loading import LOADING
from iqareward.rewards.threads import PerProcess

MAX_ANSWER_BYTES = 64 * 2**20
CONNECT_SECONDS = 5.0
REST_SECONDS = 5.0  # a server that could not be reached is not asked first for this long
LONGEST_RETRY_AFTER = 60.0
# Scoring changes nothing on the server, so a repeated request is safe; these are the answers after which it may help.
_BUSY = {429, 503}
_LOST = {502}


class RemoteError(RuntimeError):
    """A server gave no scores, after everything that is safe to repeat was repeated.

    Args:
        code: the server's own code, or `deadline_exceeded`, `unreachable`, `http_<status>`, `malformed_answer`.
        message: what happened.
        status: HTTP status, or None if there was no answer.
        index: position of the image at fault in the request, where the server names one.
    """

    def __init__(self, code: str, message: str, status: int | None = None, index: int | None = None) -> None:
        super().__init__(code, message, status, index)  # all four, so that it survives pickling
        self.code, self.message, self.status, self.index = code, message, status, index

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass
class AttemptFailed(Exception):
    """An attempt that another one may mend.

    Args:
        error: what it becomes if no other one is made.
        busy: the server answered, that it has no room.
        pause: what the server asks for, in seconds.
    """

    error: RemoteError
    busy: bool = False
    pause: float | None = None


@final
class HttpLoop:
    """An event loop in its own thread, and the connections on it."""

    def __init__(self, httpx2: Any, http: Any, max_in_flight: int, num_servers: int) -> None:
        self.httpx2, self.http = httpx2, http
        self.slots = asyncio.Semaphore(max_in_flight)
        self.resting = [0.0] * num_servers
        self.turn = itertools.count(random.SystemRandom().randrange(num_servers))  # clients start at different servers
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=_serve, args=(self.loop, http), name="iqareward-http", daemon=True)
        self.thread.start()
        self._stop = weakref.finalize(self, _stop, self.loop, self.thread, os.getpid())

    def close(self) -> None:
        """Cancel what is under way, close the connections, end the thread."""
        self._stop()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    def next_server(self) -> int:
        """Round and round, past servers that rest; if all do, the one that has rested longest."""
        first, now = next(self.turn), self.loop.time()
        order = [(first + i) % len(self.resting) for i in range(len(self.resting))]
        awake = [server for server in order if self.resting[server] <= now]
        return awake[0] if awake else min(order, key=self.resting.__getitem__)

    def rest(self, server: int) -> None:
        self.resting[server] = self.loop.time() + REST_SECONDS

    async def once(self, method: str, url: str, content: bytes | None, headers: dict[str, str]) -> bytes:
        """One attempt."""
        try:
            async with self.http.stream(method, url, content=content, headers=headers) as response:
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        raise RemoteError("malformed_answer", f"{url} answered with over {MAX_ANSWER_BYTES} bytes.")
        except self.httpx2.TransportError as error:  # refused, dropped, cut short
            raise AttemptFailed(RemoteError("unreachable", f"{url}: {type(error).__name__}: {error}")) from None
        except self.httpx2.HTTPError as error:  # a body that its Content-Encoding does not decode
            raise RemoteError("malformed_answer", f"{url}: {type(error).__name__}: {error}") from None
        if response.status_code == 200:
            return bytes(body)
        error, ours = _error_of(url, response.status_code, bytes(body))
        busy = response.status_code in _BUSY
        # a 500 without our JSON comes from a proxy whose replica died, one with it from the reward: it would come again
        if busy or response.status_code in _LOST or (response.status_code == 500 and not ours):
            raise AttemptFailed(error, busy, _seconds(response.headers.get("retry-after", "")))
        raise error


def checked_token(text: str, source: str) -> str:
    """A token as both sides use it: without the white space around it, with which files and secrets often end.

    Args:
        text: the token as it was found.
        source: where, for the error message.

    Raises:
        ValueError: nothing is left of it, or something that a header cannot carry.
    """
    token = text.strip()
    if not token or not (token.isascii() and token.isprintable()):
        raise ValueError(
            f"{source} expected a token of printable ASCII characters, got {'others' if token else 'none'}. "
            "Set it to a secret such as `openssl rand -hex 32` prints, or leave it unset."
        )
    return token


def token_in(variable: str) -> str | None:
    """The token in an environment variable; None = it is not set.

    Raises:
        ValueError: it is set to what is no token.
    """
    text = os.environ.get(variable)
    return None if text is None else checked_token(text, f"${variable}")


def _start_loop(purpose: str, max_in_flight: int, token_variable: str | None, num_servers: int) -> HttpLoop:
    with LOADING:
        httpx2 = require("httpx2", extra="serve", purpose=purpose)
    token = token_in(token_variable) if token_variable else None
    http = httpx2.AsyncClient(
        headers={"Authorization": f"Bearer {token}"} if token else {},
        timeout=httpx2.Timeout(None, connect=CONNECT_SECONDS),  # the deadline bounds the rest
        limits=httpx2.Limits(max_connections=None, max_keepalive_connections=max_in_flight),
    )
    return HttpLoop(httpx2, http, max_in_flight, num_servers)


def _serve(loop: asyncio.AbstractEventLoop, http: Any) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    if not threading.main_thread().is_alive() and asyncio.all_tasks(loop):
        return  # only daemon threads still wait; to wake them while the interpreter ends could abort it: see batching
    loop.run_until_complete(_wind_up(http))
    loop.close()


async def _wind_up(http: Any) -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await http.aclose()
    await asyncio.get_running_loop().shutdown_default_executor()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process or loop.is_closed():  # a forked child has the object but not the thread
        return
    loop.call_soon_threadsafe(loop.stop)
    if not threading.main_thread().is_alive():  # the interpreter exits; a mere collection must not wait
        thread.join(timeout=CONNECT_SECONDS)


def _error_of(url: str, status: int, body: bytes) -> tuple[RemoteError, bool]:
    """The error in an answer, and whether it is one of ours."""
    try:
        error = json.loads(body)["error"]
        index = error.get("index")
        return RemoteError(
            str(error["code"]), str(error["message"])[:500], status, index if isinstance(index, int) else None
        ), True
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        text = body[:200].decode(errors="replace")
        return RemoteError(f"http_{status}", f"{url} answered {status}: {text}", status), False


def _seconds(retry_after: str) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as a date; None if it asks for nothing readable."""
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if math.isfinite(seconds) else None


__all__ = ["HttpClient", "RemoteError"]

T = TypeVar("T")

_JITTER = random.Random()  # not the module's, whose seed and sequence are the caller's

FIRST_PAUSE, LONGEST_PAUSE = 0.2, 5.0  # seconds between attempts, before jitter


@final
class HttpClient:
    """Sends requests to one of several equal servers, from any thread, any event loop, and after pickling or a fork.

    The connections live on one event loop in a thread of their own, one per process, started by the first request.

    Args:
        urls: base addresses of servers that answer alike; requests go round, and past servers that are down.
        purpose: what needs httpx2, for the error message if it is missing.
        max_in_flight: requests at the same time; more wait.
        attempts: how often a request may be lost on the way (no connection, connection cut, a proxy without a server).
            A server that says that it is busy (429, 503) is asked again until the deadline.
        hedge_after: seconds after which an unanswered request is sent once more, the first answer being taken; None
            for never.
        token_variable: environment variable that holds a bearer token; None = no token.

    Raises:
        ImportError: httpx2 is missing.
        ValueError: no URL, one that is not http(s), a bound below 1, or an environment variable without a token in it.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        purpose: str,
        max_in_flight: int = 8,
        attempts: int = 4,
        hedge_after: float | None = None,
        token_variable: str | None = None,
    ) -> None:
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise ValueError(f"{purpose} expected one or more URLs that start with http:// or https://, got {urls}.")
        if max_in_flight < 1 or attempts < 1:
            raise ValueError(f"{purpose} expected max_in_flight and attempts >= 1, got {max_in_flight} and {attempts}.")
        require("httpx2", extra="serve", purpose=purpose)
        if token_variable is not None:
            token_in(token_variable)  # an error here and not at the first request; it is read anew in each process
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.attempts, self.hedge_after = attempts, hedge_after
        self._here = PerProcess(partial(_start_loop, purpose, max_in_flight, token_variable, len(self.urls)))

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine that uses `request` on this client's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._here.get().loop)

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The same, from a thread that waits; an interrupt cancels what is under way."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def arun(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The same, awaited on any other loop; cancelling it cancels what is under way."""
        return await asyncio.wrap_future(self.submit(coroutine))

    async def request(
        self,
        method: str,
        path: str,
        *,
        deadline: float,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> bytes:
        """The body of a 200 answer; to be run by `run`, `arun` or `submit`.

        Args:
            method: GET or POST.
            path: below the base address, from its slash on.
            deadline: on this loop's clock (`asyncio.get_running_loop().time()`); waiting for a slot counts.
            content: the body.
            headers: beside the token.

        Raises:
            RemoteError: no such answer, by the deadline or within the attempts.
        """
        here = self._here.get()
        failures: list[RemoteError] = []
        send = partial(self._attempts, here, method, path, content, dict(headers or {}), deadline, failures)
        try:
            async with asyncio.timeout_at(deadline), here.slots:
                return await self._hedged(send)
        except TimeoutError:
            why = f" The last attempt: {failures[-1]}" if failures else ""
            raise RemoteError("deadline_exceeded", f"no answer from {self.urls} in time.{why}") from None

    def close(self) -> None:
        """End the connections of this process; a later request opens new ones."""
        here = self._here.forget()
        if here is not None:
            here.close()

    async def _hedged(self, send: Any) -> bytes:
        """The first answer of one request or, when it is late, of two."""
        tasks = {asyncio.create_task(send())}
        try:
            done, _ = await asyncio.wait(tasks, timeout=self.hedge_after)
            if not done:
                tasks.add(asyncio.create_task(send()))
            while True:
                done, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                good = [task for task in done if task.exception() is None]
                if good or not waiting:
                    return (good or list(done))[0].result()
                tasks = waiting
        finally:
            for task in tasks:
                task.cancel()

    async def _attempts(
        self,
        here: HttpLoop,
        method: str,
        path: str,
        content: bytes | None,
        headers: dict[str, str],
        deadline: float,
        failures: list[RemoteError],
    ) -> bytes:
        left = self.attempts
        while True:
            server = here.next_server()
            try:
                return await here.once(method, self.urls[server] + path, content, headers)
            except AttemptFailed as failure:
                failures.append(failure.error)
                if failure.error.status is None:
                    here.rest(server)
                left -= not failure.busy
                # another server is asked at once, the same one after a pause
                pause = (failure.pause or 0.0) + _jitter(len(failures) // len(self.urls))
                if not left or here.loop.time() + pause >= deadline:
                    raise failure.error from None
                await asyncio.sleep(pause)


def _jitter(rounds: int) -> float:
    """Full jitter below a doubling bound, so that many clients do not come back at the same moment."""
    return _JITTER.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(rounds - 1, 16))) if rounds else 0.0
