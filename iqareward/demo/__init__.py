"""`iqareward demo`: photographs are damaged, scored and weighed, then a model is trained; all of it on one page."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from iqareward.atomic import write_text
from iqareward.demo.experiment import Experiment, one_thread
from iqareward.demo.training import TrainingSettings
from iqareward.optional import require

REWARDS = ("psnr", "ssim", "ms_ssim", "gmsd", "haarpsi", "niqe", "piqe")
CONTENTS = (
    "open this in a browser: pictures, scores, weights, training",
    "every score, difficulty and weight, a row per picture",
    "the figures of the report, settings, versions",
    "score against damage",
    "ten samples from easy to hard, and their weights",
    "both weights against difficulty",
    "both weights as errors shrink",
    "pictures before and after RL",
    "reward, fidelity and weights of the training",
)  # of the files, in their order


class Demo(NamedTuple):
    """What a run left behind: the page, all files (the page among them), and the figures of `results.json`."""

    report: Path
    files: tuple[Path, ...]
    results: dict[str, Any]


def run(
    output: Path,
    console: Console,
    *,
    rewards: Sequence[str] = REWARDS,
    num_photographs: int = 4,
    short_side: int = 384,
    num_levels: int = 5,
    training: TrainingSettings | None = None,
) -> Demo:
    """Run the demo and write `report.html`, `results.json`, `scores.csv` and six PNG figures.

    Everything but the duration and the versions is the same in every run on one machine.

    Args:
        output: folder, made if it is missing; files of an earlier run are replaced.
        console: where progress, results and the list of files are printed.
        rewards: names for `iqareward.load`.
        num_photographs: how many of the four.
        short_side: larger photographs are shrunk to this many pixels on the shorter side.
        num_levels: strengths of each degradation, 1 to 5.
        training: how large the training part is.

    Raises:
        ImportError: scikit-image, matplotlib, diffusers or accelerate is missing.
    """
    started = time.perf_counter()
    for module in ("skimage", "matplotlib", "diffusers", "accelerate"):
        require(module, extra="demo", purpose="iqareward demo")
    from iqareward.demo.figures import save_figures
    from iqareward.demo.files import write_results, write_scores
    from iqareward.demo.report import render
    from iqareward.demo.summary import environment, summarise
    from iqareward.demo.terminal import print_results
    from iqareward.demo.training import train, training_summary
    from iqareward.demo.training_figures import save_training_figures

    experiment = measure(
        console, rewards=rewards, num_photographs=num_photographs, short_side=short_side, num_levels=num_levels
    )
    output.mkdir(parents=True, exist_ok=True)
    seconds = time.perf_counter() - started
    report, table, document = output / "report.html", output / "scores.csv", output / "results.json"
    with one_thread():
        trained = train(training or TrainingSettings())
    with console.status("Drawing figures and writing the report"):
        figures = (*save_figures(experiment, output), *save_training_figures(trained, output))
        results = summarise(experiment)
        results["training"] = training_summary(trained)
        results["environment"] = environment(seconds)
        write_text(report, render(experiment, results, trained))
        write_results(results, document)
        write_scores(experiment, table)
    files = dict(zip((report, table, document, *figures), CONTENTS, strict=True))
    print_results(console, results, files)
    console.print(f"Done in {time.perf_counter() - started:.0f} seconds.", highlight=False)
    return Demo(report, tuple(files), results)


def measure(
    console: Console, *, rewards: Sequence[str], num_photographs: int, short_side: int, num_levels: int
) -> Experiment:
    """Damage, score and weigh, with a progress bar; arguments as for `run`."""
    from iqareward.demo.degradations import DEGRADATIONS
    from iqareward.demo.experiment import damage, difficulty_of, score, weigh
    from iqareward.demo.held_out import held_out
    from iqareward.demo.photographs import PHOTOGRAPHS
    from iqareward.rewards.catalog import load

    loaded = tuple(load(name) for name in rewards)
    photographs = PHOTOGRAPHS[:num_photographs]
    share = TextColumn("{task.percentage:>3.0f}%")
    bar = Progress(TextColumn("{task.description}"), BarColumn(), share, TimeElapsedColumn(), console=console)
    with bar, one_thread():
        task = bar.add_task("Damaging photographs", total=len(photographs) * (1 + len(DEGRADATIONS)))
        pictures = damage(photographs, DEGRADATIONS, short_side=short_side, num_levels=num_levels)
        judges = []
        for photograph in photographs:
            bar.update(task, description=f"Preparing judges that have not seen {photograph.name}")
            judges.append(held_out(loaded, photograph.name))
            bar.advance(task)
        bar.update(task, description=f"Scoring pictures with {len(loaded)} rewards")
        scores = score(judges, pictures, advance=lambda: bar.advance(task))
        difficulty = difficulty_of(pictures)
        handover = weigh(difficulty)
    return Experiment(photographs, DEGRADATIONS, loaded, pictures, scores, difficulty, handover)
