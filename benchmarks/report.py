"""Every table and figure of the documentation from the committed results.

    python -m benchmarks.report            # write
    python -m benchmarks.report --check    # exit code 1 if a page or figure is not what the results say

A page marks a place with `<!-- results: NAME -->` and `<!-- /results -->`; what stands between is replaced.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import _classical_tables as classical
from benchmarks import _gpu_tables as gpu
from benchmarks import _tables as tables
from benchmarks._result_figures import FIGURES, is_current
from benchmarks._results import newest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARK = re.compile(r"(?P<open><!-- results: (?P<name>[^>]+?) -->\n).*?(?P<close><!-- /results -->)", re.S)

GPU_RUN = "python benchmarks/gpu/run.py --out OUT"
Build = Callable[[dict[str, Any]], str]
# name in the pages -> theme of the result, what makes the table, and the command that measured it
TABLES: dict[str, tuple[str, Build, str]] = {
    "classical ratios": ("classical", classical.ratios, "python -m benchmarks.bench_classical"),
    "classical speeds": ("classical", classical.speeds, "python -m benchmarks.bench_classical"),
    "classical peaks": ("classical", classical.peaks, "python -m benchmarks.bench_classical"),
    "classical busy": ("classical-busy", classical.busy, "python -m benchmarks.bench_classical --busy"),
    "overhead": ("overhead", tables.overhead, "python -m benchmarks.bench_overhead"),
    "correlation": ("correlation", tables.correlation, "python -m benchmarks.correlation"),
    "light noise": ("correlation", tables.light_noise, "python -m benchmarks.correlation --clean DIR"),
    "round trip": ("correlation", tables.round_trip, "python -m benchmarks.correlation --clean DIR --taesd DIR"),
    "jpeg": ("jpeg-transport", tables.jpeg, "python -m benchmarks.jpeg_transport"),
    "preprocessing": ("preprocessing", tables.preprocessing, "python -m benchmarks.preprocessing"),
    "latency": ("latency", tables.latency, "python -m benchmarks.latency"),
    "rewards": ("latency", tables.rewards, "python -m benchmarks.latency"),
    "meter": ("meter", tables.meter, "python -m benchmarks.meter"),
    "qalign": ("qalign", tables.qalign, "python -m benchmarks.bench_qalign --threads 1"),
    "qalign targets": ("qalign", tables.targets, "python -m benchmarks.bench_qalign --threads 1"),
    "vlm": ("vlm", tables.vlm, "python -m benchmarks.bench_vlm --threads 1"),
    "vlm targets": ("vlm", tables.targets, "python -m benchmarks.bench_vlm --threads 1"),
    "batching": ("batching", tables.batching, "python -m benchmarks.bench_batching"),
    "serving": ("serving", tables.serving, "python -m benchmarks.bench_serving"),
    "requests": ("requests", tables.requests, "python -m benchmarks.bench_requests"),
    "gpu qalign": ("gpu/qalign", gpu.qalign, GPU_RUN),
    "gpu vlm": ("gpu/vlm", gpu.vlm, GPU_RUN),
    "gpu classical": ("gpu/classical", gpu.classical, GPU_RUN),
    "gpu features": ("gpu/classical", gpu.features, GPU_RUN),
    "gpu trainer": ("gpu/train", gpu.trainer, GPU_RUN),
    "gpu targets": ("gpu/qalign", gpu.promises, GPU_RUN),
    "serving targets": ("serving", tables.targets, "python -m benchmarks.bench_serving"),
}


def block(name: str) -> str:
    """A table with the line that says where it comes from.

    Raises:
        KeyError: a page asks for a table that does not exist.
    """
    theme, build, command = TABLES[name]
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
