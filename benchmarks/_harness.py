"""Shared by all benchmarks: interleaved medians, the record of a run, and the committed results."""

import datetime
import json
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "results"
_DATED = re.compile(r".*_(\d{4}-\d{2}-\d{2})(_\w+)?\.json")


def newest_file(theme: str, folder: Path = FOLDER) -> Path:
    """The file of the newest result of a theme; of `theme/part`, the newest that has measured this part.

    Raises:
        FileNotFoundError: there is none.
    """
    found = []
    name, _, part = theme.partition("/")
    for file in folder.glob(f"{name}_*.json"):
        dated, document = _DATED.fullmatch(file.name), json.loads(file.read_text())
        if dated and document["theme"] == name and (not part or document.get(part)):
            found.append((dated[1], document.get("date", ""), file.name, file))
    if not found:
        raise FileNotFoundError(
            f"no result of {theme!r} in {folder}; run the benchmark with --json {theme}_<hardware>_<date>.json"
        )
    return max(found)[3]


def newest(theme: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The newest result of a theme."""
    return json.loads(newest_file(theme, folder).read_text())


CPU = torch.device("cpu")


def hardware(device: torch.device = CPU) -> str:
    """The GPU that was measured, or the processor and the threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Installed versions; a package that is missing is named as missing."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def commit() -> str:
    """The commit that ran, marked if the working tree differed from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    described = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return described.stdout.strip() or "unknown"


def medians(
    calls: Mapping[str, Callable[[], object]], *, rounds: int, slow: float = 2.0, device: torch.device = CPU
) -> dict[str, float]:
    """Median seconds of each call, taken in turns so that a busy moment hits all of them.

    Args:
        calls: calls by name; each is called once to warm up.
        rounds: number of timed calls of each.
        slow: a call whose warm-up takes longer than this many seconds is timed once more only.
        device: device of the calls; a GPU's own clock times its work.
    """
    warm_up = {name: elapsed(call, device) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name, call in calls.items():
            if turn == 0 or warm_up[name] < slow:
                times[name].append(elapsed(call, device))
    return {name: statistics.median(values) for name, values in times.items()}


def document(
    theme: str,
    rows: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]],
    packages: Sequence[str],
    device: torch.device = CPU,
) -> dict[str, Any]:
    """The record of a run: which device was measured, when, the rows and how they stand against the targets."""
    return {
        "theme": theme,
        "hardware": hardware(device),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "versions": versions(["iqareward", "torch", "numpy", *packages]),
        "rows": list(rows),
        "targets": list(targets),
    }


def target(name: str, value: float, bound: float, better: str = "higher") -> dict[str, Any]:
    """A line of `targets`: whether a measured value reaches its bound."""
    ok = value >= bound if better == "higher" else value <= bound
    return {"name": name, "value": round(value, 3), "target": bound, "better": better, "ok": ok}


def finish(record: Mapping[str, Any], path: Path | None) -> None:
    """Write the record to `path` if given, and print it as the last line of standard output."""
    line = json.dumps(record)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")
    print(line, flush=True)


def elapsed(call: Callable[[], object], device: torch.device = CPU) -> float:
    """Seconds of one call; on a GPU, from its first kernel to its last."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin
