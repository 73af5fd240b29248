"""A process with its own HTTP/1.1 server, so that requests need not pass through Ray's proxy."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal, final

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

_BACKLOG = 2048  # connections that the kernel holds until they are accepted: a trainer's workers may come all at once
_STOP_SECONDS = 10  # for requests that are still being answered when the process is to end

# Of the request line and the headers, which neither httptools nor uvicorn bound. Far above any real one, because a
# chunk counts whole when the end of one request and the start of the next come in it.
_MAX_HEAD_BYTES = 2**19
_MAX_HEADERS = 200
_MAX_PIPELINED = 8  # requests that wait for the answer before theirs; our clients send none
HEAD_SECONDS = 20.0  # for the head, from connecting or from its first byte
IDLE_SECONDS = 75  # from an answer to the next request
WRITE_SECONDS = 20.0  # for a client that reads its answer too slowly to read on


@dataclass(frozen=True)
class Address:
    """Where to listen; several processes may share the port, and the kernel deals connections out to them."""

    host: str
    port: int
    processes: int = 1

    def __str__(self) -> str:
        """As in a URL, where an IPv6 address needs brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def bind(self) -> socket.socket:
        """A listening socket, or an OSError if the port is taken or the address is not of this machine."""
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        place, shared = (self.host, self.port), self.processes > 1
        try:
            return socket.create_server(place, family=family, backlog=_BACKLOG, reuse_port=shared)
        except OSError as error:
            raise OSError(f"cannot listen at {self} ({error}). Choose another host or port.") from error


@final
class Listener:
    """An ASGI application behind a socket, as a deployment of Ray Serve that nobody calls.

    `build` makes the application here where it runs; `parts` are deployments that must run before this one.
    """

    async def __init__(  # pyright: ignore  # Ray Serve awaits it
        self, build: Callable[[], ASGIApp], address: Address, *parts: Any
    ) -> None:
        config = uvicorn.Config(
            build(),
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nothing here depends on who the client says it is
            server_header=False,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server.serve(sockets=[address.bind()]))
        while not (self._server.started or self._serving.done()):
            await asyncio.sleep(0.01)
        self.check_health()

    def check_health(self) -> None:
        """Raises if nothing listens any more, so that Ray Serve replaces this process."""
        if self._serving.done():
            raise RuntimeError("the HTTP server of this process has ended") from self._serving.exception()

    def __del__(self) -> Coroutine[Any, Any, None] | None:
        """What Ray Serve calls, and awaits, before it ends the process; a coroutine only if there is something to stop.

        Not `async`: the interpreter calls it too, and awaits nothing.
        """
        serving = getattr(self, "_serving", None)
        return None if serving is None or serving.done() else self.stop()

    async def stop(self) -> None:
        """Answer what has come in, then listen no more."""
        self._server.should_exit = True
        await self._serving


@final
class BoundedConnection(HttpToolsProtocol):
    """Answers 400 to a head that is too large, and drops clients that send or read nothing, or too slowly.

    A timer runs from connecting to the end of the connection, but for the time in which a request is received and
    answered, which the application bounds; another one runs while an answer cannot be written.
    """

    _head_bytes: int | None = None  # of the request whose head is being read

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._timers: dict[str, asyncio.TimerHandle] = {}
        super().connection_made(transport)
        self._drop_after(HEAD_SECONDS, "request")

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in self._timers.values():
            timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise ValueError("too many requests before the first answer")  # the parser makes a 400 of it
        super().on_message_begin()
        self._head_bytes = 0
        if self.cycle is None or self.cycle.response_complete:
            self._drop_after(HEAD_SECONDS, "request")

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= _MAX_HEADERS:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_bytes = None  # what follows is the body, which the application bounds
        self._drop_after(None, "request")
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        waiting = bool(self.pipeline)
        super().on_response_complete()
        self._drop_after(None if waiting else IDLE_SECONDS, "request")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing():
            self._drop_after(HEAD_SECONDS, "request")  # even if the client does not read what is left to write
        elif self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self.send_400_response("The headers are too long.")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._drop_after(WRITE_SECONDS, "answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._drop_after(None, "answer")

    def _drop_after(self, seconds: float | None, timer: Literal["request", "answer"]) -> None:
        """Set a timer anew, or stop it."""
        if timer in self._timers:
            self._timers.pop(timer).cancel()
        if seconds is not None and self in self.connections:
            self._timers[timer] = self.loop.call_later(seconds, self.transport.abort)
