"""The command `iqareward monitor`: find reward hacking in a folder of samples per step of training."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from iqareward.cli.compare import Problem, matched
from iqareward.cli.scoring import Scorer, progress_bar
from iqareward.cli.text import plain, printable, say
from iqareward.functional.statistics import STATISTICS
from iqareward.monitor import HackingMonitor, MonitorReport
from iqareward.rewards.metric import NoReference

_NUMBER = re.compile(r"(\d+\.)?\d+(?=\D*$)")
_STATISTICS = {
    name: NoReference(found, higher_is_better=True, name=name, min_side=3) for name, found in STATISTICS.items()
}
REWARD, HELD_OUT, STATISTIC = "trained", "held out", "statistic"


class Job(NamedTuple):
    """The arguments of `iqareward monitor`."""

    folder: Path
    reward: str | None
    held_out: list[str]
    reference: Path | None
    baseline: int | None
    patience: int
    effect: float
    device: str
    batch_size: int


class Alarm(NamedTuple):
    """A measure that raised an alarm: the first step of the change that raised it, and what was said then."""

    measure: str
    since: int
    sentence: str


class Findings(NamedTuple):
    """What was found in N images at S steps.

    Attributes:
        kinds: M measures by name, and whether each is the trained reward, a held-out reward or a statistic.
        steps: S folders by step, the baseline first.
        reports: for each step what was found; for the baseline its means alone.
        alarms: by measure, in the order in which they began.
        truth: mean of each statistic over the ground truth, if there is any.
        images: N paths relative to the baseline, each with its S files.
        references: for each image its reference, if there is one.
        scores: `[S, N, M]`, NaN = not scored.
        problems: files that were left out.
    """

    kinds: dict[str, str]
    steps: dict[int, Path]
    reports: tuple[MonitorReport, ...]
    alarms: tuple[Alarm, ...]
    truth: dict[str, float]
    images: dict[Path, tuple[Path, ...]]
    references: tuple[Path | None, ...]
    scores: np.ndarray
    problems: tuple[Problem, ...]


def run(job: Job, messages: Console) -> Findings:
    """Score every step and compare it with the baseline.

    Raises:
        ValueError: there are too few steps, two with one number, no image that all have, or a name that does not fit.
    """
    if job.reward is not None and job.reward in job.held_out:
        raise ValueError(f"--held-out {job.reward} is the trained reward, which cannot check itself. Choose another.")
    if not job.held_out and job.reference is None and job.reward is None:
        say(messages, "Image statistics alone are compared. Pass --reward, --held-out and --reference for more.")
    names = [*([] if job.reward is None else [job.reward]), *job.held_out]
    scorer = Scorer(names, job.reference, job.device, job.batch_size, more=_STATISTICS)
    steps = _steps(job.folder, job.baseline, messages)
    if len(steps) <= job.patience:
        raise ValueError(
            f"an alarm needs {job.patience} steps in a row after the baseline, and {job.folder} has {len(steps) - 1}. "
            f"Pass --patience {len(steps) - 1}."
        )
    problems: list[Problem] = []
    images = matched(list(steps.values()), [folder.name for folder in steps.values()], problems)
    if not images:
        raise ValueError(f"the steps in {job.folder} have no image in common. They need the same names in all steps.")
    references = tuple(map(scorer.reference_to_show, images))
    if job.reference is not None and (lacking := references.count(None)):
        say(messages, f"{lacking} of {len(images)} images have no reference in {job.reference}.")
    with progress_bar(messages) as progress:
        statistics = Scorer([], None, job.device, job.batch_size, more=_STATISTICS)
        truth = _scores(statistics, references, "references", progress, problems)
        scores = np.stack(
            [
                _scores(scorer, [files[place] for files in images.values()], folder.name, progress, problems, images)
                for place, folder in enumerate(steps.values())
            ]
        )
    trained = 0 if job.reward is None else 1
    columns = ["reward"] * trained + scorer.names[trained:]
    held_out = dict(zip(columns[trained : len(names)], scorer.rewards[trained:], strict=False))
    monitor = HackingMonitor(held_out, patience=job.patience, effect=job.effect)
    reports: list[MonitorReport] = []
    for table in scores:
        values = {name: torch.from_numpy(table[:, column]) for column, name in enumerate(columns)}
        clean = {name: torch.from_numpy(truth[:, column]) for column, name in enumerate(_STATISTICS)}
        monitor.add_values(values, clean if any(references) and not reports else {})
        reports.append(monitor.step())
    kinds = {name: HELD_OUT if name in held_out else REWARD if name == "reward" else STATISTIC for name in columns}
    needed = ["reward"] if trained else columns  # no alarm without a rise of the trained reward
    if not any(math.isfinite(report.changes.get(name, math.nan)) for report in reports for name in needed):
        reason = "".join(f" {problem.file} was left out: {problem.reason}." for problem in problems[:1])
        raise ValueError(
            f"an alarm needs at least 4 images of the baseline and of a later step that {job.reward or 'a measure'} "
            f"scores; {job.folder} has fewer, out of {len(images)} of the same names.{reason}"
        )
    truths = torch.from_numpy(truth).nanmean(0).tolist() if any(references) else []
    means = dict(zip(_STATISTICS, truths, strict=False))
    alarms = _alarms(reports, list(steps), job.patience)
    return Findings(kinds, steps, tuple(reports), alarms, means, images, references, scores, tuple(problems))


def _steps(top: Path, baseline: int | None, messages: Console) -> dict[int, Path]:
    """Sub-folders by the last number in their names, the baseline first; earlier steps are left out."""
    if not top.is_dir():
        raise ValueError(f"{top}: there is no such folder.")
    found: dict[int, Path] = {}
    other: list[str] = []
    for folder in sorted(each for each in top.iterdir() if each.is_dir() and not each.name.startswith(".")):
        number = _NUMBER.search(folder.name)
        if number is None:
            other.append(folder.name)
        elif number[1]:
            raise ValueError(f"{folder}: steps are whole numbers, not {number[0]}. Rename it.")
        elif found.setdefault(int(number[0]), folder) != folder:
            raise ValueError(f"{found[int(number[0])]} and {folder} are the same step. Rename one.")
    if other:
        say(messages, f"{', '.join(other)}: no step, because there is no number in the name", label="ignored:")
    steps = dict(sorted(found.items()))
    if len(steps) < 2:
        raise ValueError(
            f"{top} expected a folder for each step, such as step_0000 and step_0100, each with images of the same "
            f"names; got {len(steps)} of them."
        )
    baseline = next(iter(steps)) if baseline is None else baseline
    if baseline not in steps or baseline == max(steps):
        raise ValueError(f"--baseline {baseline} is not a step with later ones; the steps are {list(steps)}.")
    return {step: folder for step, folder in steps.items() if step >= baseline}


def _scores(
    scorer: Scorer,
    files: Sequence[Path | None],
    title: str,
    progress: Any,
    problems: list[Problem],
    relative: Iterable[Path] | None = None,
) -> np.ndarray:
    """`[N, M]` scores of N files, NaN = not scored or no file; a file that is given twice is scored once."""
    paths = files if relative is None else relative
    wanted = {file: path for file, path in zip(files, paths, strict=True) if file is not None and path is not None}
    rows: dict[Path, list[float]] = {}
    task = progress.add_task(printable(title), total=len(wanted))
    for batch in scorer.score(wanted):
        for file, values, reason in batch:
            rows[file] = values
            if reason:
                problems.append(Problem(file, reason))
        progress.advance(task, len(batch))
    nothing = [math.nan] * len(scorer.rewards)
    return np.array([nothing if file is None else rows[file] for file in files])


def _alarms(reports: Sequence[MonitorReport], steps: Sequence[int], patience: int) -> tuple[Alarm, ...]:
    found: dict[str, Alarm] = {}
    for place, report in enumerate(reports):
        for measure, sentence in zip(report.alarmed, report.alarms, strict=True):
            found.setdefault(measure, Alarm(measure, steps[place - patience + 1], sentence))
    return tuple(sorted(found.values(), key=lambda alarm: alarm.since))


def table(findings: Findings) -> list[tuple[str, ...]]:
    """A line for each measure, below the names of the columns; "alarm" is the step since which."""
    steps = list(findings.steps)
    since = {alarm.measure: str(alarm.since) for alarm in findings.alarms}
    rows: list[tuple[str, ...]] = [
        ("measure", "kind", f"step {steps[0]}", f"step {steps[-1]}", "change", "truth", "alarm")
    ]
    for name, kind in findings.kinds.items():
        means = [findings.reports[place].means.get(name, math.nan) for place in (0, -1)]
        change = findings.reports[-1].changes.get(name, math.nan)
        truth = findings.truth.get(name, math.nan)
        cells = [*(_shown(mean, ".4g") for mean in means), _shown(change, "+.2f", " sd"), _shown(truth, ".4g")]
        rows.append((name, kind, *cells, since.get(name, "")))
    return rows


def _shown(number: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(number) else f"{number:{form}}{unit}"


def show(findings: Findings, console: Console) -> None:
    """Print a line for each measure, and the alarms."""
    header, *rows = table(findings)
    drawn = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for place, column in enumerate(header):
        drawn.add_column(column, justify="left" if place < 2 else "right", overflow="fold", no_wrap=place > 1)
    for row in rows:
        drawn.add_row(*map(plain, row), style="red" if row[-1] else "")
    console.print(drawn)
    for alarm in findings.alarms:
        say(console, f"since step {alarm.since}: {alarm.sentence}", label="alarm:", style="red")
    if not findings.alarms:
        say(console, no_alarm(findings))


def no_alarm(findings: Findings) -> str:
    """What to say in place of alarms, so that the gate of the trained reward is not taken for good samples."""
    gated = REWARD in findings.kinds.values()
    return "no alarm" + ("; changes count only at steps where the trained reward has risen" if gated else "")


def as_json(findings: Findings) -> str:
    """Everything as one JSON object; NaN is null."""

    def numbers(values: Mapping[str, float]) -> dict[str, float | None]:
        return {name: value if math.isfinite(value) else None for name, value in values.items()}

    steps = [
        {"step": step, "folder": str(folder), "means": numbers(report.means), "changes": numbers(report.changes)}
        | {"alarms": list(report.alarmed)}
        for (step, folder), report in zip(findings.steps.items(), findings.reports, strict=True)
    ]
    document = {
        "images": len(findings.images),
        "measures": findings.kinds,
        "ground_truth": numbers(findings.truth),
        "steps": steps,
        "alarms": [alarm._asdict() for alarm in findings.alarms],
        "left_out": [{"file": str(file), "reason": reason} for file, reason in findings.problems],
    }
    return json.dumps(document, indent=2) + "\n"


def as_csv(findings: Findings) -> str:
    """A line for each step and measure."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["step", "measure", "kind", "mean", "change", "alarm"])
    for step, report in zip(findings.steps, findings.reports, strict=True):
        for name, kind in findings.kinds.items():
            values = (report.means.get(name, math.nan), report.changes.get(name, math.nan))
            cells = ("" if math.isnan(value) else repr(value) for value in values)
            writer.writerow([step, name, kind, *cells, int(name in report.alarmed)])
    return stream.getvalue()


def most_changed(findings: Findings, count: int) -> list[int]:
    """The images that an alarm is most about, at the last step; the first ones if there is none."""
    if not findings.alarms:
        return list(range(len(findings.images)))[:count]
    name = findings.alarms[0].measure
    column = list(findings.kinds).index(name)
    change = findings.scores[-1, :, column] - findings.scores[0, :, column]
    keys = np.nan_to_num(change if findings.kinds[name] == HELD_OUT else -np.abs(change), nan=np.inf)
    return np.argsort(keys, kind="stable").tolist()[:count]
