"""What a call on the device costs: time, memory, kernels, waits; and what the device can do at most."""

import contextlib
import os
import platform
import shutil
import statistics
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks._harness import versions
from benchmarks.gpu.run import ROOT, Clock

Call = Callable[[], Any]
Row = dict[str, Any]

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if CUDA else torch.device("cpu")
HALF = torch.bfloat16 if CUDA else torch.float32  # of the networks at full size
PACKAGES = [
    "torch", "torchvision", "triton", "transformers", "tokenizers", "huggingface_hub", "diffusers", "accelerate",
    "peft", "torchao", "piq", "kornia", "torchmetrics", "pytorch-msssim", "piqa", "lpips", "numpy", "pytest",
    "hypothesis",
]  # fmt: skip


def sync() -> None:
    if CUDA:
        torch.cuda.synchronize()


def noise(*shape: int) -> Tensor:
    """Seeded uniform pixels, the same on every machine."""
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


def ms(call: Call, *, rounds: int = 10, warm: int = 2, most: float = 2.5) -> float:
    """Median milliseconds between events (wall time of one call on a CPU), within about `most` seconds."""
    for _ in range(warm):
        call()
    sync()
    times, began = [], time.perf_counter()
    for _ in range(rounds if CUDA else 1):
        if CUDA:
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            call()
            b.record()
            b.synchronize()
            times.append(a.elapsed_time(b))
        else:
            times.append(1e3 * seconds(call))
        if time.perf_counter() - began > most:
            break
    return round(statistics.median(times), 3)


def seconds(call: Call) -> float:
    """Of one call with the wait for its result."""
    sync()
    start = time.perf_counter()
    call()
    sync()
    return time.perf_counter() - start


def wall_ms(call: Call, rounds: int = 5, most: float = 2.5) -> float:
    """Median milliseconds of a call with the wait for its result: what a trainer sees."""
    times = [seconds(call)]
    while CUDA and len(times) < rounds and sum(times) <= most:
        times.append(seconds(call))
    return round(1e3 * statistics.median(times), 3)


def peak_gib(call: Call) -> float | None:
    """Most memory of a call above what was allocated before it."""
    sync()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    sync()
    return round((torch.cuda.max_memory_allocated() - before) / 2**30, 3) if CUDA else None


def speed(call: Call, batch: int, *, tflop: float = 0.0, ceiling: float = 0.0) -> Row:
    """Time, images per second, rate and memory of a call on `batch` images."""
    device_ms, seen = ms(call), wall_ms(call)
    row = {"ms": device_ms, "wall_ms": seen, "images_per_s": round(1e3 * batch / max(seen, 1e-3), 2)}
    if tflop:
        row["tflops"] = round(batch * tflop / (1e-3 * max(seen, 1e-3)), 1)
        row["share_of_ceiling"] = round(row["tflops"] / ceiling, 3) if ceiling else None
    return row | {"peak_gib": peak_gib(call)}


def waits(call: Call, *, warm: int = 1) -> list[str]:
    """Where a warm call makes the host wait, each place with how often, as far as torch notices."""
    for _ in range(warm):
        call()
    sync()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if CUDA:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            if CUDA:
                torch.cuda.set_sync_debug_mode("default")
    sync()
    places: dict[str, int] = {}
    for warning in caught:
        text = str(warning.message)
        if "synchroniz" in text.lower() and "prototype" not in text:
            name = warning.filename.split("site-packages/")[-1].split(f"{ROOT}/")[-1]
            places[f"{name}:{warning.lineno}"] = places.get(f"{name}:{warning.lineno}", 0) + 1
    return [f"{place} x{count}" for place, count in places.items()]


def kernels(call: Call, top: int = 14) -> Row:
    """Launches, device time and the heaviest kernels of one warm call."""
    call()
    sync()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU], acc_events=True) as seen:
        call()
        sync()
    events = [event for event in seen.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    events = sorted((e for e in events if e.self_device_time_total > 0), key=lambda e: -e.self_device_time_total)
    rows = [[e.key[:90], e.count, round(e.self_device_time_total / 1e3, 3)] for e in events]
    launches, device_ms = sum(row[1] for row in rows), round(sum(row[2] for row in rows), 2)
    return {"launches": launches, "device_ms": device_ms, "top": rows[:top]}


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`unittest.mock` cannot set the properties of `torch.backends`."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).abs().nan_to_num(0).max())


def equal(one: Tensor, other: Tensor) -> bool:
    """Bit by bit, NaN like NaN."""
    return bool(torch.equal(one.nan_to_num(-9), other.nan_to_num(-9)))


def canary(clock: Clock) -> None:
    """The first stage: seconds that teach something even if nothing else runs."""
    clock.step("torch", start, most=90)
    clock.step("tiny rewards", tiny_rewards, most=60)
    side, num_bytes = (256, 2**20) if clock.tiny else (8192, 2**31)
    clock.step("tflops_bf16", partial(product, side, torch.bfloat16))
    clock.step("copy_tb_per_s", partial(copy, num_bytes))
    clock.step("eager_launch_us", launches)
    if CUDA:
        clock.step("tflops_tf32", partial(product, side, torch.float32, tf32=True))
        clock.step("h2d_pinned_gb_per_s", partial(from_host, num_bytes, pinned=True))
    clock.step("h2d_pageable_gb_per_s", partial(from_host, num_bytes, pinned=False))
    clock.step("tflops_fp32", partial(product, side, torch.float32))


def start() -> Row:
    """The machine and its software; triton's launcher needs a compiler and Python.h."""
    row: Row = {"cuda_s": round(seconds(lambda: torch.zeros(1, device=DEVICE)), 1), "cores": os.cpu_count()}
    row |= {"versions": versions(PACKAGES), "python": platform.python_version(), "device": "cpu"}
    row["compilers"] = [name for name in ("gcc", "cc", "g++", "nvcc", "ninja") if shutil.which(name)]
    row["Python.h"] = (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()
    if CUDA:
        facts, (free, whole) = torch.cuda.get_device_properties(0), torch.cuda.mem_get_info()
        row |= {"device": facts.name, "memory_gib": [round(free / 2**30, 1), round(whole / 2**30, 1)]}
        row |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return row


def tiny_rewards() -> Row:
    """SSIM and a tiny Q-Align, on the CPU and on the device."""
    import iqareward
    from tests.owl2.owl2_tiny import SMALL, seeded_model

    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    far = images.to(DEVICE)
    ssim, owl = iqareward.load("ssim"), iqareward.QAlignReward(seeded_model(SMALL))
    expected = ssim(images, references=images.flip(-1)), owl(images)
    found = ssim(far, references=far.flip(-1)), owl.to(DEVICE)(far)
    gaps = [gap(a.cpu(), b) for a, b in zip(found, expected, strict=True)]
    return {"ssim_gap": gaps[0], "qalign_gap": gaps[1], "scored_on": str(found[1].device)}


def product(side: int, dtype: torch.dtype, *, tf32: bool = False) -> float:
    """TFLOP/s of a large matrix product."""
    a, b = (torch.randn(side, side, device=DEVICE, dtype=dtype) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        return round(2 * side**3 / (1e-3 * ms(lambda: a @ b, rounds=20, most=1.0)) / 1e12, 1)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False


def copy(num_bytes: int) -> float:
    """TB/s, read and written."""
    a = torch.empty(num_bytes // 4, device=DEVICE)
    b = torch.empty_like(a)
    return round(2 * a.nbytes / (1e-3 * ms(lambda: b.copy_(a), most=1.0)) / 1e12, 2)


def from_host(num_bytes: int, *, pinned: bool) -> float:
    """GB/s of a batch of images."""
    host = torch.rand(min(num_bytes // 4, 32 * 3 * 512 * 512))
    host = host.pin_memory() if pinned else host
    return round(host.nbytes / (1e6 * wall_ms(lambda: host.to(DEVICE, non_blocking=pinned))), 2)


def launches() -> float:
    """Microseconds of a small kernel: the milliseconds of a thousand."""
    small = torch.zeros(16, device=DEVICE)
    return round(wall_ms(lambda: [small.add_(1) for _ in range(1000)]), 2)
