"""Pieces of a batch: as large as stay in a CPU's cache, or as fit a budget of bytes on any other device."""

import time
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from iqareward.functional._threads import WINDOW_SECONDS, free_threads

# Intermediates of one piece should stay in cache, and one piece should be worth waking the threads for. Measured with
# pieces of 64 Ki to 1 Mi pixels on a core with 0.5 MB of L2 and 32 MB of L3: smaller ones pay for calls, larger ones
# are up to twice as slow. One thread has less cache and nobody to wake. With 2 MB of L2, 64 / 128 / 256 Ki pixels take
# 13.7, 16.1, 22.6 ms for SSIM of 8 images of 256x256, 4.1, 3.6, 3.4 for GMSD and 12.3, 11.0, 10.9 for HaarPSI.
CPU_PIXELS_PER_CHUNK = 512 * 512
PIXELS_FOR_ONE_THREAD = 256 * 512

# Working memory of one piece on a device. With elements of two bytes or more no tensor of a piece reaches 2^31
# elements, beyond which kernels with 32-bit indices fail or copy.
DEVICE_BYTES = 4 * 2**30
DEVICE_SHARE = 8  # of a device with less than eight times that memory, one part in eight

# Networks enlarge smaller images to about this.
LEAST_PIXELS = 224 * 224

# No formula of this package takes more for a plane or an RGB image, the clean copies of a reward and a graph included.
FORMULA_BYTES_PER_PIXEL = 128


@lru_cache
def working_bytes(device: torch.device) -> int:
    """The memory that one piece may take on a device, beside its input.

    It does not depend on what is free: asking costs a call of the driver each time, counts the blocks that torch keeps
    for reuse as taken, and would let the pieces, and with them the last digit of a network's score, change from call
    to call.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return DEVICE_BYTES
    return min(DEVICE_BYTES, torch.cuda.get_device_properties(device).total_memory // DEVICE_SHARE)


def rows_at_once(
    size: Sequence[int],
    device: torch.device,
    *,
    bytes_per_pixel: float = FORMULA_BYTES_PER_PIXEL,
    threads: int = 2,
) -> int:
    """How many images to work on at a time on a device, at least one.

    Args:
        size: (height, width) of the images.
        device: where they are worked on.
        bytes_per_pixel: working memory for each pixel of an image; on a CPU the cache decides instead.
        threads: How many CPU threads work on them.
    """
    pixels = size[0] * size[1]
    if device.type == "cpu":
        return max(1, (PIXELS_FOR_ONE_THREAD if threads == 1 else CPU_PIXELS_PER_CHUNK) // max(1, pixels))
    return max(1, int(working_bytes(device) // (bytes_per_pixel * max(pixels, LEAST_PIXELS))))


def map_chunks(formula: Callable[..., Tensor], *batches: Tensor, size: Sequence[int] | None = None) -> Tensor:
    """Apply `formula(*pieces) -> [b, ...]` to consecutive pieces of the batches and concatenate.

    Args:
        formula: treats images independently of each other.
        batches: `[B, ..., H, W]`, the first of which decides; others may have any shape `[B, ...]`.
        size: (height, width) to count with; those of the first batch if not given.
    """
    if torch.compiler.is_compiling():  # what it fuses leaves no intermediates, and it cannot ask for threads
        return formula(*batches)
    first, results, start = batches[0], list[Tensor](), 0
    while True:  # the number of threads can change from time to time
        with free_threads(first.device) as threads:
            rows = rows_at_once(first.shape[-2:] if size is None else size, first.device, threads=threads)
            if start == 0 and rows >= first.shape[0]:
                return formula(*batches)
            until = time.perf_counter() + WINDOW_SECONDS
            for begin in range(start, first.shape[0], rows):
                results.append(formula(*(batch[begin : begin + rows] for batch in batches)))
                start = begin + rows
                if time.perf_counter() > until:
                    break
        if start >= first.shape[0]:
            return torch.cat(results)
