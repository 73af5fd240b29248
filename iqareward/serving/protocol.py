"""HTTP/1.1 as uvicorn reads it, with a bound on what stands before the body."""

from typing import final

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

# Of the request line and the headers, which neither httptools nor uvicorn bound. Far above any real one, because a
# chunk counts whole when the end of one request and the start of the next come in it.
MAX_HEAD_BYTES = 2**19


@final
class BoundedHead(HttpToolsProtocol):
    """Answers 400 and hangs up when a client sends headers without end."""

    _head_bytes: int | None = None  # of the request whose head is being read

    def on_message_begin(self) -> None:
        """A request starts."""
        super().on_message_begin()
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """What follows is the body, which the gate bounds."""
        self._head_bytes = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Parse, and look how long the head has become."""
        super().data_received(data)
        if self._head_bytes is None or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The headers are too long.")
