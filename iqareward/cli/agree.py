"""The command `iqareward agree`: how metrics agree with human scores, with intervals over inputs."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from iqareward.agreement import MEASURES, Agreement, Estimate, MetricAgreement, agreement, spearman
from iqareward.cli.results import Row, csv_line
from iqareward.cli.score import Column, Job, check_outputs, facts_of, file_form, results, score_rest
from iqareward.cli.scoring import Scorer
from iqareward.cli.text import plain, say
from iqareward.image_files import References
from iqareward.rated import RatedTable, lower_is_better, read_rated

_FEW = 10  # inputs
TITLES = {"spearman": "Spearman", "pearson": "Pearson, fitted", "pair_accuracy": "pairs in groups"}


class Request(NamedTuple):
    """The arguments of `iqareward agree`."""

    table: str
    human: str | None
    group: str | None
    score: list[str]
    reward: list[str]
    image: str | None
    folder: Path | None
    reference: str | None
    by: str | None
    lower_is_better: list[str]
    higher_is_better: list[str]
    baseline: str | None
    limit: int | None
    scores: Path | None
    overwrite: bool
    resamples: int
    seed: int
    device: str
    batch_size: int


class Findings(NamedTuple):
    """What was found.

    Attributes:
        source: the table.
        overall: agreement over all images.
        within: agreement within each value of the column `by`.
        by: name of that column; "" = none.
        directions: for each metric a note on its direction.
        scores: metric -> N scores, higher is better.
        human: N human scores, higher is better.
    """

    source: str
    overall: Agreement
    within: dict[str, Agreement]
    by: str
    directions: dict[str, str]
    scores: dict[str, list[float]]
    human: list[float]


def run(request: Request, messages: Console) -> Findings:
    """Read the table, score the images if rewards are named, and measure the agreement.

    Raises:
        ValueError: a column, direction, file or reward does not fit.
    """
    table = read_rated(request.table)
    human_name = request.human or table.human
    if not human_name:
        raise ValueError(f"pass --human COLUMN; {table.source} has the columns {', '.join(table.columns)}.")
    kept = _kept(table, request.group or table.group, request.limit)
    human = _chosen(table.numbers(human_name, "--human"), kept)
    if human_name in request.lower_is_better:
        human = [-value for value in human]
    names = request.score or ([] if request.reward else list(table.scores))
    if not names and not request.reward:
        raise ValueError(
            f"pass --score COLUMN (a metric's scores) or --reward NAME (to score the images); {table.source} has the "
            f"columns {', '.join(table.columns)}."
        )
    _check_named(request, human_name, names)
    scores: dict[str, list[float]] = {}
    directions: dict[str, str] = {}
    for name in names:
        values = _chosen(table.numbers(name, "--score"), kept)
        falls, directions[name] = _direction(request, table, name, values)
        scores[name] = [-value for value in values] if falls else values
    if request.reward:
        scores |= _scored(request, table, kept, messages)
    groups = _groups(table, request.group or table.group, kept, messages)
    within: dict[str, Agreement] = {}
    options: dict[str, Any] = {"resamples": request.resamples, "seed": request.seed}
    compared = dict(scores)
    if request.by is not None:
        values = _chosen(table.column(request.by, "--by"), kept)
        for value in dict.fromkeys(values):
            rows = [place for place, each in enumerate(values) if each == value and human[place] == human[place]]
            if len(rows) > 1:
                part = {name: _chosen(column, rows) for name, column in scores.items()}
                within[value] = agreement(part, _chosen(human, rows), _chosen(groups, rows), **options)
        compared[f"mean of {request.by}"] = _means(values, human)
    overall = agreement(compared, human, groups, baseline=request.baseline or _best(scores, human), **options)
    return Findings(table.source, overall, within, request.by or "", directions, scores, human)


def _chosen(cells: list[Any], rows: list[int]) -> list[Any]:
    return [cells[row] for row in rows]


def _kept(table: RatedTable, group: str, limit: int | None) -> list[int]:
    """The rows of every n-th input, so that about `limit` inputs remain."""
    count = len(next(iter(table.columns.values())))
    ids = table.column(group, "--group") if group else list(map(str, range(count)))
    inputs = list(dict.fromkeys(ids))
    wanted = set(inputs[:: max(1, len(inputs) // limit)] if limit else inputs)
    return [row for row, each in enumerate(ids) if each in wanted]


def _groups(table: RatedTable, group: str, kept: list[int], messages: Console) -> list[str]:
    if group:
        return _chosen(table.column(group, "--group"), kept)
    say(messages, "No --group: every image is an input of its own, and there are no pairs within groups.")
    return list(map(str, kept))


def _check_named(request: Request, human: str, names: list[str]) -> None:
    """Refuse directions of columns that are not in use, which are likely mistyped."""
    for option in ("lower_is_better", "higher_is_better"):
        for name in getattr(request, option):
            if name not in (human, *names):
                raise ValueError(f"--{option.replace('_', '-')} {name}: it is neither --human nor a --score column.")


def _direction(request: Request, table: RatedTable, name: str, values: list[float]) -> tuple[bool, str]:
    """Whether a column falls as quality rises, and how that is known."""
    if name in request.lower_is_better:
        return True, "lower is better, as given"
    if name in request.higher_is_better:
        return False, "higher is better, as given"
    if name in table.scores:
        falls = name in table.lower_is_better
        return falls, f"{'lower' if falls else 'higher'} is better, known of {table.source}"
    falls = lower_is_better(name)
    options = f"Pass --lower-is-better {name} or --higher-is-better {name}."
    if falls is None:
        raise ValueError(f"--score {name}: no metric of this name is known, nor whether lower is better. {options}")
    if falls and any(value < 0 for value in values):
        raise ValueError(
            f"--score {name}: the metric of this name is a distance, but there are negative scores, as rewards have "
            f"them. {options}"
        )
    return falls, f"{'lower' if falls else 'higher'} is better, by its name"


class _Listed:
    """The references that a column of the table names."""

    def __init__(self, files: Mapping[Path, str], folder: Path) -> None:
        self._files, self._folder = files, folder

    def find(self, relative: Path) -> Path:
        """The reference of an image.

        Raises:
            FileNotFoundError: the table names none, or there is no such file.
        """
        cell = self._files[relative]
        if not cell:
            raise FileNotFoundError("the table names no reference")
        if not (self._folder / cell).is_file():
            raise FileNotFoundError(f"no reference {self._folder / cell}")
        return self._folder / cell


def _scored(request: Request, table: RatedTable, kept: list[int], messages: Console) -> dict[str, list[float]]:
    """Scores of the images by each reward."""
    name = request.image or table.image or "image"
    cells, folder = _chosen(table.column(name, "--image"), kept), request.folder or table.folder
    column = request.reference if request.reference is not None else table.reference
    reference: Path | _Listed | References | None = None
    if column in table.columns:
        reference = _Listed(dict(zip(map(Path, cells), _chosen(table.columns[column], kept), strict=True)), folder)
    elif column:
        reference = Path(column)
    scorer = Scorer(request.reward, reference, request.device, request.batch_size)
    if taken := set(scorer.names) & set(request.score):
        raise ValueError(f"{', '.join(taken)} is both a --score column and a --reward. Rename the column.")
    files = {folder / cell: Path(cell) for cell in cells}
    if not any(file.is_file() for file in files):
        raise ValueError(f"none of the {len(files)} images is there; the first is {next(iter(files))}. Pass --folder.")
    job = Job([], request.reward, None, None, request.scores, request.overwrite, None, False, "", 1)
    check_outputs(request.scores)
    form, facts = file_form(job, scorer.names), facts_of(files, scorer.references)
    columns = [Column(name, place) for place, name in enumerate(scorer.names)]
    with results(job, form, facts, messages) as (rows, stream):
        score_rest(rows, stream, form, files, facts, scorer, columns, messages)
        found: list[Row] = [rows[folder / cell] for cell in cells]
    return {name: [row.scores[place] for row in found] for place, name in enumerate(scorer.names)}


def _means(keys: list[str], human: list[float]) -> list[float]:
    """For each row the mean human score of its key: what one knows who knows the key alone."""
    by_key: dict[str, list[float]] = {}
    for key, value in zip(keys, human, strict=True):
        if value == value:
            by_key.setdefault(key, []).append(value)
    means = {key: sum(values) / len(values) for key, values in by_key.items()}
    return [means.get(key, math.nan) for key in keys]


def _best(scores: Mapping[str, list[float]], human: list[float]) -> str:
    """The metric of the highest Spearman correlation."""

    def height(name: str) -> float:
        rows = [
            place for place, pair in enumerate(zip(scores[name], human, strict=True)) if all(map(math.isfinite, pair))
        ]
        value = spearman(_chosen(scores[name], rows), _chosen(human, rows)) if rows else math.nan
        return -2.0 if math.isnan(value) else value

    return max(scores, key=height)


def is_complete(found: Findings) -> bool:
    """Whether every rated image has every score."""
    return all(metric.scored == found.overall.rated for metric in found.overall.metrics)


def shown(figure: Estimate, sign: str = "") -> str:
    """A figure with its interval, for people."""
    if math.isnan(figure.value):
        return ""
    return f"{figure.value:{sign}.2f} [{figure.low:{sign}.2f}, {figure.high:{sign}.2f}]"


def tables(found: Findings) -> list[list[tuple[str, ...]]]:
    """The figures, their differences from the baseline, and those within each value of `by`; headers first."""
    overall = found.overall
    figures: list[tuple[str, ...]] = [("metric", "scored", *TITLES.values())]
    differences: list[tuple[str, ...]] = [(f"minus {overall.baseline}", *TITLES.values())]
    for metric in overall.metrics:
        scored = str(metric.scored) if metric.scored == overall.rated else f"{metric.scored} of {overall.rated}"
        figures.append((metric.name, scored, *(shown(getattr(metric, name)) for name in MEASURES)))
        if metric.differences:
            differences.append((metric.name, *(shown(metric.differences[name], "+") for name in MEASURES)))
    within: list[tuple[str, ...]] = [(f"Spearman within {found.by}", *found.within)]
    by_value = [{metric.name: metric for metric in each.metrics} for each in found.within.values()]
    for name in found.scores:
        within.append((name, *(shown(metrics[name].spearman) for metrics in by_value)))
    return [table for table in (figures, differences, within if by_value else []) if len(table) > 1]


def notes(found: Findings) -> list[str]:
    """What has to be said of the figures."""
    overall = found.overall
    lines = [
        f"{overall.images} images of {overall.groups} inputs, {overall.rated} with human scores. "
        f"{overall.confidence:.0%} intervals by a bootstrap over inputs."
    ]
    if overall.groups < _FEW:
        lines.append(f"{overall.groups} inputs are too few for intervals: those shown are too narrow.")
    pairs = overall.metrics[0].pairs
    if pairs.pairs:
        lines.append(
            f"Pairs of one input: {pairs.human_ties} with equal human scores are left out; equal scores count one half."
        )
    else:
        lines.append("No two images of one input have different human scores: there are no pairs.")
    for metric in overall.metrics:
        lacking = overall.rated - metric.scored
        if lacking:
            lines.append(
                f"{metric.name}: {lacking} images without a score are left out, and {metric.pairs.unscored} pairs."
            )
        if metric.pairs.score_ties:
            lines.append(f"{metric.name}: {metric.pairs.score_ties} of {metric.pairs.pairs} pairs have equal scores.")
    lines += [f"{name}: {note}." for name, note in found.directions.items() if not note.startswith("higher")]
    if found.by:
        lines.append(f"mean of {found.by}: each image gets the mean human score of its {found.by}.")
    return lines


def show(found: Findings, console: Console) -> None:
    """Print the tables and notes."""
    for header, *rows in tables(found):
        drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
        for place, column in enumerate(header):
            drawn.add_column(plain(column), justify="right" if place else "left", overflow="fold", no_wrap=place > 0)
        for row in rows:
            drawn.add_row(*map(plain, row))
        console.width = max(console.width, Measurement.get(console, console.options.update(width=1000), drawn).minimum)
        console.print(drawn)
        console.print()
    for line in notes(found):
        say(console, line)


def as_json(found: Findings) -> str:
    """Everything as one JSON object; NaN is null."""
    document = {"source": found.source, **_plain(found.overall), "directions": found.directions}
    if found.by:
        document |= {"by": found.by, "within": {value: _plain(each) for value, each in found.within.items()}}
    return json.dumps(document, indent=2) + "\n"


def _plain(found: Agreement) -> dict[str, Any]:
    facts = {name: getattr(found, name) for name in ("images", "rated", "groups", "confidence", "baseline")}
    return facts | {"metrics": [_metric(metric) for metric in found.metrics]}


def _metric(metric: MetricAgreement) -> dict[str, Any]:
    def figure(found: Estimate) -> dict[str, float | None]:
        return {name: None if math.isnan(value) else value for name, value in found._asdict().items()}

    pairs = metric.pairs._asdict()
    return {
        "name": metric.name,
        "scored": metric.scored,
        **{name: figure(getattr(metric, name)) for name in MEASURES},
        "pairs": {name: value for name, value in pairs.items() if name != "accuracy"},
        "differences": {name: figure(found) for name, found in metric.differences.items()},
    }


def as_csv(found: Findings) -> str:
    """A line for each metric and measure, overall and within each value of the column `by`."""
    lines = [["within", "metric", "measure", "scored", "value", "low", "high"]]
    for value, each in {"": found.overall, **found.within}.items():
        for metric in each.metrics:
            figures = {name: getattr(metric, name) for name in MEASURES}
            figures |= {f"{name} - {each.baseline}": found for name, found in metric.differences.items()}
            for name, figure in figures.items():
                cells = ("" if math.isnan(number) else repr(number) for number in figure)
                lines.append([value, metric.name, name, str(metric.scored), *cells])
    return "".join(map(csv_line, lines))
