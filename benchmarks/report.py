"""Every table and figure of the documentation from the committed results.

    python -m benchmarks.report            # write
    python -m benchmarks.report --check    # exit code 1 if a page or figure is not what the results say

A page marks a place with `<!-- results: NAME -->` and `<!-- /results -->`; what stands between is replaced.
"""

import argparse
import hashlib
import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from PIL import Image

from benchmarks import _tables as tables
from benchmarks._harness import newest, newest_file
from benchmarks.restoration import report as photographs
from examples.demo.style import MUTED, RL, SERIES, STYLE
from iqareward.rewards.catalog import CATALOG

ASSETS = Path(__file__).parents[1] / "docs" / "assets"
KEY = "Result"  # of the PNG's text chunk


def digest(theme: str) -> str:
    """Hash of the newest result of a theme."""
    return hashlib.sha256(newest_file(theme).read_bytes()).hexdigest()[:16]


def is_current(file: Path, theme: str) -> bool:
    """Whether a figure shows the newest result; it cannot be compared pixel by pixel across machines."""
    if not file.exists():
        return False
    with Image.open(file) as figure:
        return figure.info.get(KEY) == digest(theme)


@contextmanager
def axes_of(file: Path, theme: str, size: tuple[float, float]) -> Generator[Any]:
    """Axes to draw on; the figure is saved at the end."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        yield figure.add_subplot()
        figure.savefig(file, dpi=160, metadata={KEY: digest(theme), "Software": "iqareward benchmarks"})


def throughput(file: Path, theme: str) -> None:
    """Images per second of ours and of each library that computes the same, 512 pixels, batch 8, log scale."""
    rows = [row for row in newest(theme)["rows"]
            if row.get("images_per_second") and (row["size"], row["batch"]) == (512, 8) and row["same"]]  # fmt: skip
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    with axes_of(file, theme, (9, 4.2)) as axes:
        for place, metric in enumerate(metrics):
            peers = [row for row in rows if row["metric"] == metric and not row["library"].startswith("iqareward")]
            ours = next(row for row in rows if row["metric"] == metric and row["library"] == "iqareward")
            axes.plot([row["images_per_second"] for row in peers], [place] * len(peers), "o", color=MUTED, ms=6)
            axes.plot([ours["images_per_second"]], [place], "D", color=RL, ms=9)
            best = max(peers, key=lambda row: row["images_per_second"])
            axes.plot([best["images_per_second"], ours["images_per_second"]], [place] * 2, color=RL, lw=1.5, zorder=0)
            axes.annotate(best["library"], (best["images_per_second"], place), (0, 7), textcoords="offset points",
                          ha="center", color=MUTED)  # fmt: skip
        axes.set(xscale="log", xlabel="images per second, 512 x 512, batch 8, two threads (log scale)")
        axes.set_yticks(range(len(metrics)), [name.upper().replace("_", " ") for name in metrics])
        axes.invert_yaxis()
        axes.set_title("iqareward (diamond) and every library with the same definition (dots)")


def jpeg_order(file: Path, theme: str) -> None:
    """How much of the order within a group of rollouts each transport leaves, one line per reward."""
    rows = newest(theme)["rows"]
    ways = list(dict.fromkeys(row["transport"] for row in rows))
    places = list(range(len(ways)))
    taus = {name: [row["tau"] for row in rows if row["reward"] == name] for name in {row["reward"] for row in rows}}
    with axes_of(file, theme, (8, 4)) as axes:
        height = 2.0
        for name, values in sorted(taus.items(), key=lambda pair: -pair[1][-1]):
            alone = CATALOG[name].needs_references
            axes.plot(places, values, "o-" if alone else "D-", color=MUTED if alone else RL, lw=1.5, ms=5)
            height = min(values[-1], height - 0.05)  # labels of near values stand below each other
            axes.annotate(name.upper(), (places[-1], height), (9, 0), textcoords="offset points", va="center")
        axes.set_xticks(places, [way.replace("jpeg", "JPEG").replace("png", "PNG, 8 bits") for way in ways])
        axes.set(ylabel="Kendall's tau with the order before", ylim=(0, 1.05), xlim=(-0.15, places[-1] + 0.5))
        axes.set_title("Order of eight rollouts after transport: without a reference (violet), with one (grey)")


def light_noise(file: Path, theme: str) -> None:
    """On what share of clean photographs noise raises a score without a reference, one line per reward."""
    rows = [row for row in newest(theme)["rows"] if row["set"] == "light noise"]
    with axes_of(file, theme, (8, 4)) as axes:
        for row, color in zip(rows, SERIES, strict=False):
            sigmas, shares = [0, *row["sigma"]], [0.0, *(count / row["images"] for count in row["raised"])]
            axes.plot(sigmas, shares, "o-", color=color, lw=1.5, ms=5, label=row["reward"].upper())
        axes.set(xlabel="standard deviation of the noise, of 255", ylabel="share of photographs", ylim=(-0.03, 1.03))
        axes.legend()
        axes.set_title(f"Noise raises the score of a clean photograph ({rows[0]['images']} of them)")


def measured(theme: str) -> bool:
    """Whether the experiment on photographs has runs; the newest result of its theme may be of the one before it."""
    try:
        return "scale" in newest(theme)
    except FileNotFoundError:
        return False


def drawn(file: Path, theme: str, draw: Callable[[Any], Figure]) -> None:
    """A figure that comes whole."""
    metadata = {KEY: digest(theme), "Software": "iqareward benchmarks"}
    draw(newest(theme)).savefig(file, dpi=110, metadata=metadata)


FIGURES: dict[Path, tuple[str, Callable[[Path, str], None]]] = {
    ASSETS / "throughput.png": ("classical", throughput),
    ASSETS / "jpeg_order.png": ("jpeg-transport", jpeg_order),
    ASSETS / "light_noise.png": ("correlation", light_noise),
}
# the experiment on photographs: theme of its results, and the command
PHOTOGRAPHS = {
    "restoration": "python -m benchmarks.restoration",
    "restoration-gpu": "python -m benchmarks.restoration --scale gpu --device cuda",
}
for theme in filter(measured, PHOTOGRAPHS):
    for name, draw in photographs.FIGURES.items():
        FIGURES[ASSETS / photographs.figure_file(theme, name)] = theme, partial(drawn, draw=draw)


ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"(?P<open><!-- results: (?P<name>[^>]+?) -->\n).*?(?P<close><!-- /results -->)", re.S)

GPU_RUN = "python benchmarks/gpu/run.py --out OUT"
Build = Callable[[dict[str, Any]], str]
# name in the pages -> theme of the result, what makes the table, and the command that measured it
TABLES: dict[str, tuple[str, Build, str]] = {
    "classical ratios": ("classical", tables.classical_ratios, "python -m benchmarks.bench_classical"),
    "classical speeds": ("classical", tables.classical_speeds, "python -m benchmarks.bench_classical"),
    "classical peaks": ("classical", tables.classical_peaks, "python -m benchmarks.bench_classical"),
    "classical busy": ("classical-busy", tables.classical_busy, "python -m benchmarks.bench_classical --busy"),
    "overhead": ("overhead", tables.overhead, "python -m benchmarks.bench_overhead"),
    "correlation": ("correlation", tables.correlation, "python -m benchmarks.correlation"),
    "agreement qualisr": ("agreement", tables.agreement_qualisr, "python -m benchmarks.agreement"),
    "agreement noise": ("agreement", tables.agreement_noise, "python -m benchmarks.agreement --kodak DIR --mos FILE"),
    "light noise": ("correlation", tables.light_noise, "python -m benchmarks.correlation --clean DIR"),
    "round trip": ("correlation", tables.round_trip, "python -m benchmarks.correlation --clean DIR --taesd DIR"),
    "jpeg": ("jpeg-transport", tables.jpeg, "python -m benchmarks.jpeg_transport"),
    "preprocessing": ("preprocessing", tables.preprocessing, "python -m benchmarks.preprocessing"),
    "latency": ("latency", tables.latency, "python -m benchmarks.latency"),
    "meter": ("meter", tables.meter, "python -m benchmarks.meter"),
    "qalign": ("qalign", tables.qalign, "python -m benchmarks.bench_qalign --threads 1"),
    "qalign targets": ("qalign", tables.targets, "python -m benchmarks.bench_qalign --threads 1"),
    "vlm": ("vlm", tables.vlm, "python -m benchmarks.bench_vlm --threads 1"),
    "vlm targets": ("vlm", tables.targets, "python -m benchmarks.bench_vlm --threads 1"),
    "batching": ("batching", tables.batching, "python -m benchmarks.bench_batching"),
    "serving": ("serving", tables.serving, "python -m benchmarks.bench_serving"),
    "requests": ("requests", tables.requests, "python -m benchmarks.bench_requests"),
    "datasets": ("datasets", tables.datasets, "python -m benchmarks.bench_datasets"),
    "datasets cost": ("datasets", tables.datasets_cost, "python -m benchmarks.bench_datasets"),
    "cluster failures": ("cluster", tables.cluster_failures, "python -m benchmarks.bench_cluster"),
    "cluster rates": ("cluster", tables.cluster_rates, "python -m benchmarks.bench_cluster"),
    "gpu qalign": ("gpu/qalign", tables.gpu_qalign, GPU_RUN),
    "gpu vlm": ("gpu/vlm", tables.gpu_vlm, GPU_RUN),
    "gpu classical": ("gpu/classical", tables.gpu_classical, GPU_RUN),
    "gpu features": ("gpu/classical", tables.gpu_features, GPU_RUN),
    "gpu trainer": ("gpu/train", tables.gpu_trainer, GPU_RUN),
    "gpu targets": ("gpu/qalign", tables.gpu_targets, GPU_RUN),
    "groups": ("restoration-groups", photographs.groups, "python -m benchmarks.restoration.groups"),
    "serving targets": ("serving", tables.targets, "python -m benchmarks.bench_serving"),
}
for theme, command in PHOTOGRAPHS.items():
    for name, build in photographs.TABLES.items():
        TABLES[f"{theme} {name}"] = theme, build, command


def block(name: str) -> str:
    """A table with the line that says where it comes from.

    Raises:
        KeyError: a page asks for a table that does not exist.
    """
    theme, build, command = TABLES[name]
    if theme in PHOTOGRAPHS and not measured(theme):
        return f"\nNot run yet: `{command}`.\n\n" if name.endswith("progress") else "\n"
    document = newest(theme)
    return f"\n{build(document)}\n\n{tables.caption(document, command)}\n\n"


def rendered(text: str) -> str:
    """A page with every marked place filled in."""
    return MARK.sub(lambda match: match["open"] + block(match["name"]) + match["close"], text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check, stale = parser.parse_args().check, []
    for page in PAGES:
        text = page.read_text()
        if (new := rendered(text)) != text:
            stale.append(page)
            if not check:
                page.write_text(new)
    for file, (theme, draw) in FIGURES.items():
        if not is_current(file, theme):
            stale.append(file)
            if not check:
                draw(file, theme)
    for file in stale:
        print(f"{'stale' if check else 'wrote'} {file.relative_to(ROOT)}")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
