"""Bounds on bytes: of what the requests of a front process hold together, and of what is worked on at a time."""

import asyncio
import threading
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import final

from iqareward.serving.errors import ServiceError


@final
class Memory:
    """Bytes that all requests of a process may hold together."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.lock = threading.Lock()  # pictures are decoded in other threads


@final
class Reservation:
    """The bytes that one request holds, counted before it does."""

    def __init__(self, memory: Memory) -> None:
        self._memory, self._nbytes, self._released = memory, 0, False

    def grow(self, nbytes: int) -> None:
        """Hold so many bytes more.

        Raises:
            ServiceError: 429, there is no room for them now.
        """
        memory = self._memory
        with memory.lock:
            # a thread may go on for a moment after its request has ended, and nobody would give back what it takes
            if self._released or memory.held + nbytes > memory.most:
                raise ServiceError(429, "overloaded", "the server holds as much as it may; retry.", retry_after=1)
            memory.held += nbytes
            self._nbytes += nbytes

    def release(self) -> None:
        """The request has ended."""
        with self._memory.lock:
            self._memory.held -= self._nbytes
            self._released = True


@final
class Room:
    """Bytes that are worked on at a time; who asks waits for those who asked before.

    Args:
        most: so many at a time; whoever wants more has them all.
    """

    def __init__(self, most: int) -> None:
        self._most = self._free = most
        self._door, self._freed = asyncio.Lock(), asyncio.Event()

    @asynccontextmanager
    async def taken(self, nbytes: int) -> AsyncGenerator[None]:
        """Wait until so many bytes are free, and hold them."""
        nbytes = min(nbytes, self._most)
        async with self._door:
            while self._free < nbytes:
                self._freed.clear()
                await self._freed.wait()
            self._free -= nbytes
        try:
            yield
        finally:
            self._free += nbytes
            self._freed.set()
