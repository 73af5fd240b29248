"""A process that speaks HTTP by itself, so that a request reaches us without a detour through a proxy."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, final

from starlette.types import ASGIApp

from iqareward.optional import require

BACKLOG = 2048  # connections that the kernel holds until they are accepted: all workers of a trainer may come at once
STOP_SECONDS = 10  # for requests that are still being answered when the process is to end


@dataclass(frozen=True)
class Address:
    """Where to listen.

    Args:
        host: address of this machine.
        port: TCP port.
        processes: that listen there; the kernel deals connections out to them.
    """

    host: str
    port: int
    processes: int = 1

    def __str__(self) -> str:
        """As in a URL, where an IPv6 address needs brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def bind(self) -> socket.socket:
        """A listening socket.

        Raises:
            OSError: the port is taken, or the address is not of this machine.
        """
        family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
        place, shared = (self.host, self.port), self.processes > 1
        try:
            return socket.create_server(place, family=family, backlog=BACKLOG, reuse_port=shared)
        except OSError as error:
            raise OSError(f"cannot listen at {self} ({error}). Choose another host or port.") from error


@final
class Listener:
    """An ASGI application behind a socket, as a deployment of Ray Serve that nobody calls.

    Args:
        build: makes the application, here where it runs.
        address: where it listens.
        parts: deployments that must run before this one.
    """

    async def __init__(  # pyright: ignore  # Ray Serve awaits it
        self, build: Callable[[], ASGIApp], address: Address, *parts: Any
    ) -> None:
        uvicorn = require("uvicorn", extra="serve", purpose="the reward server")
        from iqareward.serving.protocol import IDLE_SECONDS, BoundedConnection

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
            timeout_graceful_shutdown=STOP_SECONDS,
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
