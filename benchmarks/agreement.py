"""How do rewards agree with people on images that they score here? On white noise, and on tables of yours.

    python -m benchmarks.agreement --kodak DIR --mos TID2013.csv.gz   # white noise on TID2013's references
    python -m benchmarks.agreement --table held_out.csv               # anything that `iqareward agree` reads
    python -m benchmarks.agreement --quick                            # the table of QualiSR alone

TID2013's references are crops of the Kodak photographs, and white noise of a stated strength is white noise whoever
makes it. So its first distortion is made again here, at its nominal levels, and compared with its opinion scores. This
is NOT TID2013: the noise is another draw, its levels are nominal, three crops are exact and the others are central, and
of 24 distortions there is one, which a metric must only measure to do well. DIR holds kodim01.png to kodim24.png; the
scores are a table with `dis_img_path` and `score`. With --folder the images and scores stay there, and a run that was
stopped goes on. Rewards that cannot be built here are named. The last line of standard output is one JSON document.
"""

import argparse
import csv
import gzip
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from benchmarks._harness import document, finish
from benchmarks.correlation import PACKAGES, buildable
from iqareward.cli.agree import Findings, Request, run, show
from iqareward.rewards.catalog import CATALOG

WIDTH, HEIGHT = 512, 384
CROPS = {3: (44, 73), 6: (43, 66), 8: (4, 71)}  # top and left, where a reference of TID2013 was at hand to find it
LEVELS = (33, 30, 27, 24, 21)  # dB of PSNR, Ponomarenko et al., "Image database TID2013", 2015
PYIQA = ("pyiqa:vif", "pyiqa:nlpd")  # metrics of pyiqa that need no weights
NOISE = "white noise"


def white_noise(kodak: Path, mos: Path, folder: Path) -> Path:
    """Write the references, their noisy versions and the table of opinion scores, once; returns the table."""
    table = folder / "table.csv"
    if table.exists():
        return table
    with gzip.open(mos, "rt") if mos.suffix == ".gz" else mos.open() as file:
        opinions = {Path(row["dis_img_path"]).name.lower(): row["score"] for row in csv.DictReader(file)}
    lines = ["image,reference,group,level,human"]
    for number in range(1, 25):
        with Image.open(kodak / f"kodim{number:02}.png") as photograph:
            pixels = np.asarray(photograph.convert("RGB"))
        centre = ((pixels.shape[0] - HEIGHT) // 2, (pixels.shape[1] - WIDTH) // 2)
        top, left = CROPS.get(number, centre)
        clean, rng = pixels[top : top + HEIGHT, left : left + WIDTH], np.random.default_rng(number)
        Image.fromarray(clean).save(folder / f"i{number:02}.bmp")
        for level, decibels in enumerate(LEVELS, start=1):
            noise = rng.normal(0, 255 / 10 ** (decibels / 20), clean.shape)
            noisy = np.clip(np.rint(clean + noise), 0, 255).astype(np.uint8)
            name = f"i{number:02}_01_{level}"
            Image.fromarray(noisy).save(folder / f"{name}.bmp")
            lines.append(f"{name}.bmp,i{number:02}.bmp,i{number:02},{level},{opinions[f'{name}.bmp']}")
    table.write_text("\n".join(lines) + "\n")
    return table


def measure(
    table: str, rewards: Sequence[str], console: Console, *, by: str | None = None, scores: Path | None = None
) -> Findings:
    """What `iqareward agree` finds; scores are kept in a file."""
    request = Request(
        table=table, human=None, group=None, score=[], reward=list(rewards), image=None, folder=None, reference=None,
        by=by, lower_is_better=[], higher_is_better=[], baseline=None, limit=None, scores=scores, overwrite=False,
        resamples=2_000, seed=0, device="cpu", batch_size=5,
    )  # fmt: skip
    return run(request, console)


def rows(name: str, found: Findings) -> list[dict[str, Any]]:
    """A row per metric, overall and within each value of the column `by`."""
    lines: list[dict[str, Any]] = []
    for within, each in {"": found.overall, **found.within}.items():
        for metric in each.metrics:
            row: dict[str, Any] = {"set": name, "within": within, "metric": metric.name, "scored": metric.scored}
            for measure_, figure in (("spearman", metric.spearman), ("pair_accuracy", metric.pair_accuracy)):
                row[measure_] = [None if value != value else round(value, 4) for value in figure]
            lines.append(row | {"pairs": metric.pairs.pairs, "score_ties": metric.pairs.score_ties})
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", nargs="+", help="names of `iqareward list` or pyiqa:<metric>; default: all")
    parser.add_argument("--kodak", type=Path, metavar="DIR", help="folder of the 24 Kodak photographs")
    parser.add_argument("--mos", type=Path, metavar="FILE", help="TID2013's opinion scores")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="keep the noisy images and their scores here")
    parser.add_argument("--table", nargs="+", default=[], help="tables or data sets, as `iqareward agree` takes them")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path, help="also write the document here")
    options, console = parser.parse_args(), Console(stderr=True)
    torch.set_num_threads(1)
    found = {"qualisr": measure("qualisr", [], console, by="method")}
    missing: dict[str, str] = {}
    if not options.quick:
        names, missing = buildable(options.rewards or [*CATALOG, *PYIQA])
        if options.kodak and options.mos:
            with tempfile.TemporaryDirectory() as scratch:
                folder = options.folder or Path(scratch)
                folder.mkdir(parents=True, exist_ok=True)
                table = white_noise(options.kodak, options.mos, folder)
                found[NOISE] = measure(str(table), names, console, scores=folder / "scores.csv")
        found |= {table: measure(table, names, console) for table in options.table}
    if NOISE not in found:
        missing[NOISE] = "needs --kodak and --mos"
    for name, findings in found.items():
        console.rule(name)
        show(findings, console)
    lines = [row for name, findings in found.items() for row in rows(name, findings)]
    finish(document("agreement", lines, [], PACKAGES) | {"missing": missing}, options.json)


if __name__ == "__main__":
    main()
