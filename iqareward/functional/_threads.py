"""Use as many of torch's threads as there are cores free for them.

These threads divide each operator between them and wait for each other at its end. Beside processes that take every
core, as data loaders do, one of them is always suspended, and the others wait for it a hundred times per image: two
threads are then 5 to 50 times slower than one.
"""

import ctypes
import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import cast

import torch

# A core is shared between processes in slices of about 3 ms. In a shorter window one slice would decide.
WINDOW_SECONDS = 0.02
# Share of the time that a thread runs. On free cores it is 0.99 or more, beside one process per core 0.5 or less.
CROWDED, CALM = 0.75, 0.95
# Short calls find a core even where there is none to spare, so more threads are tried in vain again and again. The
# longer that took, the longer it is not repeated.
PATIENCE_WINDOWS, MAX_PATIENCE_SECONDS = 10, 10.0


class _Observed(threading.local):
    """What the calling thread has seen of its share of the cores."""

    seconds = running = 0.0
    halvings = 0  # of the number of threads
    rest = patience = 0.0  # seconds of work on free cores before more threads are tried again, left and in all
    is_inside = False  # a block, whose number of threads holds for those within it


_observed = _Observed()


class free_threads:  # no generator, which takes as long as a small operator
    """Within the block, operators on the CPU use only as many of torch's threads as find a free core.

    The calling thread is observed: what share of the time it runs, rather than waits for a core or for other threads.
    The number of threads is halved while that is little, and doubled again when it is nearly all of the time. That
    applies to the calling thread alone, and only where torch uses OpenMP (not on Windows).

    Entering yields the number of threads, at most `torch.get_num_threads()`.

    Args:
        device: where the block computes; what waits for a GPU says nothing about cores. On a CPU, digits must not
            depend on the number of threads.
    """

    def __init__(self, device: torch.device) -> None:
        self._own = self._threads = 1 if torch.compiler.is_compiling() else torch.get_num_threads()
        self._observes = self._own > 1 and device.type == "cpu"

    def __enter__(self) -> int:
        self._observes = self._observes and not _observed.is_inside and _openmp() is not None
        if self._observes:
            _observed.is_inside = True
            self._threads = max(1, self._own >> _observed.halvings)
            self._mkl_before = _limit(self._threads) if self._threads < self._own else 0
            self._start, self._running = time.perf_counter(), time.thread_time()
        return self._threads

    def __exit__(self, *_: object) -> None:
        if self._observes:
            seconds, running = time.perf_counter() - self._start, time.thread_time() - self._running
            _observed.is_inside = False
            if self._threads < self._own:
                _limit(self._own, self._mkl_before)
            _observe(seconds, running, self._threads, self._own)


def _limit(threads: int, mkl_threads: int | None = None) -> int:
    """Change the number of threads for the operators of this thread alone; gives that of MKL so far.

    `torch.set_num_threads` also changes it for threads that begin later.
    """
    cast("Callable[[int], None]", _openmp())(threads)
    mkl = _mkl()
    return mkl(threads if mkl_threads is None else mkl_threads) if mkl else 0


def _observe(seconds: float, running: float, threads: int, own: int) -> None:
    seen = _observed
    seen.seconds += seconds
    seen.running += running
    if seen.seconds < WINDOW_SECONDS:
        return
    window, share = seen.seconds, seen.running / seen.seconds
    seen.seconds = seen.running = 0.0
    if share < CROWDED:
        if threads > 1:
            seen.halvings += 1
            seen.patience = min(max(2 * seen.patience, PATIENCE_WINDOWS * window), MAX_PATIENCE_SECONDS)
        seen.rest = seen.patience
    elif share > CALM:
        seen.rest -= window
        if seen.rest <= 0:
            seen.halvings = max(0, seen.halvings - 1)
            if threads == own:
                seen.patience = 0.0


@lru_cache
def _openmp() -> Callable[[int], None] | None:
    """`omp_set_num_threads` of the library that torch calls."""
    try:
        return ctypes.CDLL(None).omp_set_num_threads
    except (AttributeError, OSError, TypeError):  # Windows, and torch without OpenMP
        return None


@lru_cache
def _mkl() -> Callable[[int], int] | None:
    """MKL has a number of its own, by which it also divides logarithms and powers; gives the number so far."""
    try:
        return ctypes.CDLL(torch._C.__file__).MKL_Set_Num_Threads_Local  # pyright: ignore[reportPrivateUsage]
    except (AttributeError, OSError):
        return None
