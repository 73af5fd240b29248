"""The experiment as data files."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from iqareward.atomic import write_text
from iqareward.demo.experiment import Experiment
from iqareward.demo.summary import DECIMALS
from iqareward.demo.wording import label


def write_scores(experiment: Experiment, path: Path) -> None:
    """A CSV row per picture and degradation; an empty cell = not scored, or no weight because it is an original."""
    # two more than are shown; beyond that, single-precision sums may differ from run to run
    digits = {name: label(name).decimals + 2 for name in experiment.scores}
    stream = io.StringIO()
    rows = csv.writer(stream, lineterminator="\n")
    rows.writerow(["photograph", "degradation", "level", "strength", *experiment.scores, "rmse", "w_rl", "w_sft"])
    for p, photograph in enumerate(experiment.photographs):
        for d, degradation in enumerate(experiment.degradations):
            for level in range(experiment.num_levels + 1):
                strength = degradation.strengths[level - 1] if level else ""
                scores = [_cell(values[p, d, level], digits[name]) for name, values in experiment.scores.items()]
                weights = (experiment.difficulty, *experiment.weights)
                ours = [_cell(values[p, d, level - 1], DECIMALS) if level else "" for values in weights]
                rows.writerow([photograph.name, degradation.name, level, strength, *scores, *ours])
    write_text(path, stream.getvalue())


def _cell(value: Tensor, decimals: int) -> float | str:
    return "" if value.isnan() else round(float(value), decimals)


def write_results(results: dict[str, Any], path: Path) -> None:
    """The summary as JSON; null = undefined."""
    write_text(path, json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
