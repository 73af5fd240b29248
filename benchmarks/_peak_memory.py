"""Peak memory of one metric of one library, in a process of its own (`python -m benchmarks._peak_memory`)."""

import ctypes
import subprocess
import sys
from pathlib import Path


def peak_megabytes(metric: str, library: str, size: int, batch: int) -> float | None:
    """What one call adds to the resident memory at its height, in MB; None where the library is missing or failed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks._peak_memory", metric, library, str(size), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def _status(field: str) -> float:
    """A field of this process's status in MB (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {field}; peak memory is measured on Linux only.")


def _main(metric: str, library: str, size: int, batch: int) -> None:
    import torch

    from benchmarks.bench_classical import NO_REFERENCE, OURS, build_peers, photographs

    torch.set_num_threads(2)
    function = OURS[metric] if library == "iqareward" else build_peers(metric)[0][library][1]

    for count, side in ((1, 256), (batch, size)):  # the first pays for imports, kernels and thread pools
        images, references = photographs(count, side)
        arguments = (images,) if metric in NO_REFERENCE else (images, references)
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier calls freed must not hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")  # forget the height reached so far
        before = _status("VmRSS")
        with torch.no_grad():
            function(*arguments)
    print(_status("VmHWM") - before)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
