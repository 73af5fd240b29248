"""Locks, and values that exist once in each process, which neither a fork nor a pickle may carry over."""

import os
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar, final

T = TypeVar("T")


@final
class ProcessLock:
    """A re-entrant lock that a forked child finds free: the thread that held it at the fork is not in the child."""

    def __init__(self) -> None:
        self._locks: dict[int, Any] = {}

    def __enter__(self) -> None:
        # setdefault is atomic, and a lock that lost the race is dropped unused
        self._locks.setdefault(os.getpid(), threading.RLock()).acquire()

    def __exit__(self, *exception: object) -> None:
        self._locks[os.getpid()].release()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ProcessLock, ()


@final
class PerProcess(Generic[T]):
    """Makes a value when it is first asked for in a process; threads and locks do not survive a fork.

    Args:
        make: builds the value, without arguments; picklable if this object is to be pickled.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = ProcessLock()
        self._values: dict[int, T] = {}

    def get(self) -> T:
        """The value of this process."""
        process = os.getpid()
        with self._lock:
            if process not in self._values:
                self._values[process] = self._make()
            return self._values[process]

    def forget(self) -> T | None:
        """What this process has, which is this object's no more; the next `get` makes another."""
        with self._lock:
            return self._values.pop(os.getpid(), None)

    def __reduce__(self) -> tuple[type, tuple[Callable[[], T]]]:
        return PerProcess, (self._make,)


def fork_waits_for(lock: Any) -> None:
    """Let forks wait until a re-entrant lock is free: a child would find what it guards half done for ever."""
    if hasattr(os, "register_at_fork"):  # Windows has no forks
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
