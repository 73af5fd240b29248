"""Threads that score for others: how they end, and how a call that would wait for itself is found."""

import os
import threading
import weakref
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TypeVar

_EXIT_SECONDS = 10.0  # how long an exiting interpreter waits for the call under way


class Queue(Protocol):
    """What a thread takes its work from."""

    def abandon(self, *, silent: bool) -> None:
        """End the thread soon; with `silent`, leave whoever still waits without an answer."""
        ...


Q = TypeVar("Q", bound=Queue)


def start_worker(owner: object, queue: Q, work: Callable[[Q], None], name: str) -> threading.Thread:
    """Run `work(queue)` on a daemon thread that ends with its owner, or with the interpreter.

    Args:
        owner: without it the thread ends, so neither the queue nor `work` may refer to it.
        queue: what the thread takes its work from.
        work: the loop of the thread.
        name: name of the thread.
    """
    thread = threading.Thread(target=work, args=(queue,), name=name, daemon=True)
    thread.start()
    weakref.finalize(owner, _end, queue, thread, os.getpid())
    return thread


def _end(queue: Queue, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:  # a forked child has the objects but not the thread
        return
    exiting = not threading.main_thread().is_alive()
    # At exit only daemon threads still wait. One woken now would free its tensors while the interpreter ends; torch
    # releases the GIL for that, cannot take it back, and aborts ("terminate called without an active exception").
    queue.abandon(silent=exiting)
    if exiting:  # a mere collection must not wait
        thread.join(_EXIT_SECONDS)


_waiting: ContextVar[frozenset[Any]] = ContextVar("waiting", default=frozenset())


def waiting_workers() -> frozenset[Any]:
    """The workers that wait for the code that calls this, each known by its queue.

    `asyncio.to_thread` carries them into its thread. A thread that a reward starts by itself does not know them.
    """
    return _waiting.get()


def refuse_call_from_within(queue: Queue, wrapper: str, name: str) -> None:
    """Refuse a call that a worker would have to answer while it waits for that very answer.

    Raises:
        RuntimeError: the worker of `queue` waits for the code that calls this.
    """
    if queue in _waiting.get():
        raise RuntimeError(
            f"{wrapper} of {name} was called from within its own reward and would wait for itself for ever. Let that "
            "reward call the wrapped one instead (the attribute `reward`), or a wrapper of its own with another `key`."
        )


@contextmanager
def working(queue: Queue, callers: frozenset[Any]) -> Generator[None]:
    """Score for callers, of which some may be workers themselves.

    Args:
        queue: queue of this thread.
        callers: the workers that wait for the result.
    """
    token = _waiting.set(callers | {queue})
    try:
        yield
    finally:
        _waiting.reset(token)
