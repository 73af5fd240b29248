"""What many clients ask for is worked out once for all of them."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar, final

from iqareward.serving.errors import ServiceError

T = TypeVar("T")


@final
class Recent(Generic[T]):
    """An answer that is at most a second old, however many ask for it; one question is under way at a time.

    Args:
        ask: works the answer out.
        seconds: for which an answer is given again.
        patience: seconds after which whoever waits for an answer gets an error instead.
    """

    def __init__(self, ask: Callable[[], Awaitable[T]], *, seconds: float = 1.0, patience: float = 5.0) -> None:
        self.ask, self.seconds, self.patience = ask, seconds, patience
        self._asking: asyncio.Future[T] | None = None
        self._answered = 0.0

    async def __call__(self) -> T:
        """The answer.

        Raises:
            ServiceError: 503, there is none in time; or whatever `ask` raised.
        """
        if self._asking is None or self._is_old(self._asking):
            self._asking = asyncio.ensure_future(self.ask())
            self._asking.add_done_callback(self._done)
        try:
            async with asyncio.timeout(self.patience):
                return await asyncio.shield(self._asking)  # one who leaves does not stop it for the others
        except TimeoutError:
            raise ServiceError(503, "unavailable", "not known at the moment; retry.", retry_after=1) from None

    def forget(self) -> None:
        """Whoever asks from now on gets a new answer."""
        self._asking = None

    def _is_old(self, asking: asyncio.Future[T]) -> bool:
        return asking.cancelled() or (asking.done() and time.monotonic() - self._answered > self.seconds)

    def _done(self, asking: asyncio.Future[T]) -> None:
        self._answered = time.monotonic()
        if not asking.cancelled():
            asking.exception()  # is looked at, even if all who asked have left
