"""Locks and values per process, which survive forks and pickling, and the order of CUDA streams across threads."""

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar, final

import torch
from torch import Tensor


def mark(device: torch.device | None) -> Any:
    """The work that this thread has queued on the device so far, for `take_over`; None where nothing is queued."""
    if device is None or device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    # blocking: a thread that waits for it sleeps, and leaves its core to the others
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True))


def take_over(marked: Any, tensors: Iterable[Tensor]) -> None:
    """Let this thread's further work come after what was marked, and keep the tensors' memory until then; no sync."""
    if marked is None:
        return
    for tensor in tensors:
        stream = torch.cuda.current_stream(tensor.device)
        stream.wait_event(marked)
        tensor.record_stream(stream)  # else the allocator may give the memory away while this stream still reads it


@final
class StreamOrder:
    """Orders the streams of all threads that read what this thread has just made and keeps, without a wait of the host.

    Not needed for what was only copied from ordinary host memory: such a copy returns when the device has it.

    Args:
        device: where it was made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._made = device, mark(device)
        self._maker: Any = None if self._made is None else torch.cuda.current_stream(device)
        self._readers = {self._maker}

    def read(self) -> None:
        """Let this thread's further work come after the making."""
        if self._made is None:
            return
        stream = torch.cuda.current_stream(self._device)
        if stream not in self._readers:
            stream.wait_event(self._made)
            self._readers.add(stream)

    def drop(self) -> None:
        """To be called before it is thrown away: its memory is the maker's, who must not reuse it while others read."""
        if self._maker is not None:
            for stream in self._readers - {self._maker}:
                self._maker.wait_stream(stream)


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
    """A value that each process makes for itself when it first needs it, since threads and locks do not survive a fork.

    Args:
        make: Builds the value, without arguments; picklable if this object is to be pickled.
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
        """Return the value of this process and drop it; the next `get` makes another."""
        with self._lock:
            return self._values.pop(os.getpid(), None)

    def __reduce__(self) -> tuple[type, tuple[Callable[[], T]]]:
        return PerProcess, (self._make,)


def fork_waits_for(lock: Any) -> None:
    """Let forks wait until a re-entrant lock is free: a child would find the guarded work half done for ever."""
    if hasattr(os, "register_at_fork"):  # Windows has no forks
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release)
