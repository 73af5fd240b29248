"""The command `iqareward score` for data sets, which are scored on Ray into a folder of parquet files."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from iqareward.cli.results import Summary, show
from iqareward.cli.scoring import progress_bar
from iqareward.cli.text import say
from iqareward.datasets.job import Progress, score_dataset
from iqareward.datasets.shards import is_dataset

_SECONDS_BETWEEN_LINES = 30.0  # where there is no terminal for a bar


def is_meant(paths: Sequence[str], output_format: str | None) -> bool:
    """Whether `--format parquet` or a path asks for the scores of a data set."""
    return output_format == "parquet" or any(map(is_dataset, paths))


def run_dataset(
    paths: list[str],
    rewards: list[str],
    output: str | None,
    options: Mapping[str, Any],
    unused: Mapping[str, object],
    messages: Console,
) -> bool:
    """Score a data set; returns whether every row has every score, and says on `messages` why not.

    Raises:
        ValueError: it cannot be done.
    """
    if output is None or output.endswith((".csv", ".json", ".jsonl")):
        raise ValueError("a data set is scored into parquet files: pass --output FOLDER, or a URL such as s3://...")
    if given := [name for name, value in unused.items() if value]:
        raise ValueError(
            f"{', '.join(given)}: not for data sets. They have --references COLUMN, and --num-gpus for --device."
        )
    with progress_bar(messages) as bar:
        task = bar.add_task("shards", total=None)
        last = time.monotonic()

        def tell(progress: Progress) -> None:
            nonlocal last
            rate = progress.rows / max(progress.seconds, 1e-9)
            digits = 0 if rate >= 10 else 1
            text = f"{progress.rows:,} images ({rate:,.{digits}f}/s, {progress.incomplete:,} incomplete); shards"
            bar.update(task, description=text, completed=progress.done, total=progress.shards)
            if not messages.is_terminal and time.monotonic() - last > _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                left = (progress.shards - progress.done) * progress.seconds / max(progress.done - progress.resumed, 1)
                say(messages, f"{text} {progress.done:,} of {progress.shards:,}; about {left / 60:,.0f} min left")

        report = score_dataset(paths, rewards, output, on_progress=tell, **options)
    for shard, reason in report.failed.items():
        say(messages, f"{shard}: {reason}", label="failed", style="yellow")
    columns = [
        Summary(name, _known(report.means[name]), _known(report.stds[name]), count, report.rows)
        for name, count in report.scored.items()
    ]
    show(messages, columns, ())
    resumed = f" Scored before: {report.resumed:,} of {report.shards:,} shards." if report.resumed else ""
    say(messages, f"{report.rows - report.incomplete:,} of {report.rows:,} images have every score.{resumed}")
    if report.incomplete:
        say(messages, f"The column `problem` says why not, for example: {report.example}")
    say(messages, f"Written: {report.output}")
    return not report.incomplete and not report.failed


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
