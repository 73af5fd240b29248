"""Restore photographs, train the restorer further by difficulty-adaptive RL, and draw a report of before and after.

    make demo
    python -m examples.demo --output demo-output   # needs `pip install . --group demo`
    python -m examples.demo --quick                # smoke run

It runs offline on a CPU in about five minutes.
"""

import argparse
import json
import logging
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table

# Warnings of packages for quantised models, which diffusers imports and which are not used here.
QUANTIZERS = ("bitsandbytes.backends.cpu.ops", "diffusers.quantizers.torchao.torchao_quantizer", "torch.utils._pytree")
for name in QUANTIZERS:
    logging.getLogger(name).disabled = True

from .experiment import AFTER, BEFORE, THIRDS, VERSIONS, Settings, run, write_scores  # noqa: E402
from .figures import TITLES, picture  # noqa: E402
from .report import number, render, scale  # noqa: E402

QUICK = Settings(updates=2, inputs=4, windows=16, window_side=32, photographs=6, side=96, looks=2)
PACKAGES = ("iqareward", "torch", "diffusers", "accelerate", "matplotlib")


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.demo", description=__doc__, formatter_class=style)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the report")
    parser.add_argument("--quick", action="store_true", help="smoke run: small crops and two updates")
    options, started = parser.parse_args(), time.perf_counter()
    torch.set_num_threads(1)  # the batches are small, and threads that wait for each other are slower
    console, errors = Console(), Console(stderr=True)

    def progress(text: str) -> None:
        errors.print(f"{time.perf_counter() - started:4.0f} s  {text}", highlight=False, soft_wrap=True)

    done = run(QUICK if options.quick else Settings(), progress)
    progress("Drawing the report")
    done.results["seconds"] = time.perf_counter() - started
    done.results["versions"] = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    options.output.mkdir(parents=True, exist_ok=True)
    report, numbers, scores = (options.output / name for name in ("report.html", "results.json", "scores.csv"))
    report.write_text(render(done), encoding="utf-8")
    numbers.write_text(json.dumps(done.results, indent=2) + "\n", encoding="utf-8")
    write_scores(done.results, scores)
    picture(done).save(options.output / "demo_photographs.jpg", quality=90, subsampling=0)
    console.print(printed(done.results), highlight=False)
    console.print(f"Report: {report}   Numbers: {numbers.name}, {scores.name}", highlight=False, soft_wrap=True)
    progress("Done")


def printed(results: Mapping[str, Any]) -> Group:
    """Return the summary for the terminal, at most 80 columns wide."""
    rewards, thirds = (Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)) for _ in range(2))
    for table, headings in ((rewards, ("", *VERSIONS)), (thirds, ("", *THIRDS))):
        for heading in headings:
            table.add_column(heading, justify="right" if heading else "left")
    for name in (*results["rewards"], "rmse"):
        means = {version: number(scale(name) * found[name]) for version, found in results["means"].items()}
        rewards.add_row(TITLES[name], *means.values())
        found = [results["thirds"][third] for third in THIRDS]
        pairs = [[number(scale(name) * each[version][name]) for version in (BEFORE, AFTER)] for each in found]
        thirds.add_row(TITLES[name], *(f"{old} → {new}" for old, new in pairs))
    return Group(
        f"\n[b]{len(results['photographs'])} photographs that the restorer has never seen[/b]\n",
        rewards,
        "\n[b]Before → after RL, in thirds by the error before RL[/b]\n",
        thirds,
        f"\nAlarms of the monitor: {escape('; '.join(results['alarms'])) or 'none'}\n",
    )


if __name__ == "__main__":
    main()
