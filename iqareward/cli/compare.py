"""Compare folders of results with a baseline: pair the images, score them, and tell the differences."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from iqareward.cli.comparison import Difference, difference
from iqareward.cli.reading import read_ahead
from iqareward.cli.results import csv_line, no_formula
from iqareward.cli.score import check_device, find_references, progress_bar, score_loaded
from iqareward.cli.text import plain, printable
from iqareward.image_files import References, find_images
from iqareward.rewards.catalog import load

COLUMNS = ("reward", "folder", "images", "mean", "difference", "95 % interval", "wins", "verdict")
TEXT_COLUMNS = ("reward", "folder", "verdict")
MOST_LISTED = 10  # reasons, and files of each reason


class Problem(NamedTuple):
    """A file that took no part in some or all differences, and why."""

    file: Path
    reason: str


@dataclass(frozen=True)
class Comparison:
    """N images in F folders under R rewards.

    Attributes:
        folders: F folders, the baseline first.
        rewards: R names.
        images: N paths relative to the baseline.
        files: for each image its F files.
        references: for each image its reference, if there is one.
        scores: `[F, N, R]`, NaN = not scored.
        differences: for each reward F - 1 differences from the baseline.
        problems: what was left out, and why.
    """

    folders: tuple[Path, ...]
    rewards: tuple[str, ...]
    images: tuple[Path, ...]
    files: tuple[tuple[Path, ...], ...]
    references: tuple[Path | None, ...]
    scores: np.ndarray
    differences: tuple[tuple[Difference, ...], ...]
    problems: tuple[Problem, ...]

    @property
    def titles(self) -> tuple[str, ...]:
        """What the folders are called: their names, or their paths where names repeat."""
        return titles(self.folders)

    def document(self) -> dict[str, Any]:
        """All figures as plain data; NaN is null."""
        differences = [
            {"reward": reward, "folder": str(folder), "unscored": len(self.images) - found.images}
            | {name: None if value != value else value for name, value in asdict(found).items()}
            | {"verdict": found.verdict}
            for reward, row in zip(self.rewards, self.differences, strict=True)
            for folder, found in zip(self.folders[1:], row, strict=True)
        ]
        problems = [{"file": str(file), "reason": reason} for file, reason in self.problems]
        counts = {"baseline": str(self.folders[0]), "images": len(self.images)}
        return counts | {"differences": differences, "left_out": problems}

    def table(self) -> list[list[tuple[str, ...]]]:
        """The differences as text under `COLUMNS`: for each reward a row for every folder, the baseline first."""
        pairs = zip(self.rewards, self.differences, strict=True)
        return [list(_rows(reward, len(self.images), self.titles, row)) for reward, row in pairs]


class Scoring(NamedTuple):
    """How images are scored: rewards by name, the folder of references, device, images per batch, where to report."""

    rewards: Sequence[str]
    reference: Path | None
    device: str
    batch_size: int
    messages: Console


def compare(folders: Sequence[Path], scoring: Scoring) -> Comparison:
    """Score the images that all folders hold under the same relative path (any image suffix).

    Args:
        folders: at least two, the baseline first.
        scoring: how images are scored.

    Raises:
        ValueError: a folder holds no image, nothing pairs, a pair is ambiguous, or a reward needs references.
    """
    if len(folders) < 2:
        raise ValueError(f"compare expected at least two folders, the baseline first, got {len(folders)}.")
    check_device(scoring.device)
    rewards = [load(spec, device=scoring.device) for spec in scoring.rewards]
    references = find_references(rewards, scoring.reference)
    problems: list[Problem] = []
    matches = _matched(folders, problems)
    if not matches:
        raise ValueError(f"{listed(folders)} have no image in common: pairs have the same path in all folders.")
    scores = np.full((len(folders), len(matches), len(rewards)), np.nan)
    with progress_bar(scoring.messages) as progress:
        for index, title in enumerate(titles(folders)):
            task = progress.add_task(printable(title), total=len(matches))
            files, rows = {match[index]: image for image, match in matches.items()}, iter(scores[index])
            for batch in read_ahead(files, references, device=scoring.device, batch_size=scoring.batch_size):
                for loaded, (values, reason) in zip(batch, score_loaded(rewards, batch), strict=True):
                    next(rows)[:] = values
                    if reason:
                        problems.append(Problem(loaded.path, reason))
                progress.advance(task, len(batch))
    baseline, *methods = np.where(np.isfinite(scores).all(0), scores, np.nan)
    return Comparison(
        folders=tuple(folders),
        rewards=tuple(reward.name for reward in rewards),
        images=tuple(matches),
        files=tuple(matches.values()),
        references=_references(scoring.reference, matches),
        scores=scores,
        differences=tuple(
            tuple(difference(baseline[:, column], method[:, column]) for method in methods)
            for column in range(len(rewards))
        ),
        problems=tuple(problems),
    )


def titles(folders: Sequence[Path]) -> tuple[str, ...]:
    """What to call folders: their names, or their paths where names repeat."""
    names = [folder.resolve().name for folder in folders]
    return tuple(names if len(set(names)) == len(names) else map(str, folders))


def listed(words: Iterable[object]) -> str:
    """Words as in a sentence: a, b and c."""
    *most, last = map(str, words)
    return f"{', '.join(most)} and {last}" if most else last


def _matched(folders: Sequence[Path], problems: list[Problem]) -> dict[Path, tuple[Path, ...]]:
    """Path relative to the baseline -> its file in each folder, for the images that all folders hold."""
    groups: list[dict[str, dict[Path, Path]]] = []  # for each folder: path without suffix -> relative path -> file
    for folder in folders:
        groups.append({})
        found = find_images([folder])
        problems += (Problem(path, reason) for path, reason in found.problems.items())
        for file, relative in found.files.items():
            groups[-1].setdefault(str(relative.with_suffix("")), {})[relative] = file
    matches: dict[Path, tuple[Path, ...]] = {}
    names = titles(folders)
    for stem in dict.fromkeys(stem for group in groups for stem in group):
        lacking = [name for name, group in zip(names, groups, strict=True) if stem not in group]
        found = [group[stem] for group in groups if stem in group]
        if lacking:
            problems += (Problem(file, f"not in {listed(lacking)}") for files in found for file in files.values())
        elif all(len(files) == 1 for files in found):
            matches[next(iter(found[0]))] = tuple(file for files in found for file in files.values())
        elif all(files.keys() == found[0].keys() for files in found):
            matches |= {relative: tuple(files[relative] for files in found) for relative in found[0]}
        else:
            paths = ", ".join(str(file) for files in found for file in files.values())
            raise ValueError(f"compare cannot tell which of these images belong together: {paths}. Rename some.")
    return matches


def _references(folder: Path | None, images: Iterable[Path]) -> tuple[Path | None, ...]:
    """To look at; a reward that needs a missing one has said so."""
    references = References(folder) if folder is not None else None

    def find(image: Path) -> Path | None:
        try:
            return references and references.find(image)
        except (OSError, ValueError):
            return None

    return tuple(map(find, images))


def _rows(reward: str, total: int, names: Sequence[str], row: Sequence[Difference]) -> Iterator[tuple[str, ...]]:
    digits, scored = max(found.decimals for found in row), row[0].images
    images = str(total) if scored == total else f"{scored} of {total}"
    yield reward, names[0], images, _number(row[0].baseline, digits), "baseline", "", "", ""
    for name, found in zip(names[1:], row, strict=True):
        low, high = _number(found.low, digits, "+"), _number(found.high, digits, "+")
        change, wins = _number(found.difference, digits, "+"), f"{found.wins:.0%}" if scored else ""
        interval = f"[{low}, {high}]" if low else ""
        yield "", name, images, _number(found.mean, digits), change, interval, wins, found.verdict


def _number(value: float, digits: int, sign: str = "") -> str:
    return "" if value != value else f"{value:{sign}.{digits}f}"


def show(comparison: Comparison, console: Console) -> None:
    """Print the differences as a table; names fold, and a terminal too narrow for the figures wraps the lines."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    groups, width = comparison.table(), 0
    for column, *texts in zip(COLUMNS, *(row for group in groups for row in group), strict=True):
        folds = column in ("reward", "folder")
        least = 8 if folds else max(map(len, (column, *texts)))
        justify = "left" if column in TEXT_COLUMNS else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=not folds, min_width=least)
        width += least + 2  # and what is between columns
    for group in groups:
        for row in group:
            table.add_row(*map(plain, row), end_section=row is group[-1])
    console.width = max(console.width, width)
    console.print(table)


def markdown(comparison: Comparison) -> str:
    """The differences as a table in Markdown."""
    rules = tuple(":--" if column in TEXT_COLUMNS else "--:" for column in COLUMNS)
    rows = [COLUMNS, rules, *(tuple(map(_markdown_cell, row)) for group in comparison.table() for row in group)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _markdown_cell(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|~&$])", r"\\\1", printable(text))


def as_json(comparison: Comparison) -> str:
    """The differences as one JSON object."""
    return json.dumps(comparison.document(), indent=2) + "\n"


def latex(comparison: Comparison) -> str:
    """The differences as a table in LaTeX, which needs the package booktabs."""
    alignment = "".join("l" if column in TEXT_COLUMNS else "r" for column in COLUMNS)
    head = " & ".join(map(_latex_text, COLUMNS)) + " \\\\\n"
    groups = ["".join(map(_latex_row, group)) for group in comparison.table()]
    body = "\\midrule\n".join([head, *groups])
    return f"\\begin{{tabular}}{{{alignment}}}\n\\toprule\n{body}\\bottomrule\n\\end{{tabular}}\n"


_LATEX = {
    **{"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"},
    **{"<": "\\textless{}", ">": "\\textgreater{}", "|": "\\textbar{}"},
    **{"[": "{[}", "*": "{*}"},  # at the start of a row they would be an option of the line break before it
}


def _latex_row(row: Sequence[str]) -> str:
    cells = (
        _latex_text(text) if column in TEXT_COLUMNS else re.sub("([+-])", r"$\1$", _latex_text(text))
        for column, text in zip(COLUMNS, row, strict=True)
    )
    return " & ".join(cells) + " \\\\\n"


def _latex_text(text: str) -> str:
    return re.sub(r"[\\~^<>|\[*{}$&#_%]", lambda found: _LATEX.get(found[0], f"\\{found[0]}"), printable(text))


def scores_csv(comparison: Comparison) -> str:
    """CSV with a row for each image and folder, and one for each file that was left out; no score is an empty cell."""
    lines = [["image", "folder", "file", *comparison.rewards, "problem"]]
    reasons: dict[Path, list[str]] = {}
    for file, reason in comparison.problems:
        reasons.setdefault(file, []).append(reason)
    for index, (image, files) in enumerate(zip(comparison.images, comparison.files, strict=True)):
        for title, file, scores in zip(comparison.titles, files, comparison.scores[:, index].tolist(), strict=True):
            numbers = ("" if score != score else repr(score) for score in scores)
            lines.append([*map(_csv_cell, (image, title, file)), *numbers, _csv_cell("; ".join(reasons.pop(file, ())))])
    for file, texts in reasons.items():
        lines.append(["", "", _csv_cell(file), *("" for _ in comparison.rewards), _csv_cell("; ".join(texts))])
    return "".join(map(csv_line, lines))


def _csv_cell(text: object) -> str:
    return no_formula(printable(text))


def summary(problems: Sequence[Problem]) -> Iterator[str]:
    """A line for each reason, with some of its files."""
    by_reason: dict[str, list[Path]] = {}
    for file, reason in problems:
        by_reason.setdefault(reason, []).append(file)
    for reason, files in list(by_reason.items())[:MOST_LISTED]:
        more = f" and {len(files) - MOST_LISTED} more" if len(files) > MOST_LISTED else ""
        yield f"{len(files)} file{'s' * (len(files) > 1)}, {reason}: {', '.join(map(str, files[:MOST_LISTED]))}{more}"
    if len(by_reason) > MOST_LISTED:
        yield f"and others, for {len(by_reason) - MOST_LISTED} more reasons"


WRITERS = {"markdown": markdown, "latex": latex, "json": as_json}
