"""Compare two folders of results: score both, pair them, tell the difference, and show where to look."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from iqareward.cli.comparison import Difference, difference, disagreement
from iqareward.cli.reading import read_ahead
from iqareward.cli.score import progress_bar, score_loaded
from iqareward.cli.text import say
from iqareward.image_files import References, find_images
from iqareward.rewards.catalog import load
from iqareward.types import Reward


class Pair(NamedTuple):
    """The results of one input in both folders, and its path relative to them."""

    first: Path
    second: Path
    relative: Path


@dataclass(frozen=True)
class Comparison:
    """N pairs under R rewards.

    Attributes:
        folders: the two that were compared.
        rewards: R names.
        pairs: N of them.
        scores: `[2, N, R]`, NaN = not scored.
        differences: one per reward.
        unpaired: images in only one of the folders.
        unreadable: pairs of which one could not be read.
    """

    folders: tuple[Path, Path]
    rewards: tuple[str, ...]
    pairs: tuple[Pair, ...]
    scores: np.ndarray
    differences: tuple[Difference, ...]
    unpaired: int
    unreadable: int

    @property
    def titles(self) -> tuple[str, str]:
        """What to call the two: the folders' names, or their paths where the names are the same."""
        first, second = self.folders
        return (first.name, second.name) if first.name != second.name else (str(first), str(second))

    @property
    def order(self) -> list[int]:
        """Pairs, those about which the rewards disagree most first; those without a verdict last."""
        return np.argsort(-np.nan_to_num(disagreement(*self.scores), nan=-1.0), kind="stable").tolist()

    def document(self) -> dict[str, Any]:
        """The figures as plain data; NaN is null."""
        rows = [
            {name: None if value != value else value for name, value in asdict(row).items()} | {"verdict": row.verdict}
            for row in self.differences
        ]
        first, second = map(str, self.folders)
        counts = {"pairs": len(self.pairs), "unpaired": self.unpaired, "unreadable": self.unreadable}
        return {"first": first, "second": second} | counts | {"rewards": rows}


class Scoring(NamedTuple):
    """How images are scored: rewards by name, the folder of references, device, images per batch, where to report."""

    rewards: Sequence[str]
    reference: Path | None
    device: str
    batch_size: int
    messages: Console


def compare(first: Path, second: Path, scoring: Scoring) -> Comparison:
    """Score the images that both folders hold under the same relative path (any image suffix).

    Raises:
        ValueError: a folder holds no image, nothing pairs, or a reward needs references.
    """
    rewards = [load(spec, device=scoring.device) for spec in scoring.rewards]
    if scoring.reference is None and (needy := [reward.name for reward in rewards if reward.needs_references]):
        raise ValueError(f"{', '.join(needy)} compares with references: pass --reference FOLDER.")
    references = References(scoring.reference) if scoring.reference is not None else None
    (files, problems), (others, more) = find_images([first]), find_images([second])
    for path, problem in (problems | more).items():
        say(scoring.messages, f"{path}: {problem}", label="skipped", style="yellow")
    pairs = _paired(files, References(second))
    if not pairs:
        raise ValueError(f"{first} and {second} have no image in common: pairs have the same path in both folders.")
    columns = []
    with progress_bar(scoring.messages) as progress:
        for side, folder in enumerate((first, second)):
            task = progress.add_task(folder.name, total=len(pairs))
            chosen = {pair[side]: pair.relative for pair in pairs}
            columns.append(_scores(chosen, rewards, references, scoring, partial(progress.advance, task)))
    intact = [pair for pair in pairs if pair.first in columns[0] and pair.second in columns[1]]
    scores = np.array([[column[pair[side]] for pair in intact] for side, column in enumerate(columns)])
    scores = scores.reshape(2, len(intact), len(rewards))
    names = tuple(reward.name for reward in rewards)
    found = tuple(difference(name, *scores[:, :, column]) for column, name in enumerate(names))
    unpaired = len(files) + len(others) - 2 * len(pairs)
    return Comparison((first, second), names, tuple(intact), scores, found, unpaired, len(pairs) - len(intact))


def _paired(files: Mapping[Path, Path], folder: References) -> list[Pair]:
    pairs = []
    for file, relative in files.items():
        try:
            pairs.append(Pair(file, folder.find(relative), relative))
        except FileNotFoundError:
            continue  # counted as unpaired
    return pairs


def _scores(
    files: Mapping[Path, Path],
    rewards: Sequence[Reward],
    references: References | None,
    scoring: Scoring,
    advance: Callable[[int], None],
) -> dict[Path, list[float]]:
    """file -> its scores, for those that could be read; the others are reported."""
    found: dict[Path, list[float]] = {}
    for batch in read_ahead(files, references, device=scoring.device, batch_size=scoring.batch_size):
        for loaded, (scores, _) in zip(batch, score_loaded(rewards, batch), strict=True):
            if loaded.problem:
                say(scoring.messages, f"{loaded.path}: {loaded.problem}", label="skipped", style="yellow")
            else:
                found[loaded.path] = scores
        advance(len(batch))
    return found


def show(comparison: Comparison, console: Console) -> None:
    """The verdict of each reward as a table."""
    first, second = comparison.titles
    table = Table(title=f"{second} against {first}, {len(comparison.pairs)} pairs", title_justify="left")
    for column in ("reward", first, second, "difference", "95 % interval", "wins", "better"):
        table.add_column(column, justify="left" if column in ("reward", "better") else "right")
    names = {"first": first, "second": second, "unclear": "unclear"}
    for row in comparison.differences:
        interval = f"{row.low:+.4f} to {row.high:+.4f}"
        cells = (f"{row.first:.4f}", f"{row.second:.4f}", f"{row.mean:+.4f}", interval, f"{row.wins:.0%}")
        table.add_row(row.reward, *cells, names[row.verdict])
    console.print(table)
    if comparison.unpaired:
        console.print(f"{comparison.unpaired} images are in only one of the folders.", highlight=False)
