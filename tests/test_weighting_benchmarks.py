"""The benchmarks of the training signals run and end in their document; committed results hold what the pages claim."""

import importlib
import json
from pathlib import Path

import pytest

from tests.benchmarks.quick import quick_run

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["toy_weighting", "bench_overhead"])
def test_quick_run_ends_in_its_document(name, tmp_path):
    """The smoke run's last line is one JSON document with rows and targets."""
    pytest.importorskip("matplotlib")
    document = quick_run(importlib.import_module(f"benchmarks.{name}"))
    assert {"theme", "hardware", "date", "commit", "versions", "rows", "targets"} <= set(document)
    assert document["rows"]


def test_default_beats_the_tuned_constant_in_every_committed_run():
    """The whole interval of PSNR and of mean RMSE gained over the front of fixed shares is positive, as claimed."""
    runs = sorted((ROOT / "benchmarks" / "results").glob("toy_weighting_*.json"))
    assert len(runs) >= 6
    for path in runs:
        rows = {row["arm"]: row for row in json.loads(path.read_text())["rows"]}
        for gain in ("gain psnr", "gain rmse"):
            assert rows["adaptive"][gain][1] > 0, f"{path.name}: {gain}"
