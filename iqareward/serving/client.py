"""The client of `iqareward serve`, and the HTTP connections that rewards over a network share."""

import asyncio
import itertools
import os
import random
import socket
import threading
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Coroutine, Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, final
from urllib.parse import quote
from urllib.request import getproxies

import pydantic
import tenacity
import torch

from iqareward.optional import require
from iqareward.rewards.calls import Call
from iqareward.rewards.core import BaseReward
from iqareward.rewards.loading import LOADING
from iqareward.rewards.threads import PerProcess
from iqareward.serving.wire import (
    CONTENT_TYPE,
    MAX_DEADLINE,
    ErrorBody,
    RemoteFacts,
    WireError,
    decode_answer,
    encode_request,
    first_error,
)
from iqareward.types import Bounds, Images, Scores

__all__ = ["HttpReward", "RemoteError", "RemoteFacts", "RemoteReward"]

T = TypeVar("T")

TOKEN_VARIABLE = "IQAREWARD_TOKEN"
_MAX_REQUEST_BYTES = 64 * 2**20  # of images; a server takes 256 MiB unless it is told otherwise
_MAX_ANSWER_BYTES = 64 * 2**20
_CONNECT_SECONDS = 5.0
_GONE_SECONDS = 30  # without a sign of life from its machine, a connection counts as lost
_REST_SECONDS = 5.0  # a server that could not be reached is not asked first for this long
_FIRST_PAUSE, _LONGEST_PAUSE, _LONGEST_RETRY_AFTER = 0.2, 5.0, 60.0  # seconds between attempts
_MISCONFIGURED = {401, 403, 404, 409}  # a wrong token or name, a reward that sleeps: no policy turns that into NaN

_JITTER = random.Random()  # not the module's, whose seed and sequence are the caller's


class RemoteError(RuntimeError):
    """A server gave no scores, after everything that is safe to repeat was repeated.

    Args:
        code: the server's own code, or `deadline_exceeded`, `unreachable`, `http_<status>`, `malformed_answer`.
        message: what happened.
        status: HTTP status, or None if there was no answer.
        index: position of the image at fault in the request, if the server names one.
    """

    def __init__(self, code: str, message: str, status: int | None = None, index: int | None = None) -> None:
        super().__init__(code, message, status, index)  # all four, so that it survives pickling
        self.code, self.message, self.status, self.index = code, message, status, index

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class _Lost(Exception):
    """An attempt that failed with `error` and may succeed when it is repeated after `pause` seconds."""

    def __init__(self, error: RemoteError, pause: float = 0.0) -> None:
        super().__init__(error)
        self.error, self.pause = error, pause


@final
class _Connections:
    """An event loop in its own thread, and the connections on it."""

    def __init__(self, urls: Sequence[str], max_in_flight: int, token_variable: str) -> None:
        with LOADING:
            self.httpx2: Any = require("httpx2", extra="serve", purpose="RemoteReward")
        token = token_in(token_variable)
        limits = self.httpx2.Limits(max_connections=None, max_keepalive_connections=max_in_flight)
        # a transport of our own would make httpx ignore the proxies of the environment
        transport = (
            None if getproxies() else self.httpx2.AsyncHTTPTransport(limits=limits, socket_options=_signs_of_life())
        )
        self.http = self.httpx2.AsyncClient(
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=self.httpx2.Timeout(None, connect=_CONNECT_SECONDS),  # the deadline bounds the rest
            limits=limits,
            transport=transport,
        )
        self.urls, self.slots = urls, asyncio.Semaphore(max_in_flight)
        self.down_until = [0.0] * len(urls)
        self.turn = itertools.count(random.SystemRandom().randrange(len(urls)))  # clients start at different servers
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=_serve, args=(self.loop, self.http), name="iqareward-http", daemon=True)
        self.thread.start()
        self._stop = weakref.finalize(self, _stop, self.loop, self.thread, os.getpid())

    def close(self) -> None:
        """Cancel what is under way, close the connections, end the thread."""
        self._stop()
        if threading.current_thread() is not self.thread:
            self.thread.join()

    async def once(
        self, method: str, path: str, content: bytes | None, headers: dict[str, str], server: int | None
    ) -> bytes:
        """One attempt, at the next server that is not known to be down, or at the one that has been for longest."""
        first, now, count = next(self.turn), self.loop.time(), len(self.urls)
        by_turns = ((first + step) % count for step in range(count))
        if server is None:
            server = min(by_turns, key=lambda number: max(self.down_until[number] - now, 0.0))
        url = self.urls[server] + path
        try:
            async with self.http.stream(method, url, content=content, headers=headers) as response:
                body = bytearray()
                async for chunk in response.aiter_bytes():
                    body += chunk
                    if len(body) > _MAX_ANSWER_BYTES:
                        raise RemoteError("malformed_answer", f"{url} answered with over {_MAX_ANSWER_BYTES} bytes.")
        except self.httpx2.TransportError as error:  # refused, dropped, cut short
            self.down_until[server] = self.loop.time() + _REST_SECONDS
            raise _Lost(RemoteError("unreachable", f"{url}: {type(error).__name__}: {error}")) from None
        except self.httpx2.HTTPError as error:  # a body that its Content-Encoding does not decode
            raise RemoteError("malformed_answer", f"{url}: {type(error).__name__}: {error}") from None
        status = response.status_code
        if status == 200:
            return bytes(body)
        try:
            told = ErrorBody.model_validate_json(bytes(body)).error
            error = RemoteError(told.code, told.message[:500], status, told.index)
        except pydantic.ValidationError:
            text = body[:200].decode(errors="replace")
            error = RemoteError(f"http_{status}", f"{url} answered {status}: {text}", status)
        # a 500 without an error of ours comes from a proxy whose server died, one with it from the reward
        if status in (429, 502, 503) or (status == 500 and error.code == "http_500"):
            raise _Lost(error, _retry_after(response.headers.get("retry-after", "")))
        raise error


def _signs_of_life() -> list[tuple[int, int, int]]:
    """Options of a socket by which the kernel notices that the other machine is gone, which closes no connection."""
    third = _GONE_SECONDS // 3
    options = {
        "TCP_KEEPIDLE": third,  # seconds before the first question whether it is there
        "TCP_KEEPINTVL": third,
        "TCP_KEEPCNT": 2,
        "TCP_USER_TIMEOUT": 1000 * _GONE_SECONDS,  # for what was sent and is not acknowledged
    }
    # not every system has all of them
    known = [(getattr(socket, name), value) for name, value in options.items() if hasattr(socket, name)]
    return [(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1), *((socket.IPPROTO_TCP, name, value) for name, value in known)]


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
    if threading.main_thread().is_alive():  # it takes a thread, which Python 3.12 refuses to start at its end
        await asyncio.get_running_loop().shutdown_default_executor()


def _stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process or loop.is_closed():  # a forked child has the object but not the thread
        return
    loop.call_soon_threadsafe(loop.stop)
    if not threading.main_thread().is_alive():  # the interpreter exits; a mere collection must not wait
        thread.join(timeout=_CONNECT_SECONDS)


def _pause(num_servers: int, state: tenacity.RetryCallState) -> float:
    """What the server asks for, and full jitter below a doubling bound; another server is asked at once."""
    lost = state.outcome.exception() if state.outcome else None
    rounds = state.attempt_number // num_servers
    bound = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** min(rounds - 1, 16)) if rounds else 0.0
    return (lost.pause if isinstance(lost, _Lost) else 0.0) + _JITTER.uniform(0, bound)


def _retry_after(header: str) -> float:
    """The seconds that a Retry-After header asks for; 0 for a date, which only proxies send."""
    return min(float(header), _LONGEST_RETRY_AFTER) if header.isdecimal() else 0.0


def checked_token(text: str, source: str) -> str:
    """A token without the white space around it, with which files and secrets often end; a ValueError if it is none."""
    token = text.strip()
    if not token or not (token.isascii() and token.isprintable()):
        raise ValueError(
            f"{source} expected a token of printable ASCII characters, got {'others' if token else 'none'}. "
            "Set it to a secret such as `openssl rand -hex 32` prints, or leave it unset."
        )
    return token


def token_in(variable: str) -> str | None:
    """The token in an environment variable, None if it is not set; raises ValueError for a malformed token."""
    text = os.environ.get(variable)
    return None if text is None else checked_token(text, f"${variable}")


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first error is raised and cancels the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


class HttpReward(BaseReward):
    """A reward that is scored by one of several equal servers, from any thread or event loop, also after a fork.

    The connections live on one event loop in a thread of their own, one per process, started by the first request. What
    may be repeated is repeated until the deadline: no connection, a connection that was cut, a server that is busy
    (429, 503), a proxy without a server. Scoring changes nothing on the server, so that is safe.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        *,
        timeout: float,
        max_in_flight: int,
        on_error: Literal["raise", "nan"],
        token_variable: str,
    ) -> None:
        who, urls = type(self).__name__, [urls] if isinstance(urls, str) else list(urls)
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise ValueError(f"{who} expected one or more URLs that start with http:// or https://, got {urls}.")
        if not timeout > 0 or max_in_flight < 1:
            raise ValueError(
                f"{who} expected timeout > 0 seconds and max_in_flight >= 1, got {timeout} and {max_in_flight}."
            )
        if on_error not in ("raise", "nan"):
            raise ValueError(f'{who} expected `on_error` "raise" or "nan", got {on_error!r}.')
        require("httpx2", extra="serve", purpose=who)
        token_in(token_variable)  # an error here and not at the first request; it is read anew in each process
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.timeout, self.max_in_flight, self.on_error = timeout, max_in_flight, on_error
        self._connections = PerProcess(partial(_Connections, self.urls, max_in_flight, token_variable))

    @abstractmethod
    def _prepared(self, call: Call) -> Any:
        """What is sent, on the CPU: in the caller's thread, so that it comes after the caller's work on its stream."""

    @abstractmethod
    async def _answered(self, prepared: Any) -> Any:
        """What the servers say, on the loop of the client."""

    @abstractmethod
    def _scores(self, call: Call, answer: Any) -> Scores:
        """The scores of the call on its device, in the caller's thread."""

    def score_call(self, call: Call) -> Scores:
        return self._scores(call, self._run(self._answered(self._prepared(call))))

    async def ascore(
        self,
        images: Images,
        references: Images | None = None,
        *,
        inputs: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """The same as a call without blocking the event loop; cancelling it cancels its requests."""
        # in a thread, because the facts of the reward may have to be asked for first
        call = await asyncio.to_thread(self._call, images, references, inputs, prompts)
        future = self._submit(self._answered(self._prepared(call)))
        return self._scores(call, await asyncio.wrap_future(future))

    def close(self) -> None:
        """End the connections of this process; a later call opens new ones."""
        here = self._connections.forget()
        if here is not None:
            here.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._connections.get().loop)

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine on the loop of the connections; an interrupt cancels it."""
        future = self._submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _request(
        self,
        method: str,
        path: str,
        *,
        deadline: float,
        content: bytes | None = None,
        content_type: str | None = None,
        server: int | None = None,
    ) -> bytes:
        """The body of a 200 answer by the deadline, a time on the clock of the loop, or a `RemoteError`."""
        here, failed = self._connections.get(), list[tenacity.RetryCallState]()
        headers = {} if content_type is None else {"Content-Type": content_type}
        try:
            async with asyncio.timeout_at(deadline), here.slots:
                retrying = tenacity.AsyncRetrying(
                    retry=tenacity.retry_if_exception_type(_Lost),
                    stop=tenacity.stop_before_delay(deadline - here.loop.time()),
                    wait=partial(_pause, len(self.urls)),
                    before_sleep=failed.append,
                    reraise=True,
                )
                return await retrying(here.once, method, path, content, headers, server)
        except _Lost as lost:
            raise lost.error from None
        except TimeoutError:
            last = failed[-1].outcome.exception() if failed and failed[-1].outcome else None
            why = f" The last attempt: {last}" if last else ""
            raise RemoteError("deadline_exceeded", f"no answer from {self.urls} in time.{why}") from None

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self.timeout

    def _tolerates(self, error: RemoteError) -> bool:
        """Whether images that were lost to this error become NaN."""
        return self.on_error == "nan" and error.status not in _MISCONFIGURED

    def _warn(self, call: Call, scores: Scores, lost: Sequence[tuple[int, str]], *, otherwise: str) -> None:
        """Warn of images that were lost, by numbers and errors, or of a batch without scores."""
        if lost:
            count = sum(number for number, _ in lost)
            message = f"{self.name}: {count} of {len(call)} images are not scored: {lost[0][1]}"
            warnings.warn(message, RuntimeWarning, stacklevel=4)
        else:
            self._watch.look(self.name, scores, call.images, call.references, call.inputs, otherwise=otherwise)


@final
class RemoteReward(HttpReward):
    """A reward on a server, called like any other; scores are bit-identical to those of the same reward here.

    Pixels travel without loss (`iqareward.serving.wire`), in requests of `batch_size` images, `max_in_flight` of them
    at a time for all threads and coroutines of this process together. A request that is lost, or finds no server or a
    busy one, is sent again until `timeout`, to another server if there is one. What the server refuses is not repeated.

    The bearer token is taken from the environment variable `IQAREWARD_TOKEN`, if it is set.

    Args:
        urls: base address of the server, e.g. `"http://judge:8000"`, or several that serve the same.
        name: name of the reward there.
        timeout: seconds for a whole call, waiting and retries included.
        max_in_flight: requests at the same time.
        batch_size: images per request, fewer if they take more than 64 MiB; a server that finds that too large gets
            halves.
        on_error: `"raise"`, or `"nan"`: images that the server could not score are NaN, with a RuntimeWarning. A wrong
            token or name, and bad arguments, are raised in any case.
        facts: what the reward needs; default: asked of the server when first needed.

    Raises:
        ImportError: httpx2 is missing (extra `serve`).
        ValueError: a URL without http(s), or a bound that is not positive.
        RemoteError: no scores, and `on_error` is `"raise"` (at a call).

    Example:
        >>> reward = RemoteReward("http://127.0.0.1:8000", "ssim", facts=RemoteFacts(True, False, (-1.0, 1.0)))
        >>> reward.name, reward.needs_references  # nothing has been sent yet
        ('ssim', True)
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        name: str,
        *,
        timeout: float = 120.0,
        max_in_flight: int = 8,
        batch_size: int = 32,
        on_error: Literal["raise", "nan"] = "raise",
        facts: RemoteFacts | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"RemoteReward expected batch_size >= 1, got {batch_size}.")
        super().__init__(
            urls, timeout=timeout, max_in_flight=max_in_flight, on_error=on_error, token_variable=TOKEN_VARIABLE
        )
        self.name, self.batch_size, self._facts = name, batch_size, facts

    @property
    def facts(self) -> RemoteFacts:
        """What the reward needs; asked once and pickled along."""
        if self._facts is None:
            self._facts = self._run(self._ask())
        return self._facts

    @property
    def needs_references(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the reward compares with references; the first look asks the server."""
        return self.facts.needs_references

    @property
    def needs_inputs(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the reward needs the degraded images; the first look asks the server."""
        return self.facts.needs_inputs

    @property
    def needs_prompts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the reward reads prompts; the first look asks the server."""
        return self.facts.needs_prompts

    @property
    def bounds(self) -> Bounds:  # pyright: ignore[reportIncompatibleVariableOverride]
        """(low, high) of the scores; the first look asks the server."""
        return self.facts.bounds

    def offload(self) -> None:
        """Let every server give the reward's device back, after the calls that came before; until `onload` calls fail.

        It is the server's reward that sleeps, so the calls of every other client fail as well.

        Raises:
            RemoteError: a server did not do it.
        """
        self._run(self._rest("sleep"))

    def onload(self) -> None:
        """Let every server load the reward onto its device again.

        Raises:
            RemoteError: a server did not do it.
        """
        self._run(self._rest("wake"))

    async def _rest(self, step: str) -> None:
        path, deadline = f"/v1/rewards/{quote(self.name, safe='')}/{step}", self._deadline()
        servers = range(len(self.urls))
        await together(self._request("POST", path, deadline=deadline, server=server) for server in servers)

    async def _ask(self) -> RemoteFacts:
        body = await self._request("GET", "/v1/rewards", deadline=self._deadline())
        try:
            rewards = _RewardsBody.model_validate_json(body).rewards
            if self.name not in rewards:
                raise RemoteError("unknown_reward", f"the server has {sorted(rewards)}, not {self.name!r}.", 404)
            return pydantic.TypeAdapter(RemoteFacts).validate_python(rewards[self.name])
        except pydantic.ValidationError as error:
            raise RemoteError(
                "malformed_answer", f"no facts of {self.name} in /v1/rewards: {first_error(error)}"
            ) from None

    def _prepared(self, call: Call) -> Call:
        call.check(self.name)
        columns = (call.images, call.references, call.inputs)
        moved = [
            column.cpu() if isinstance(column, torch.Tensor) else column and [row.cpu() for row in column]
            for column in columns
        ]
        return Call(*moved, prompts=call.prompts)  # pyright: ignore[reportArgumentType]

    async def _answered(self, prepared: Call) -> tuple[Scores, list[tuple[int, str]]]:
        """Scores of all pieces, and what was lost."""
        deadline, lost = self._deadline(), list[tuple[int, str]]()
        slots = asyncio.Semaphore(self.max_in_flight)  # no more bodies in memory than can be on the way

        async def one(piece: Call) -> Scores:
            async with slots:
                return await self._score_piece(piece, deadline, lost)

        if not len(prepared):
            return torch.zeros(0), lost
        pieces = prepared.pieces(self.batch_size, _MAX_REQUEST_BYTES)
        return torch.cat(await together(one(piece) for piece in pieces)), lost

    def _scores(self, call: Call, answer: tuple[Scores, list[tuple[int, str]]]) -> Scores:
        scores, lost = answer
        self._warn(call, scores, lost, otherwise="the server has no score for these images; its log may say why")
        return scores.to(call.device)

    async def _score_piece(self, piece: Call, deadline: float, lost: list[tuple[int, str]]) -> Scores:
        try:
            return await self._score_once(piece, deadline)
        except RemoteError as error:
            if error.status == 413 and len(piece) > 1:
                halves = piece.pieces((len(piece) + 1) // 2)
                return torch.cat([await self._score_piece(half, deadline, lost) for half in halves])
            if not self._tolerates(error):
                raise
            lost.append((len(piece), str(error)))
            return torch.full((len(piece),), torch.nan)

    async def _score_once(self, piece: Call, deadline: float) -> Scores:
        loop = asyncio.get_running_loop()
        left = min(max(deadline - loop.time(), 1e-3), MAX_DEADLINE)
        encode = partial(encode_request, rewards=[self.name], inputs=piece.inputs, deadline=left)
        body = await loop.run_in_executor(None, encode, piece.images, piece.references, piece.prompts)
        answer = await self._request("POST", "/v1/score", deadline=deadline, content=body, content_type=CONTENT_TYPE)
        try:
            scores = decode_answer(answer).scores.get(self.name)
        except WireError as error:
            raise RemoteError("malformed_answer", str(error)) from None
        if scores is None or len(scores) != len(piece):
            got = "none" if scores is None else len(scores)
            raise RemoteError("malformed_answer", f"expected {len(piece)} scores of {self.name}, got {got}.")
        return scores


class _RewardsBody(pydantic.BaseModel):
    rewards: dict[str, Any]
