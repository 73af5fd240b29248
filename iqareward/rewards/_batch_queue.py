"""Calls that wait to be merged into one batch: a bounded queue, first come, first served."""

import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, final

from iqareward.rewards._streams import mark
from iqareward.rewards._worker_thread import waiting_workers
from iqareward.rewards.calls import Call
from iqareward.types import Scores


@final
class Waiting:
    """A call on its way: its rows, and the future of its scores."""

    def __init__(self, call: Call) -> None:
        self.call = call
        self.marked = mark(call.device)
        self.callers = waiting_workers()
        self.admitted: Future[None] = Future()
        self.scores: Future[tuple[Scores, Any]] = Future()

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.admitted.cancel()
        self.scores.cancel()


@final
@dataclass(frozen=True)
class BatchLimits:
    """When a batch is large enough, and when nobody waits any longer.

    Args:
        max_batch: rows of a batch at most; no call may be larger.
        max_wait_ms: how long a free worker waits for more calls.
        max_wait_share: the same as a share of what the last batch took. Callers who are slow to come back, for example
            over a network, would otherwise miss each other's batches: many small ones instead of few large ones.
        max_queue: rows that wait inside at most; a call beyond is admitted later.

    Raises:
        ValueError: a bound is out of range.
    """

    max_batch: int
    max_wait_ms: float
    max_wait_share: float
    max_queue: int

    def __post_init__(self) -> None:
        if not (1 <= self.max_batch <= self.max_queue and self.max_wait_ms >= 0 and self.max_wait_share >= 0):
            raise ValueError(f"MicroBatched expected 1 <= max_batch <= max_queue and waits of at least 0, got {self}.")

    def patience(self, seconds: float) -> float:
        """Seconds to wait for more calls after a batch that took `seconds`."""
        return max(self.max_wait_ms / 1000, self.max_wait_share * seconds)


@final
class BatchQueue:
    """Callers put calls in, one worker takes batches out.

    A free worker waits for more calls: until the batch is full, or as many calls have come as were around at the end of
    the last batch (threads in a loop come back all at once, and a caller alone must not wait for nobody), or its
    patience ends.

    Args:
        limits: of batches and waiting.
    """

    def __init__(self, limits: BatchLimits) -> None:
        self._limits = limits
        self._patience = limits.patience(0.0)
        # re-entrant: a garbage collection may close a queue while this thread holds its lock
        self._changed = threading.Condition(threading.RLock())
        self._inside: deque[Waiting] = deque()
        self._outside: deque[Waiting] = deque()
        self._rows = 0
        self._company = 1
        self._closed = False
        self.silent = False  # nobody is to be answered any more

    def put(self, waiting: Waiting) -> None:
        """Queue a call; its `admitted` is done when it has a place inside.

        Raises:
            RuntimeError: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise RuntimeError("this MicroBatched is closed; make a new one.")
            self._outside.append(waiting)
            self._admit()
            if len(self._inside) == 1 or self._enough():
                self._changed.notify()

    def take(self) -> list[Waiting]:
        """The next batch; empty when the queue is closed and nothing is left."""
        with self._changed:
            while True:
                while not self._inside and not self._closed:
                    self._changed.wait()
                self._wait_for_company()
                batch, rows = [], 0
                while self._inside and rows + len(self._inside[0].call) <= self._limits.max_batch:
                    waiting = self._inside.popleft()
                    self._rows -= len(waiting.call)
                    if waiting.scores.set_running_or_notify_cancel():
                        rows += len(waiting.call)
                        batch.append(waiting)
                self._admit()
                if batch or (self._closed and not self._inside):
                    return batch

    def finished(self, calls: int, seconds: float) -> None:
        """That many calls, which took so long, are about to be answered; before they are, so that none counts twice."""
        with self._changed:
            self._company = calls + len(self._inside)
            self._patience = self._limits.patience(seconds)

    def close(self) -> None:
        """Take nothing more; what is inside is still answered."""
        with self._changed:
            self._closed = True
            lost = [*self._outside]
            self._outside.clear()
            self._changed.notify_all()
        _fail(lost)

    def abandon(self, *, silent: bool) -> None:
        """Take nothing more, and answer nothing more; whoever waits gets an error, unless `silent`."""
        with self._changed:
            self._closed, self.silent = True, silent
            lost = [*self._inside, *self._outside]
            self._inside.clear()
            self._outside.clear()
            self._changed.notify_all()
        if not silent:
            _fail(lost)

    def _enough(self) -> bool:
        return self._closed or self._rows >= self._limits.max_batch or len(self._inside) >= self._company

    def _wait_for_company(self) -> None:
        until = time.monotonic() + self._patience
        while self._inside and not self._enough():
            left = until - time.monotonic()
            if left <= 0:
                return
            self._changed.wait(left)

    def _admit(self) -> None:
        """Let calls in while there is room; one is always let into an empty queue."""
        while self._outside and (not self._inside or self._rows + len(self._outside[0].call) <= self._limits.max_queue):
            waiting = self._outside.popleft()
            if waiting.admitted.set_running_or_notify_cancel():
                self._inside.append(waiting)
                self._rows += len(waiting.call)
                waiting.admitted.set_result(None)


def _fail(lost: list[Waiting]) -> None:
    error = RuntimeError("this MicroBatched was closed while the call was waiting.")
    for waiting in lost:
        for future in (waiting.admitted, waiting.scores):
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_exception(error)
