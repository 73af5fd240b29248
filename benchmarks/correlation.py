"""How well does each reward keep the order of quality? Spearman's correlation, on bundled photographs and on yours.

    python -m benchmarks.correlation                                # four photographs, four kinds of damage
    python -m benchmarks.correlation --kadid10k DIR --koniq10k DIR   # and image sets with human opinions that you have
    python -m benchmarks.correlation --quick                         # smoke run

On the photographs -1 is perfect: the score falls at every level of damage. On rated sets +1 is: it rises with opinion.
Every reward of the catalogue that can be built here is measured, and the others are named. The last line of standard
output is one JSON document.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks._harness import document, finish
from benchmarks._iqa_datasets import DATASETS, Rated
from iqareward.cli.reading import pixels
from iqareward.demo import measure
from iqareward.demo.statistics import spearman
from iqareward.demo.summary import summarise
from iqareward.rewards.catalog import CATALOG, load
from iqareward.types import Reward

PACKAGES = ["scikit-image", "piq", "torchvision"]


def buildable(names: list[str] | None) -> tuple[list[str], dict[str, str]]:
    """Names of rewards that can score here, and why the others cannot."""
    usable, missing = [], {}
    probe = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    for name in names or CATALOG:
        try:
            load(name)(probe, references=probe.flip(-1))
        except (OSError, ImportError) as error:  # no network for weights, or no extra
            missing[name] = str(error).splitlines()[0][:200]
        else:
            usable.append(name)
    return usable, missing


def on_photographs(names: list[str], *, quick: bool, console: Console) -> list[dict[str, Any]]:
    """A row per reward: mean correlation with the level of damage, overall and per kind; how often it is fooled."""
    photographs, side, levels = (1, 192, 3) if quick else (4, 384, 5)
    found = measure(console, rewards=names, num_photographs=photographs, short_side=side, num_levels=levels)
    summary, rows = summarise(found), []
    for name in names:
        correlation, mistakes = summary["rank_correlation"][name], summary["mistakes"][name]
        row = {"set": "photographs", "reward": name, "spearman": correlation["mean"]}
        row |= {kind: cell["mean"] for kind, cell in correlation["by_degradation"].items()}
        rows.append(
            row | {"above_original": mistakes["above_original_share"], "damaged": summary["settings"]["damaged"]}
        )
    return rows


def on_rated(name: str, images: list[Rated], rewards: list[Reward], console: Console) -> list[dict[str, Any]]:
    """A row per reward: correlation with opinion over the images that it could score."""
    scores: dict[str, list[float]] = {reward.name: [] for reward in rewards}
    for rated in track(images, name, console=console, transient=True):
        image = pixels(rated.image, "cpu")[None]
        reference = None if rated.reference is None else pixels(rated.reference, "cpu")[None]
        for reward in rewards:
            blind = reward.needs_references and reference is None
            scores[reward.name].append(float("nan") if blind else reward(image, references=reference).item())
    opinions, rows = torch.tensor([rated.opinion for rated in images]), []
    for reward, values in scores.items():
        found = torch.tensor(values)
        scored = found.isfinite()
        value = float(spearman(found[scored], opinions[scored])) if int(scored.sum()) > 1 else None
        rows.append({"set": name, "reward": reward, "spearman": value, "images": int(scored.sum())})
    return rows


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """A table per image set, best first."""
    for name in dict.fromkeys(row["set"] for row in rows):
        table = Table(title=f"Spearman's correlation, {name}", title_justify="left")
        table.add_column("reward")
        table.add_column("correlation", justify="right")
        here = [row for row in rows if row["set"] == name]
        for row in sorted(here, key=lambda row: -abs(row["spearman"] or 0)):
            table.add_row(row["reward"], "-" if row["spearman"] is None else f"{row['spearman']:+.3f}")
        console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", help="names of `iqareward list` or pyiqa:<metric>; default: all")
    for name in DATASETS:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"folder of {name}")
    parser.add_argument("--limit", type=int, help="use only every n-th rated image, so that about this many remain")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the document here")
    options, console = parser.parse_args(), Console(stderr=True)
    torch.set_num_threads(1)
    names, missing = buildable(options.rewards or (["psnr", "piqe"] if options.quick else None))
    rows = on_photographs(names, quick=options.quick, console=console)
    for name, read in DATASETS.items():
        if folder := getattr(options, name):
            images = list(read(folder))
            step = max(1, len(images) // options.limit) if options.limit else 1
            rows += on_rated(name, images[::step], [load(reward) for reward in names], console)
    show(rows, console)
    finish(document("correlation", rows, [], PACKAGES) | {"missing": missing}, options.json)


if __name__ == "__main__":
    main()
