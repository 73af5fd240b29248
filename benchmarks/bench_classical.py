"""Images per second and peak memory of every classical metric against every other library, in one run.

    python -m benchmarks.bench_classical              # about ten minutes
    python -m benchmarks.bench_classical --device cuda
    python -m benchmarks.bench_classical --busy       # beside a process per core that takes all of its time
    python -m benchmarks.bench_classical --quick      # smoke run

Photographs, degraded; calls are taken in turns and medians reported. `ratio` compares with the fastest peer that
computes the same definition. The last line of standard output is one JSON document.
"""

import argparse
import ctypes
import importlib
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from benchmarks._harness import CPU, document, finish, medians, target
from iqareward import functional as F
from iqareward import load, to_images
from iqareward.functional.brisque import PACKAGED as BRISQUE

Metric = Callable[..., Tensor]


class Peer(NamedTuple):
    """One library's version of a metric: `make()` imports it and gives a function of the same batches as ours."""

    library: str
    make: Callable[[], Metric]
    same: bool = True
    note: str = ""


def gray(images: Tensor) -> Tensor:
    weights = images.new_tensor([0.298936, 0.587043, 0.114021]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True)


def rgb(images: Tensor) -> Tensor:
    return images


def function(path: str, planes: Callable[[Tensor], Tensor], **options: object) -> Callable[[], Metric]:
    """A function of a batch, e.g. `piq.ssim`."""

    def make() -> Metric:
        metric = _find(path)
        return lambda images, references: metric(planes(images), planes(references), **options)

    return make


def module(path: str, planes: Callable[[Tensor], Tensor], **options: object) -> Callable[[], Metric]:
    """A module that is built once, e.g. `piqa.SSIM`."""

    def make() -> Metric:
        metric = _find(path)(**options)
        return lambda images, references: metric(planes(images), planes(references))

    return make


def per_image(path: str, planes: Callable[[Tensor], Tensor], **options: object) -> Callable[[], Metric]:
    """A torch function that gives one number or map per call, in a loop."""

    def make() -> Metric:
        metric = _find(path)
        return lambda images, references: torch.stack(
            [metric(a, b, **options).mean() for a, b in zip(planes(images).split(1), planes(references).split(1))]
        )

    return make


def scikit_image(name: str, planes: Callable[[Tensor], Tensor], **options: object) -> Callable[[], Metric]:
    """A scikit-image function, image by image on NumPy arrays."""

    def make() -> Metric:
        metric = _find(f"skimage.metrics.{name}")

        def score(images: Tensor, references: Tensor) -> Tensor:
            pairs = zip(planes(images).numpy(), planes(references).numpy(), strict=True)
            return torch.tensor([metric(reference, image, data_range=1.0, **options) for image, reference in pairs])

        return score

    return make


def pyiqa(name: str) -> Callable[[], Metric]:
    """A pyiqa metric through its network, which is faster than its wrapper."""

    def make() -> Metric:
        create = _find("pyiqa.create_metric")
        return create(name, device=torch.get_default_device()).net

    return make


def pyiqa_niqe() -> Metric:
    """pyiqa's NIQE under our packaged parameters (its own must be downloaded)."""
    from iqareward.functional.niqe import packaged_model
    from iqareward.functional.nss import clipped_luma

    metric = _find("pyiqa.archs.niqe_arch.niqe")
    model = packaged_model(torch.get_default_device())
    mean, covariance, side = model.mean[None], model.covariance, model.block_size

    def score(images: Tensor) -> Tensor:
        plane = (clipped_luma(images)[0] * 255).round().double()[:, None]
        return metric(plane, mean, covariance, side, side)

    return score


def brisque_vectors() -> tuple[Tensor, Tensor]:
    """Support vectors and their weights, which the other packages would download."""
    path = Path(F.__file__).parent / "data" / BRISQUE
    found = load_file(path, device=str(torch.get_default_device()))
    return found["vectors"], found["weights"]


def pyiqa_brisque() -> Metric:
    vectors, weights = brisque_vectors()
    return partial(_find("pyiqa.archs.brisque_arch.brisque"), sv_coef=weights, sv=vectors)


def piq_brisque() -> Metric:
    vectors, weights = brisque_vectors()
    metric = _find("piq.brisque")
    # its download, in place of which it transposes what it gets
    vars(sys.modules["piq.brisque"])["load_url"] = lambda *_, **__: (weights, vectors.clone())
    return partial(metric, reduction="none")


def _find(path: str) -> Callable[..., object]:
    parent, _, name = path.rpartition(".")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return getattr(importlib.import_module(parent), name)


GAUSSIAN = {"channel_axis": 0, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
TORCHMETRICS = "torchmetrics.functional.image"
UNREDUCED = {"data_range": 1.0, "reduction": "none"}
VALID = {"window_size": 11, "padding": "valid"}

PEERS: dict[str, list[Peer]] = {
    "psnr": [
        Peer("pyiqa", pyiqa("psnr")),
        Peer("piq", function("piq.psnr", rgb, reduction="none")),
        Peer("torchmetrics", function(f"{TORCHMETRICS}.peak_signal_noise_ratio", rgb, dim=(1, 2, 3), **UNREDUCED)),
        Peer("kornia", per_image("kornia.metrics.psnr", rgb, max_val=1.0), note="image by image"),
        Peer("scikit-image", scikit_image("peak_signal_noise_ratio", rgb), note="image by image"),
        Peer("piqa", module("piqa.PSNR", rgb, reduction="none")),
    ],
    "ssim": [
        Peer("pyiqa", pyiqa("ssim"), note="float64; luma in 8 bits, negative structure floored"),
        Peer("piq", function("piq.ssim", gray, downsample=False, reduction="none")),
        Peer("pytorch-msssim", function("pytorch_msssim.ssim", gray, data_range=1.0, size_average=False)),
        Peer("piqa", module("piqa.SSIM", gray, n_channels=1, reduction="none")),
        Peer(
            "torchmetrics",
            function(f"{TORCHMETRICS}.structural_similarity_index_measure", gray, **UNREDUCED),
            same=False,
            note="padded border",
        ),
        Peer("kornia", per_image("kornia.metrics.ssim", gray, **VALID), note="image by image"),
        Peer("scikit-image", scikit_image("structural_similarity", gray, **GAUSSIAN), note="image by image"),
    ],
    "ssim_rgb": [
        Peer("pyiqa", pyiqa("ssimc"), note="float64; negative structure floored"),
        Peer("piq", function("piq.ssim", rgb, downsample=False, reduction="none")),
        Peer("pytorch-msssim", function("pytorch_msssim.ssim", rgb, data_range=1.0, size_average=False)),
        Peer("piqa", module("piqa.SSIM", rgb, reduction="none")),
        Peer(
            "torchmetrics",
            function(f"{TORCHMETRICS}.structural_similarity_index_measure", rgb, **UNREDUCED),
            same=False,
            note="padded border",
        ),
        Peer("kornia", per_image("kornia.metrics.ssim", rgb, **VALID), note="image by image"),
        Peer("scikit-image", scikit_image("structural_similarity", rgb, **GAUSSIAN), note="image by image"),
    ],
    "ms_ssim": [
        Peer("pyiqa", pyiqa("ms_ssim"), note="float64; luma in 8 bits, negative structure floored"),
        Peer("piq", function("piq.multi_scale_ssim", gray, reduction="none")),
        Peer("pytorch-msssim", function("pytorch_msssim.ms_ssim", gray, data_range=1.0, size_average=False)),
        Peer("piqa", module("piqa.MS_SSIM", gray, n_channels=1, reduction="none")),
        Peer(
            "torchmetrics",
            function(f"{TORCHMETRICS}.multiscale_structural_similarity_index_measure", gray, **UNREDUCED),
            same=False,
            note="padded border",
        ),
    ],
    "gmsd": [
        Peer("pyiqa", pyiqa("gmsd"), note="luma rounded to 8 bits"),
        Peer("piq", function("piq.gmsd", gray, reduction="none")),
        Peer("piqa", module("piqa.GMSD", rgb, reduction="none")),
    ],
    "haarpsi": [
        Peer("piq", function("piq.haarpsi", rgb, reduction="none"), note="YIQ matrix of four digits"),
        Peer("piqa", module("piqa.HaarPSI", rgb, reduction="none"), note="YIQ matrix of four digits"),
    ],
    "piqe": [Peer("pyiqa", pyiqa("piqe"))],
    "niqe": [Peer("pyiqa", pyiqa_niqe, note="under our parameters")],
    "brisque": [
        Peer("pyiqa", pyiqa_brisque, note="float32 statistics"),
        Peer("piq", piq_brisque, note="float32 statistics; luma of three digits"),
    ],
}


REPEATS = 3  # calls whose peak memory is measured


def peak_megabytes(metric: str, library: str, size: int, batch: int) -> float | None:
    """What one call adds to the resident memory at its height, in MB; None where the library is missing or failed."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench_classical", "--peak"]
    command += [metric, library, str(size), str(batch)]
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


def peak_of(call: Callable[[], object], device: torch.device = CPU) -> float:
    """What one call adds at its height, in MB: to a GPU's memory, else to this process's (median of a few; Linux)."""
    if device.type == "cuda":
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


def print_peak(metric: str, library: str, size: int, batch: int) -> None:
    """Body of the process that `peak_megabytes` starts."""
    torch.set_num_threads(2)
    function = OURS[metric] if library == "iqareward" else build_peers(metric)[0][library][1]
    few, arguments = (
        photographs(*setting)[: 1 if metric in NO_REFERENCE else 2] for setting in ((1, 256), (batch, size))
    )
    with torch.no_grad():
        function(*few)  # pays for imports, kernels and thread pools
        print(peak_of(lambda: function(*arguments)))


OURS: dict[str, Callable[..., Tensor]] = {
    "psnr": F.psnr,
    "ssim": F.ssim,
    "ssim_rgb": lambda images, references: F.ssim(images, references, color="rgb"),
    "ms_ssim": F.ms_ssim,
    "gmsd": F.gmsd,
    "haarpsi": F.haarpsi,
    "piqe": F.piqe,
    "niqe": F.niqe,
    "brisque": F.brisque,
}
NO_REFERENCE = {"piqe", "niqe", "brisque"}
# A peer that would take longer than this for one call of the next, four times larger setting is left out from there on.
MAX_SECONDS, GROWTH = 8.0, 4
PACKAGES = ["pyiqa", "piq", "torchmetrics", "kornia", "scikit-image", "pytorch-msssim", "piqa"]
# What the project promises beyond "not slower than the fastest peer of the same definition".
PROMISES = [("ssim", "pyiqa", 20.0), ("ms_ssim", "pyiqa", 6.0), ("niqe", "pyiqa", 2.6)]
BUSY_METRICS = ("psnr", "ssim", "ms_ssim", "haarpsi", "gmsd")
BUSY_SLOW = 1.0  # seconds of a call that is made only once beside busy processes
MEMORY_NOISE = 0.1  # MB; Python objects and page granularity


def photographs(count: int, size: int, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """`[count, 3, size, size]` crops of bundled photographs with noise, and the clean ones."""
    from skimage import data

    sources = to_images([data.astronaut(), data.astronaut()[::-1].copy()])
    pixels = torch.nn.functional.interpolate(sources[:, :, :size, :size], size=(size, size), mode="bilinear")
    references = torch.stack([pixels[i % 2].roll((7 * i, 13 * i), (1, 2)) for i in range(count)]).contiguous()
    noise = torch.randn(references.shape, generator=torch.Generator().manual_seed(0))
    return (references + 0.05 * noise).clamp(0, 1).to(device), references.to(device)


def build_peers(
    name: str, device: torch.device = CPU
) -> tuple[dict[str, tuple[Peer, Callable[..., Tensor]]], list[str]]:
    """The peers that are installed and compute on the device, and the names of the others."""
    built, missing = {}, []
    for peer in PEERS[name]:
        if peer.library == "scikit-image" and device.type != "cpu":
            missing.append(peer.library)
            continue
        try:
            with device:
                built[peer.library] = (peer, peer.make())
        except ImportError:
            missing.append(peer.library)
    return built, missing


def measure(
    name: str, size: int, batch: int, rounds: int, slow: set[tuple[str, str, int]], device: torch.device = CPU
) -> list[dict[str, Any]]:
    """One row per library for one metric, size and batch; peers that `slow` names are left out, and said to be."""
    images, references = photographs(batch, size, device)
    arguments = (images,) if name in NO_REFERENCE else (images, references)
    peers, missing = build_peers(name, device)
    skipped = [library for library in peers if (name, library, size) in slow]
    peers = {library: built for library, built in peers.items() if library not in skipped}
    functions = {"iqareward": OURS[name], **{library: metric for library, (_, metric) in peers.items()}}
    if name != "ssim_rgb":
        reward = load(name)
        functions["iqareward reward"] = lambda images, references=None: reward(images, references=references)
    with torch.no_grad():
        expected = OURS[name](*arguments).double().cpu()
        calls = {key: lambda f=f: f(*arguments) for key, f in functions.items()}
        seconds = medians(calls, rounds=rounds, device=device)
        rows = []
        slow |= {(name, library, size) for library in peers if seconds[library] > MAX_SECONDS / GROWTH}
        for library, metric in functions.items():
            scores = torch.as_tensor(metric(*arguments[:2])).detach().double().cpu().reshape(-1)
            difference = (scores.abs() - expected.abs()).abs().max().item() if len(scores) == batch else None
            peer = peers[library][0] if library in peers else None
            rows.append({"metric": name, "size": size, "batch": batch, "library": library,
                         "images_per_second": batch / seconds[library], "same": peer is None or peer.same,
                         "max_difference": difference, "note": peer.note if peer else ""})  # fmt: skip
    absent = {"metric": name, "size": size, "batch": batch, "missing": True}
    return (
        rows
        + [{**absent, "library": library, "why": "missing"} for library in missing]
        + [{**absent, "library": library, "why": "too slow"} for library in skipped]
    )


@contextmanager
def busy_cores() -> Generator[None]:
    """One process on every core that takes all of its time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def measure_busy(name: str, size: int, batch: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row per library that computes the same, with torch's threads and with one, beside busy processes.

    Each turn lasts for a while: whoever has just waited for a core gets it for the next few milliseconds.
    """
    images, references = photographs(batch, size)
    arguments = (images,) if name in NO_REFERENCE else (images, references)
    same = {library: metric for library, (peer, metric) in build_peers(name)[0].items() if peer.same}
    own = torch.get_num_threads()
    speeds: dict[tuple[str, int], list[float]] = {}
    try:
        with torch.no_grad(), busy_cores():
            for _ in range(rounds):
                for library, metric in {"iqareward": OURS[name], "iqareward reward": load(name), **same}.items():
                    for threads in dict.fromkeys((own, 1)):
                        if any(batch / speed > BUSY_SLOW for speed in speeds.get((library, threads), ())):
                            continue
                        torch.set_num_threads(threads)
                        calls, begin = 0, time.perf_counter()
                        while (taken := time.perf_counter() - begin) < seconds:
                            metric(*arguments)
                            calls += 1
                        speeds.setdefault((library, threads), []).append(batch * calls / taken)
    finally:
        torch.set_num_threads(own)
    return [
        {"metric": name, "size": size, "batch": batch, "library": library, "threads": threads,
         "images_per_second": statistics.median(values)}
        for (library, threads), values in speeds.items()
    ]  # fmt: skip


def busy_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours with torch's threads against ours with one, and against the fastest peer with either."""
    targets = []
    for name in dict.fromkeys(row["metric"] for row in rows):
        here = [row for row in rows if row["metric"] == name]
        most = max(row["threads"] for row in here)
        speed = {(row["library"], row["threads"]): row["images_per_second"] for row in here}
        ours = speed["iqareward", most]
        for library in ("iqareward", "iqareward reward"):
            ratio = speed[library, most] / speed[library, 1]
            targets.append(target(f"{name} busy, {library}, {most} threads vs one", ratio, 1.0))
        peers = {library: value for (library, _), value in sorted(speed.items(), key=lambda item: item[1])
                 if not library.startswith("iqareward")}  # fmt: skip
        if peers:
            fastest = max(peers, key=lambda library: peers[library])
            targets.append(target(f"{name} busy vs {fastest}", ours / peers[fastest], 1.0))
    return targets


def compare(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Ratios of ours to the fastest peer of the same definition per setting, and the targets."""
    ratios, targets = [], []
    settings = dict.fromkeys((row["metric"], row["size"], row["batch"]) for row in rows)
    for metric, size, batch in settings:
        setting = (metric, size, batch)
        here = {row["library"]: row for row in rows if (row["metric"], row["size"], row["batch"]) == setting}
        ours = here["iqareward"]["images_per_second"]
        peers = {
            library: row["images_per_second"]
            for library, row in here.items()
            if not library.startswith("iqareward") and row.get("same") and not row.get("missing")
        }
        if not peers:
            continue
        fastest = max(peers, key=lambda library: peers[library])
        ratio = ours / peers[fastest]
        ratios.append({"metric": metric, "size": size, "batch": batch, "fastest_peer": fastest, "ratio": ratio})
        targets.append(target(f"{metric} {size} b{batch} vs {fastest}", ratio, 1.0))
        for promised, library, bound in PROMISES:
            if promised == metric and library in peers:
                targets.append(target(f"{metric} {size} b{batch} vs {library}", ours / peers[library], bound))
    return ratios, targets


def memory_rows(names: list[str], size: int, batch: int) -> list[dict[str, Any]]:
    """Peak memory above the inputs, each in a process of its own."""
    jobs = [(name, library) for name in names for library in ("iqareward", *(peer.library for peer in PEERS[name]))]
    rows = []
    for name, library in track(jobs, "peak memory", console=Console(stderr=True), transient=True):
        peak = peak_megabytes(name, library, size, batch)
        rows.append({"metric": name, "library": library, "size": size, "batch": batch, "peak_mb": peak})
    return rows


def memory_targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours against the smallest peer of the same definition."""
    targets = []
    for name in dict.fromkeys(row["metric"] for row in rows):
        same = {"iqareward", *(peer.library for peer in PEERS[name] if peer.same)}
        peaks = {row["library"]: row["peak_mb"] for row in rows
                 if row["metric"] == name and row["library"] in same and row["peak_mb"] is not None}  # fmt: skip
        ours = peaks.pop("iqareward")
        if peaks:
            least = min(peaks, key=lambda library: peaks[library])
            bound = round(peaks[least] + MEMORY_NOISE, 1)
            targets.append(target(f"{name} peak MB vs {least}", ours, bound, better="lower"))
    return targets


def show(rows: list[dict[str, Any]], ratios: list[dict[str, Any]], console: Console) -> None:
    """A table per metric: settings across, libraries down."""
    for name in dict.fromkeys(row["metric"] for row in rows):
        table = Table(title=f"{name}: images per second", title_justify="left")
        settings = list(dict.fromkeys((row["size"], row["batch"]) for row in rows if row["metric"] == name))
        for column in ("library", *(f"{size} b{batch}" for size, batch in settings), "max difference", "note"):
            table.add_column(column, justify="left" if column in ("library", "note") else "right")
        for library in dict.fromkeys(row["library"] for row in rows if row["metric"] == name):
            cells = [row for row in rows if row["metric"] == name and row["library"] == library]
            if cells[0].get("missing"):
                table.add_row(library, *[cells[0]["why"]] * len(settings), "", "")
                continue
            difference = max(
                (row["max_difference"] for row in cells if row.get("max_difference") is not None), default=None
            )
            speeds = (f"{row['images_per_second']:.1f}" if "images_per_second" in row else row["why"] for row in cells)
            table.add_row(library, *speeds,
                          "" if difference is None else f"{difference:.1e}", cells[0]["note"])  # fmt: skip
        ours = [f"{row['ratio']:.2f}" for row in ratios if row["metric"] == name]
        table.add_row("[bold]ratio to fastest same", *ours, "", "")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smoke run of seconds")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory")
    parser.add_argument("--busy", action="store_true", help="beside a process per core that takes all of its time")
    parser.add_argument("--device", type=torch.device, default=CPU, help="what to measure")
    parser.add_argument("--json", type=Path, help="also write the document here")
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak:
        metric, library, size, batch = arguments.peak
        print_peak(metric, library, int(size), int(batch))
        return
    rows: list[dict[str, Any]] = []
    console, device = Console(stderr=True), arguments.device
    if arguments.busy:
        if device.type != "cpu":
            parser.error("--busy measures the CPU; leave out --device.")
        for name in ("psnr",) if arguments.quick else BUSY_METRICS:
            rounds, seconds = (1, 0.1) if arguments.quick else (3, 1.0)
            found = measure_busy(name, *((64, 2) if arguments.quick else (256, 8)), rounds, seconds)
            for row in found:
                console.print("  ".join(f"{key}={value}" for key, value in row.items()))
            rows += found
        finish(document("classical-busy", rows, busy_targets(rows), PACKAGES), arguments.json)
        return
    names = ["psnr", "ssim", "piqe"] if arguments.quick else list(OURS)
    settings = [(64, 2)] if arguments.quick else [(size, batch) for size in (256, 512) for batch in (1, 8, 32)]
    jobs = [(name, size, batch) for name in names for size, batch in settings]
    slow: set[tuple[str, str, int]] = set()
    for name, size, batch in track(jobs, "timing", console=console, transient=True):
        rows += measure(name, size, batch, rounds=2 if arguments.quick else 5, slow=slow, device=device)
    ratios, targets = compare(rows)
    no_peaks = arguments.quick or arguments.no_memory or device.type != "cpu"
    peaks = [] if no_peaks else memory_rows(names, size=512, batch=8)
    show(rows, ratios, Console(width=150))
    record = document("classical", [*rows, *ratios, *peaks], targets + memory_targets(peaks), PACKAGES, device)
    finish(record, arguments.json)


if __name__ == "__main__":
    main()
