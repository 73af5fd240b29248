"""The HTTP client of what scores over a network: bounded, retrying where it is safe, with a total deadline."""

import asyncio
import random
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar, final

from iqareward.optional import require
from iqareward.rewards._http_loop import AttemptFailed, HttpLoop, RemoteError, start_loop, token_in
from iqareward.rewards._per_process import PerProcess

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
        self._here = PerProcess(partial(start_loop, purpose, max_in_flight, token_variable, len(self.urls)))

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
