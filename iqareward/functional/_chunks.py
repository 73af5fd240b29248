"""Work on pieces of a batch, with as many threads as find a free core, and on constants that are copied once.

Pieces are as large as stay in a CPU's cache, or fit a budget of bytes on any other device.
"""

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor

# Intermediates of one piece should stay in cache, and one piece should be worth waking the threads for. Measured with
# pieces of 64 Ki to 1 Mi pixels on a core with 0.5 MB of L2 and 32 MB of L3: smaller ones pay for calls, larger ones
# are up to twice as slow. One thread has less cache and nobody to wake. With 2 MB of L2, 64 / 128 / 256 Ki pixels take
# 13.7, 16.1, 22.6 ms for SSIM of 8 images of 256x256, 4.1, 3.6, 3.4 for GMSD and 12.3, 11.0, 10.9 for HaarPSI.
CPU_PIXELS_PER_CHUNK = 512 * 512
_PIXELS_FOR_ONE_THREAD = 256 * 512

# Working memory of one piece on a device. With elements of two bytes or more no tensor of a piece reaches 2^31
# elements, beyond which kernels with 32-bit indices fail or copy.
_DEVICE_BYTES = 4 * 2**30
_DEVICE_SHARE = 8  # of a device with less than eight times that memory, one part in eight

# Networks enlarge smaller images to about this.
_LEAST_PIXELS = 224 * 224

# No formula of this package takes more for a plane or an RGB image, the clean copies of a reward and a graph included.
FORMULA_BYTES_PER_PIXEL = 128

# A core is shared between processes in slices of about 3 ms. In a shorter window one slice would decide.
_WINDOW_SECONDS = 0.02
# Share of the time that a thread runs. On free cores it is 0.99 or more, beside one process per core 0.5 or less.
CROWDED, CALM = 0.75, 0.95
# Short calls find a core even where there is none to spare, so more threads are tried in vain again and again. The
# longer that took, the longer it is not repeated.
PATIENCE_WINDOWS, MAX_PATIENCE_SECONDS = 10, 10.0


@lru_cache
def _working_bytes(device: torch.device) -> int:
    """The memory that one piece may take on a device, beside its input.

    It does not depend on what is free: asking costs a call of the driver each time, counts the blocks that torch keeps
    for reuse as taken, and would let the pieces, and with them the last digit of a network's score, change from call
    to call.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return _DEVICE_BYTES
    return min(_DEVICE_BYTES, torch.cuda.get_device_properties(device).total_memory // _DEVICE_SHARE)


def rows_at_once(
    size: Sequence[int],
    device: torch.device,
    *,
    bytes_per_pixel: float = FORMULA_BYTES_PER_PIXEL,
    threads: int = 2,
) -> int:
    """How many images of (height, width) to work on at a time; on a CPU the cache decides, not `bytes_per_pixel`."""
    pixels = size[0] * size[1]
    if device.type == "cpu":
        return max(1, (_PIXELS_FOR_ONE_THREAD if threads == 1 else CPU_PIXELS_PER_CHUNK) // max(1, pixels))
    return max(1, int(_working_bytes(device) // (bytes_per_pixel * max(pixels, _LEAST_PIXELS))))


def map_chunks(formula: Callable[..., Tensor], *batches: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Apply `formula(*pieces) -> [b, ...]` to consecutive pieces of the batches and concatenate.

    The pieces are as large as suits images of `size`, by default (height, width) of the first batch.
    """
    if torch.compiler.is_compiling():  # what it fuses leaves no intermediates, and it cannot ask for threads
        return formula(*batches)
    first, results, start = batches[0], list[Tensor](), 0
    while True:  # the number of threads can change from time to time
        with free_threads(first.device) as threads:
            rows = rows_at_once(first.shape[-2:] if size is None else size, first.device, threads=threads)
            if start == 0 and rows >= first.shape[0]:
                return formula(*batches)
            until = time.perf_counter() + _WINDOW_SECONDS
            for begin in range(start, first.shape[0], rows):
                results.append(formula(*(batch[begin : begin + rows] for batch in batches)))
                start = begin + rows
                if time.perf_counter() > until:
                    break
        if start >= first.shape[0]:
            return torch.cat(results)


class _Observed(threading.local):
    """What the calling thread has seen of its share of the cores."""

    seconds = running = 0.0
    halvings = 0  # of the number of threads
    rest = patience = 0.0  # seconds of work on free cores before more threads are tried again, left and in all
    is_inside = False  # a block, whose number of threads holds for those within it


_observed = _Observed()


class free_threads:  # no generator, which takes as long as a small operator
    """Within the block, operators on the CPU use only as many of torch's threads as find a free core.

    Torch's threads divide each operator between them and wait for each other at its end. Beside processes that take
    every core, as data loaders do, one of them is always suspended, and two threads are 5 to 50 times slower than one.
    So the share of the time that the calling thread runs is observed: the number of threads is halved while that is
    little, and doubled again when it is nearly all of the time. This applies to the calling thread alone, and only
    where torch uses OpenMP (not on Windows). Entering yields the number of threads.
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
    if seen.seconds < _WINDOW_SECONDS:
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


@lru_cache(maxsize=64)
def constant(
    values: tuple[float, ...] | tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`values` as a tensor that all callers share and none may change.

    A copy in every call would make the host wait for the device each time. The wait of the first call makes the tensor
    safe for every stream; an event would do so too, but capturing a CUDA graph forbids it.
    """
    with torch.inference_mode(False):  # an ordinary tensor whoever asks first: later callers may want gradients
        return torch.tensor(values, dtype=dtype, device=device)
