"""Distil a reward into a small convolutional network that `QuickReward` loads.

    python -m examples.distill --teacher "0.5*haarpsi + 0.5*pyiqa:stlpips[-0.6, 0]" \\
        --images pictures/images --references pictures/references --output judge.safetensors
    python -m examples.distill --scores scores.csv --images rollouts --output judge.safetensors

Images in one folder inside of IMAGES belong to one input, whose reference is REFERENCES/<folder>.png. Images that lie
in IMAGES itself are groups of their own, and their references have the same names. SCORES is a table with a column
`path` and one of scores, as `iqareward score --output scores.csv` writes it. Names such as `noise-12.5.png` give the
report kinds and levels. Scores of the teacher are kept beside OUTPUT, and a run that is stopped goes on.
"""

import argparse
import csv
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from safetensors.torch import save

import iqareward
from iqareward.atomic import atomic_write, write_text
from iqareward.cli.scoring import Scorer
from iqareward.image_files import find_images
from iqareward.rewards import QuickReward

from .report import LIGHT_NOISE, Report, report
from .training import Group, Settings, quantiles, start, train

_HELD_OUT = 10  # one group in ten is not trained on
_FEWEST_LOWERED = 0.8  # share of the images whose score light noise must lower


def main(arguments: Sequence[str] | None = None) -> None:
    defaults, style = Settings(), argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m examples.distill", description=__doc__, formatter_class=style)
    parser.add_argument("--teacher", help="reward to distil, by name or as a sum")
    parser.add_argument("--scores", type=Path, help="its scores, in place of --teacher")
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--references", type=Path, help="folder of references, for a teacher that compares")
    parser.add_argument("--output", type=Path, required=True, help="file of weights, .safetensors")
    parser.add_argument("--backbone", type=Path, help="file of torchvision's MobileNetV2 to start from")
    parser.add_argument("--steps", type=int, default=defaults.steps, help="updates [%(default)s]")
    parser.add_argument("--crop", type=int, default=defaults.crop, help="longest side to train on [%(default)s]")
    parser.add_argument("--groups", type=int, default=defaults.groups, help="inputs in an update [%(default)s]")
    parser.add_argument(
        "--members", type=int, default=defaults.members, help="images of each input in an update [%(default)s]"
    )
    parser.add_argument(
        "--noisy", type=int, default=defaults.noisy, help="of those, shown again with noise; 0 = none [%(default)s]"
    )
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--card", default="", help="text for the metadata: licence, authors of the images")
    options = parser.parse_args(arguments)
    console = Console(stderr=True)
    if (options.teacher is None) == (options.scores is None):
        parser.error("give either --teacher or --scores")
    if options.output.suffix != ".safetensors":
        parser.error(f"--output {options.output}: give it the suffix .safetensors")
    settings = Settings(
        options.steps, options.groups, options.members, options.noisy, options.crop, options.learning_rate, options.seed
    )
    files = find_images([options.images]).files
    if options.scores is None:
        table = options.output.with_suffix(".scores.csv")
        score(options.teacher, files, options.references, table, options.device)
    else:
        table = options.scores
    teacher, scores = read_scores(table)
    groups = grouped(files, scores)
    order = np.random.default_rng(options.seed).permutation(len(groups))
    num_held_out = max(1, len(groups) // _HELD_OUT)
    held_out, kept = ([groups[place] for place in part] for part in (order[:num_held_out], order[num_held_out:]))
    if not kept:
        parser.error(f"--images {options.images}: found {len(groups)} inputs with scores, expected two or more")
    among = np.concatenate([group.scores for group in kept])
    targets = {group.name: quantiles(group.scores, among) for group in groups}
    console.print(f"{len(among)} images of {len(kept)} inputs to train on, {len(held_out)} inputs held out")
    device, checkpoint = torch.device(options.device), options.output.with_suffix(".part")

    def progress(steps: Iterator[int], total: int) -> Iterator[int]:
        yield from track(steps, "training", total, console=console)

    network = start(options.backbone, options.seed)
    losses = train(network, kept, targets, settings, device=device, checkpoint=checkpoint, progress=progress)
    if losses:
        console.print(f"loss {np.mean(losses[:20]):.3f} at first, {np.mean(losses[-20:]):.3f} at last")
    facts = {
        "teacher": teacher, "images": str(len(among)), "inputs": str(len(kept)), "settings": json.dumps(vars(settings)),
        "backbone": "" if options.backbone is None else options.backbone.name, "card": options.card,
        "versions": f"iqareward {iqareward.__version__}, torch {torch.__version__}",
    }  # fmt: skip
    weights = {key: value.detach().cpu().contiguous().half() for key, value in network.state_dict().items()}
    with atomic_write(options.output) as file:
        file.write(save(weights, facts))
    student = QuickReward(weights=options.output, device=options.device)
    found = report(student, [replace(group, scores=targets[group.name]) for group in held_out], seed=options.seed)
    write_text(options.output.with_suffix(".report.json"), json.dumps(found._asdict(), indent=1))
    show(found, console)
    checkpoint.unlink(missing_ok=True)


def score(
    teacher: str, files: dict[Path, Path], references: Path | None, table: Path, device: str, batch_size: int = 16
) -> None:
    """Write the teacher's scores into a table; what is there already is not scored again."""
    head = ["path", teacher]
    done: set[str] = set()
    if table.is_file():
        with table.open(newline="") as file:
            found, *rows = csv.reader(file)
        if found != head:
            raise ValueError(f"{table} has scores of {found[1:]}. Delete it, or choose another --output.")
        done = {row[0] for row in rows}
    else:
        table.parent.mkdir(parents=True, exist_ok=True)
        with table.open("w", newline="") as file:
            csv.writer(file).writerow(head)
    scorer = Scorer([teacher], references, device, batch_size)
    # the reference of an image in a folder has the folder's name
    todo = {
        file: relative.parent.with_suffix(".png") if references is not None and relative.parent.name else relative
        for file, relative in files.items()
        if str(file) not in done
    }
    batches = track(scorer.score(todo), "scoring", math.ceil(len(todo) / batch_size), console=Console(stderr=True))
    with table.open("a", newline="") as file:
        for batch in batches:
            for row in batch:
                if row.problem:
                    Console(stderr=True).print(f"{row.path}: {row.problem}", markup=False)
                csv.writer(file).writerow([row.path, "" if row.problem else repr(row.scores[0])])
            file.flush()


def read_scores(table: Path) -> tuple[str, dict[str, float]]:
    """The name of the reward, and the scores by path, of a table that `score` or `iqareward score` has written."""
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in (rows[0] if rows else {}) if name not in ("path", "problem", "reference", "inputs")]
    if len(columns) != 1 or "path" not in rows[0]:
        raise ValueError(f"{table} expected columns `path` and one of scores, got {columns}. Keep one reward.")
    name = columns[0]
    return name, {str(Path(row["path"]).resolve()): float(row[name]) for row in rows if row[name]}


def grouped(files: dict[Path, Path], scores: dict[str, float]) -> list[Group]:
    """The images that have a score, by the folder in which they lie."""
    members: dict[str, list[tuple[Path, float]]] = {}
    for file, relative in files.items():
        if (value := scores.get(str(file.resolve()))) is not None:
            name = str(relative.parent if relative.parent.name else relative)
            members.setdefault(name, []).append((file, value))
    return [
        Group(name, [file for file, _ in rows], np.array([value for _, value in rows]))
        for name, rows in sorted(members.items())
    ]


def show(found: Report, console: Console) -> None:
    """Print the agreement, and warn of the kinds of images where it is low."""
    console.print(
        f"held out: Spearman {found.spearman:.3f}, pairs of one input in the teacher's order "
        f"{found.pairs[0]:.3f} [{found.pairs[1]:.3f}, {found.pairs[2]:.3f}]"
    )
    share = f"noise of {LIGHT_NOISE:.0f}/255 lowers the score of {found.light_noise:.2f} of the images"
    console.print(share if found.light_noise > _FEWEST_LOWERED else f"[yellow]warning[/] {share}")
    for kind, row in found.kinds.items():
        if row["warning"]:
            console.print(f"[yellow]warning[/] {kind}: {row['warning']}")


if __name__ == "__main__":
    main()
