"""Peak memory of one metric of one library, in a process of its own (`python -m benchmarks._peak_memory`)."""

import ctypes
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

REPEATS = 3


def peak_megabytes(metric: str, library: str, size: int, batch: int) -> float | None:
    """What one call adds to the resident memory at its height, in MB; None where the library is missing or failed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks._peak_memory", metric, library, str(size), str(batch)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors leave at once: no fragments counted
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1], env=environment
    )
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def _status(field: str) -> float:
    """A field of this process's status in MB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory is measured on Linux only.")


def peak_of(call: Callable[[], object], device: "torch.device | None" = None) -> float:
    """What one call adds at its height, in MB: to a GPU's memory, else to this process's (median of a few; Linux)."""
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    peaks = []
    for _ in range(REPEATS):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed must not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # forget the height reached so far
        before = _status("VmRSS")
        call()
        peaks.append(_status("VmHWM") - before)
    return statistics.median(peaks)


def _arguments(metric: str, count: int, size: int) -> tuple["Tensor", ...]:
    from benchmarks.bench_classical import NO_REFERENCE, photographs

    images, references = photographs(count, size)
    return (images,) if metric in NO_REFERENCE else (images, references)


def _main(metric: str, library: str, size: int, batch: int) -> None:
    import torch

    from benchmarks.bench_classical import OURS, build_peers

    torch.set_num_threads(2)
    function = OURS[metric] if library == "iqareward" else build_peers(metric)[0][library][1]

    with torch.no_grad():
        function(*_arguments(metric, 1, 256))  # pays for imports, kernels and thread pools
        arguments = _arguments(metric, batch, size)
        print(peak_of(lambda: function(*arguments)))


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
