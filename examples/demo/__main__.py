"""Score damaged photographs, train a small restorer with difficulty-adaptive weights, and draw a report.

    make demo
    python -m examples.demo --output demo-output   # needs `pip install . --group demo`
    python -m examples.demo --quick                # smoke run

It runs offline on a CPU in about five minutes.
"""

import argparse
import json
import logging
import time
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

from .experiment import DAMAGES, measure, summary, title, write_scores  # noqa: E402
from .figures import MEASURES, save_figures  # noqa: E402
from .report import number, render, thirds_rows  # noqa: E402
from .training import Settings, Trained, train  # noqa: E402

QUICK = Settings(
    size=16, num_scenes=32, num_held_out=9, channels=(8, 8), sft_updates=4, reward_updates=4, rl_updates=4,
    inputs=4, group_size=2, num_steps=2,
)  # fmt: skip
PACKAGES = ("iqareward", "torch", "diffusers", "scikit-image", "matplotlib")


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.demo", description=__doc__, formatter_class=style)
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder for the report")
    parser.add_argument("--quick", action="store_true", help="smoke run: two photographs, four updates")
    options, started = parser.parse_args(), time.perf_counter()
    torch.set_num_threads(1)  # the batches are small, and threads that wait for each other are slower
    console, errors = Console(), Console(stderr=True)

    def progress(text: str) -> None:
        errors.print(f"{time.perf_counter() - started:4.0f} s  {text}", highlight=False, soft_wrap=True)

    photographs, short_side, levels = (2, 192, 2) if options.quick else (4, 384, 5)
    measured = measure(photographs, short_side, levels, progress)
    trained = train(QUICK if options.quick else Settings(), progress)
    progress("Drawing the figures")
    options.output.mkdir(parents=True, exist_ok=True)
    figures = save_figures(measured, trained, options.output)
    results = summary(measured)
    results["training"] = {measure: trained.thirds(measure) for measure in MEASURES}
    results["alarms"] = trained.alarms
    results["seconds"] = time.perf_counter() - started
    results["versions"] = ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES)
    report, numbers, scores = (options.output / name for name in ("report.html", "results.json", "scores.csv"))
    report.write_text(render(measured, trained, results, figures), encoding="utf-8")
    numbers.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    write_scores(measured, scores)
    console.print(printed(results, trained), highlight=False)
    console.print(f"Report: {report}   Numbers: {numbers.name}, {scores.name}", highlight=False, soft_wrap=True)
    progress("Done")


def printed(results: dict[str, Any], trained: Trained) -> Group:
    """Return the summary for the terminal, at most 80 columns wide."""
    rewards, thirds = (Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)) for _ in range(2))
    for heading in ("reward", *DAMAGES, "mistakes"):
        rewards.add_column(heading, justify="left" if heading == "reward" else "right")
    for name, found in results["rewards"].items():
        pairs = [(cell["mean"], cell["worst"]) for cell in found["correlation"].values()]
        cells = [f"{number(mean, '.2f')} ({number(worst, '.2f')})" for mean, worst in pairs]
        rewards.add_row(title(name), *cells, f"{found['above_original']:.0%}")
    weights = ", ".join(f"x{row['errors']:g}: {row['rl']:.2f} + {row['sft']:.2f}" for row in results["mean_weights"])
    for heading in ("scenes", *(heading for heading, _ in MEASURES.values())):
        thirds.add_column(heading, justify="left" if heading == "scenes" else "right")
    for line in thirds_rows(trained):
        thirds.add_row(*line)
    return Group(
        "\n[b]Does the score fall when the image gets worse?[/b]",
        "[dim]Rank correlation of score and damage, mean (worst photograph); -1: it falls at\n"
        "every step. Mistakes: damaged images that score above their own original.[/dim]\n",
        rewards,
        f"\n[b]Mean weights RL + SFT as all errors shrink[/b]\n{weights}",
        "\n[b]A small restorer on held-out scenes, before → after RL[/b]\n",
        thirds,
        f"Alarms of the monitor: {escape('; '.join(trained.alarms)) or 'none'}\n",
    )


if __name__ == "__main__":
    main()
