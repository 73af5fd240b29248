"""The benchmark of the classical metrics runs and ends in the document that the reports are made from."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_quick_run_ends_in_its_document(tmp_path: Path) -> None:
    """The smoke run's last line has every key, a row per library, and ratios; --json writes the same."""
    pytest.importorskip("skimage")
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.bench_classical", "--quick"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "out.json")], capture_output=True, text=True, cwd=ROOT, check=True
    )
    document = json.loads(done.stdout.splitlines()[-1])
    assert set(document) == {"theme", "hardware", "date", "commit", "versions", "rows", "targets"}
    assert json.loads((tmp_path / "out.json").read_text()) == document
    libraries = {row["library"] for row in document["rows"] if row["metric"] == "ssim" and "library" in row}
    assert {"iqareward", "iqareward reward", "pyiqa", "piq", "scikit-image"} <= libraries
    assert all(row["ratio"] > 0 for row in document["rows"] if "ratio" in row)
    assert {"name", "value", "target", "better", "ok"} == set(document["targets"][0])
    same = [row["max_difference"] for row in document["rows"] if row.get("same") and row.get("metric") == "ssim"]
    assert max(difference for difference in same if difference is not None) < 2e-3  # pyiqa rounds luma
