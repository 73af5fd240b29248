"""Read what a client sends, and work for it only as long as it waits."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import ClientDisconnect

T = TypeVar("T")
JOINED_AT_ONCE = 2**20  # bytes; above it, Python lets other threads run while it joins


async def read_body(request: Request) -> bytes:
    """The body of a request, without a copy of it in the request and without holding other requests up.

    Raises:
        ClientDisconnect: the client hung up first.
    """
    chunks = [chunk async for chunk in request.stream()]
    if sum(map(len, chunks)) <= JOINED_AT_ONCE:
        return b"".join(chunks)
    return await asyncio.to_thread(b"".join, chunks)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of the work, which is cancelled when the client hangs up.

    Args:
        request: whose body has been read, so that all that can still come from it is the end of the connection.
        work: for this request.

    Raises:
        ClientDisconnect: the client hung up first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
