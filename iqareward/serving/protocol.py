"""HTTP/1.1 as uvicorn reads it, with bounds on the head of a request and on the time in which nothing moves."""

import asyncio
from typing import Literal, final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Of the request line and the headers, which neither httptools nor uvicorn bound. Far above any real one, because a
# chunk counts whole when the end of one request and the start of the next come in it.
MAX_HEAD_BYTES = 2**19
MAX_HEADERS = 200
MAX_PIPELINED = 8  # requests that wait for the answer before theirs; our clients send none
HEAD_SECONDS = 20.0  # for the head, from connecting or from its first byte
IDLE_SECONDS = 75  # from an answer to the next request
WRITE_SECONDS = 20.0  # for a client that reads its answer too slowly to read on


@final
class BoundedConnection(HttpToolsProtocol):
    """Answers 400 to a head that is too large, and drops clients that send or read nothing, or too slowly.

    A timer runs from connecting to the end of the connection, but for the time in which a request is received and
    answered, which the application bounds; another one runs while an answer cannot be written.
    """

    _head_bytes: int | None = None  # of the request whose head is being read

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """A client has connected."""
        self._timers: dict[str, asyncio.TimerHandle] = {}
        super().connection_made(transport)
        self._drop_after(HEAD_SECONDS, "request")

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection has ended."""
        for timer in self._timers.values():
            timer.cancel()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        """The first byte of a request has come."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise ValueError("too many requests before the first answer")  # the parser makes a 400 of it
        super().on_message_begin()
        self._head_bytes = 0
        if self.cycle is None or self.cycle.response_complete:
            self._drop_after(HEAD_SECONDS, "request")

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header is complete."""
        if len(self.headers) >= MAX_HEADERS:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """What follows is the body, which the gate bounds."""
        self._head_bytes = None
        self._drop_after(None, "request")
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """An answer has been written, or at least handed to the transport."""
        waiting = bool(self.pipeline)
        super().on_response_complete()
        self._drop_after(None if waiting else IDLE_SECONDS, "request")

    def data_received(self, data: bytes) -> None:
        """Parse, and look how long the head has become."""
        super().data_received(data)
        if self.transport.is_closing():
            self._drop_after(HEAD_SECONDS, "request")  # even if the client does not read what is left to write
        elif self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("The headers are too long.")

    def pause_writing(self) -> None:
        """The client reads more slowly than its answer is written."""
        super().pause_writing()
        self._drop_after(WRITE_SECONDS, "answer")

    def resume_writing(self) -> None:
        """The client has read on."""
        super().resume_writing()
        self._drop_after(None, "answer")

    def _drop_after(self, seconds: float | None, timer: Literal["request", "answer"]) -> None:
        """Set a timer anew, or stop it."""
        if timer in self._timers:
            self._timers.pop(timer).cancel()
        if seconds is not None and self in self.connections:
            self._timers[timer] = self.loop.call_later(seconds, self.transport.abort)
