"""Compare folders of results with a baseline: pair the images, score them, and measure the paired differences."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from iqareward.cli.results import csv_line, no_formula
from iqareward.cli.scoring import Scorer, progress_bar
from iqareward.cli.text import plain, printable
from iqareward.image_files import find_images

COLUMNS = ("reward", "folder", "images", "mean", "difference", "95 % interval", "wins", "verdict")
TEXT_COLUMNS = ("reward", "folder", "verdict")
_RESAMPLES = 10_000
_DRAWS_IN_MEMORY = 4_000_000
_MOST_LISTED = 10  # reasons, and files of each reason


@dataclass(frozen=True)
class Difference:
    """Paired difference between a folder and the baseline under one reward; positive is better than the baseline.

    Attributes:
        images: number of images that were compared.
        baseline: mean score of the baseline.
        mean: mean score of the folder.
        difference: mean of the differences, folder - baseline.
        low: lower end of the 95 % bootstrap interval of the difference; NaN for fewer than two images.
        high: upper end.
        wins: share of images that score higher than in the baseline; ties count half.
    """

    images: int
    baseline: float
    mean: float
    difference: float
    low: float
    high: float
    wins: float

    @property
    def verdict(self) -> str:
        """`better` or `worse` if the interval excludes zero, else `unclear`."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "unclear"

    @property
    def decimals(self) -> int:
        """Decimals that show two significant digits of the interval's half width."""
        half = (self.high - self.low) / 2
        return min(max(1 - math.floor(math.log10(half)), 0), 6) if half > 0 else 4


def difference(baseline: np.ndarray, method: np.ndarray, *, seed: int = 0) -> Difference:
    """Compare the scores of the same N images, NaN = not scored, with a percentile bootstrap over images.

    References:
        Efron, "Bootstrap Methods: Another Look at the Jackknife", 1979, https://doi.org/10.1214/aos/1176344552
    """
    both = np.isfinite(baseline) & np.isfinite(method)
    a, b = baseline[both], method[both]
    change = b - a
    if not len(change):
        return Difference(0, *[math.nan] * 6)
    low = high = math.nan
    if len(change) > 1:
        rng, step = np.random.default_rng(seed), max(1, _DRAWS_IN_MEMORY // len(change))
        sizes = [min(step, _RESAMPLES - start) for start in range(0, _RESAMPLES, step)]
        means = [change[rng.integers(len(change), size=(size, len(change)))].mean(1) for size in sizes]
        low, high = np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()
    wins = float((change > 0).mean() + (change == 0).mean() / 2)
    return Difference(len(change), float(a.mean()), float(b.mean()), float(change.mean()), low, high, wins)


class Problem(NamedTuple):
    """A file that was left out of some or all differences, and the reason."""

    file: Path
    reason: str


@dataclass(frozen=True)
class Comparison:
    """Scores and differences of N images in F folders under R rewards.

    Attributes:
        folders: F folders, the baseline first.
        titles: names of the folders, or their paths where names repeat.
        rewards: R names.
        images: N paths relative to the baseline, each with its F files.
        references: for each image its reference, if there is one.
        scores: `[F, N, R]`, NaN = not scored.
        differences: for each reward F - 1 differences from the baseline.
        problems: files that were left out.
    """

    folders: tuple[Path, ...]
    titles: tuple[str, ...]
    rewards: tuple[str, ...]
    images: dict[Path, tuple[Path, ...]]
    references: tuple[Path | None, ...]
    scores: np.ndarray
    differences: tuple[tuple[Difference, ...], ...]
    problems: tuple[Problem, ...]

    def table(self) -> list[list[tuple[str, ...]]]:
        """The differences as text under `COLUMNS`: for each reward a row for every folder, the baseline first."""
        return [
            list(_rows(reward, len(self.images), self.titles, row))
            for reward, row in zip(self.rewards, self.differences, strict=True)
        ]


def compare(folders: Sequence[Path], scorer: Scorer, messages: Console) -> Comparison:
    """Score the images that all folders hold under the same relative path, whatever their suffix.

    Raises:
        ValueError: there are fewer than two folders, a folder holds no image, nothing pairs, or a pair is ambiguous.
    """
    if len(folders) < 2:
        raise ValueError(f"compare expected at least two folders, the baseline first, got {len(folders)}.")
    names, problems = [folder.resolve().name for folder in folders], list[Problem]()
    titles = names if len(set(names)) == len(names) else list(map(str, folders))
    images = matched(folders, titles, problems)
    if not images:
        raise ValueError(f"{listed(folders)} have no image in common. Pairs need the same path in all folders.")
    scores = np.full((len(folders), len(images), len(scorer.rewards)), np.nan)
    with progress_bar(messages) as progress:
        for index, title in enumerate(titles):
            task = progress.add_task(printable(title), total=len(images))
            rows = iter(scores[index])
            for scored in scorer.score({files[index]: image for image, files in images.items()}):
                for file, values, reason in scored:
                    next(rows)[:] = values
                    if reason:
                        problems.append(Problem(file, reason))
                progress.advance(task, len(scored))
    baseline, *methods = np.where(np.isfinite(scores).all(0), scores, np.nan)
    return Comparison(
        folders=tuple(folders),
        titles=tuple(titles),
        rewards=tuple(scorer.names),
        images=images,
        references=tuple(map(scorer.reference_to_show, images)),
        scores=scores,
        differences=tuple(
            tuple(difference(baseline[:, column], method[:, column]) for method in methods)
            for column in range(len(scorer.rewards))
        ),
        problems=tuple(problems),
    )


def listed(words: Iterable[object]) -> str:
    """Words as in a sentence: a, b and c."""
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last


def matched(folders: Sequence[Path], titles: Sequence[str], problems: list[Problem]) -> dict[Path, tuple[Path, ...]]:
    """Path relative to the baseline -> its file in each folder, for the images that all folders hold."""
    groups: list[dict[str, dict[Path, Path]]] = []  # for each folder: path without suffix -> relative path -> file
    for folder in folders:
        groups.append({})
        found = find_images([folder])
        problems += (Problem(path, reason) for path, reason in found.problems.items())
        for file, relative in found.files.items():
            groups[-1].setdefault(str(relative.with_suffix("")), {})[relative] = file
    matches: dict[Path, tuple[Path, ...]] = {}
    for stem in dict.fromkeys(stem for group in groups for stem in group):
        lacking = [name for name, group in zip(titles, groups, strict=True) if stem not in group]
        found = [group[stem] for group in groups if stem in group]
        if lacking:
            problems += (Problem(file, f"not in {listed(lacking)}") for files in found for file in files.values())
        elif all(len(files) == 1 for files in found):
            matches[next(iter(found[0]))] = tuple(file for files in found for file in files.values())
        elif all(files.keys() == found[0].keys() for files in found):
            matches |= {relative: tuple(files[relative] for files in found) for relative in found[0]}
        else:
            paths = ", ".join(str(file) for files in found for file in files.values())
            raise ValueError(f"cannot tell which of these images belong together: {paths}. Rename some.")
    return matches


def _rows(reward: str, total: int, names: Sequence[str], row: Sequence[Difference]) -> Iterator[tuple[str, ...]]:
    digits, scored = max(found.decimals for found in row), row[0].images

    def number(value: float, sign: str = "") -> str:
        return "" if math.isnan(value) else f"{value:{sign}.{digits}f}"

    images = str(total) if scored == total else f"{scored} of {total}"
    yield reward, names[0], images, number(row[0].baseline), "baseline", "", "", ""
    for name, found in zip(names[1:], row, strict=True):
        interval = "" if math.isnan(found.low) else f"[{number(found.low, '+')}, {number(found.high, '+')}]"
        wins = f"{found.wins:.0%}" if scored else ""
        yield "", name, images, number(found.mean), number(found.difference, "+"), interval, wins, found.verdict


def show(comparison: Comparison, console: Console) -> None:
    """Print the differences as a table; long names fold, figures do not, however narrow the terminal is."""
    table, groups = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0)), comparison.table()
    for column, *texts in zip(COLUMNS, *chain.from_iterable(groups), strict=True):
        justify = "left" if column in TEXT_COLUMNS else "right"
        is_name = column in ("reward", "folder")
        width = 6 if is_name else max(map(len, (column, *texts)))
        table.add_column(column, justify=justify, overflow="fold", no_wrap=not is_name, min_width=width)
    for group in groups:
        for row in group:
            table.add_row(*map(plain, row), end_section=row is group[-1])
    console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), table).minimum)
    console.print(table)


def as_json(comparison: Comparison) -> str:
    """The differences as one JSON object; NaN is null."""
    differences = [
        {"reward": reward, "folder": str(folder), "unscored": len(comparison.images) - found.images}
        | {name: None if math.isnan(value) else value for name, value in asdict(found).items()}
        | {"verdict": found.verdict}
        for reward, row in zip(comparison.rewards, comparison.differences, strict=True)
        for folder, found in zip(comparison.folders[1:], row, strict=True)
    ]
    counts = {"baseline": str(comparison.folders[0]), "images": len(comparison.images)}
    problems = [{"file": str(file), "reason": reason} for file, reason in comparison.problems]
    return json.dumps(counts | {"differences": differences, "left_out": problems}, indent=2) + "\n"


_MARKDOWN = str.maketrans({char: f"\\{char}" for char in r"\`*_{}[]<>|~&$"})
_LATEX = str.maketrans(
    {char: f"\\{char}" for char in "{}$&#_%"}
    | {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    | {"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"}
    | {"[": "{[}", "*": "{*}"}  # at the start of a row they would be an option of the line break before it
)


def markdown(comparison: Comparison) -> str:
    """The differences as a table in Markdown."""
    rules = tuple(":--" if column in TEXT_COLUMNS else "--:" for column in COLUMNS)
    cells = [[printable(text).translate(_MARKDOWN) for text in row] for group in comparison.table() for row in group]
    return "".join(f"| {' | '.join(row)} |\n" for row in [COLUMNS, rules, *cells])


def latex(comparison: Comparison) -> str:
    """The differences as a table in LaTeX, which needs the package booktabs."""
    alignment = "".join("l" if column in TEXT_COLUMNS else "r" for column in COLUMNS)
    groups = [[COLUMNS], *comparison.table()]
    body = "\\midrule\n".join("".join(map(_latex_row, group)) for group in groups)
    return f"\\begin{{tabular}}{{{alignment}}}\n\\toprule\n{body}\\bottomrule\n\\end{{tabular}}\n"


def _latex_row(row: Sequence[str]) -> str:
    cells = [printable(text).translate(_LATEX) for text in row]
    signs = [
        text if column in TEXT_COLUMNS else re.sub("([+-])", r"$\1$", text)
        for column, text in zip(COLUMNS, cells, strict=True)
    ]
    return " & ".join(signs) + " \\\\\n"


def scores_csv(comparison: Comparison) -> str:
    """CSV with a row for each image and folder, and one for each file that was left out; no score is an empty cell."""
    reasons: dict[Path, list[str]] = {}
    for file, reason in comparison.problems:
        reasons.setdefault(file, []).append(reason)
    lines: list[list[str]] = [["image", "folder", "file", *comparison.rewards, "problem"]]
    for index, (image, files) in enumerate(comparison.images.items()):
        for title, file, scores in zip(comparison.titles, files, comparison.scores[:, index].tolist(), strict=True):
            numbers = ("" if math.isnan(score) else repr(score) for score in scores)
            lines.append([str(image), title, str(file), *numbers, "; ".join(reasons.pop(file, ()))])
    for file, texts in reasons.items():
        lines.append(["", "", str(file), *("" for _ in comparison.rewards), "; ".join(texts)])
    texts = (0, 1, 2, len(lines[0]) - 1)  # columns that are not numbers
    return "".join(
        csv_line(no_formula(printable(cell)) if place in texts else cell for place, cell in enumerate(line))
        for line in lines
    )


def summary(problems: Sequence[Problem]) -> Iterator[str]:
    """A line for each reason, with some of its files."""
    by_reason: dict[str, list[Path]] = {}
    for file, reason in problems:
        by_reason.setdefault(reason, []).append(file)
    for reason, files in list(by_reason.items())[:_MOST_LISTED]:
        more = f" and {len(files) - _MOST_LISTED} more" if len(files) > _MOST_LISTED else ""
        yield f"{len(files)} file{'s' * (len(files) > 1)}, {reason}: {', '.join(map(str, files[:_MOST_LISTED]))}{more}"
    if len(by_reason) > _MOST_LISTED:
        yield f"{len(by_reason) - _MOST_LISTED} more reasons are not listed here"


WRITERS = {"markdown": markdown, "latex": latex, "json": as_json}
