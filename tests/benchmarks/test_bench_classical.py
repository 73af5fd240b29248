"""The benchmark of the classical metrics runs and ends in the document that the reports are made from."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import bench_classical
from benchmarks._harness import document
from benchmarks.bench_classical import busy_targets
from tests.benchmarks.quick import quick_run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_quick_run_ends_in_its_document(tmp_path: Path) -> None:
    """The smoke run's last line has every key, a row per library, and ratios; --json writes the same."""
    pytest.importorskip("skimage")
    record = quick_run(bench_classical, "--json", str(tmp_path / "out.json"))
    assert set(record) == {"theme", "hardware", "date", "commit", "versions", "rows", "targets"}
    assert json.loads((tmp_path / "out.json").read_text()) == record
    libraries = {row["library"] for row in record["rows"] if row["metric"] == "ssim" and "library" in row}
    assert {"iqareward", "iqareward reward", "pyiqa", "piq", "scikit-image"} <= libraries
    assert all(row["ratio"] > 0 for row in record["rows"] if "ratio" in row)
    assert {"name", "value", "target", "better", "ok"} == set(record["targets"][0])
    same = [row["max_difference"] for row in record["rows"] if row.get("same") and row.get("metric") == "ssim"]
    assert max(difference for difference in same if difference is not None) < 2e-3  # pyiqa rounds luma


def test_the_device_measured_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of CPU tensors names the CPU on a machine with a GPU too, and one of a GPU names that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: f"GPU {device}")
    assert "threads" in document("theme", [], [], [])["hardware"]
    assert document("theme", [], [], [], torch.device("cuda:1"))["hardware"] == "GPU cuda:1"


def test_busy_targets() -> None:
    """All threads are compared with one thread of ours, and with the fastest peer at any number of threads."""
    ours = {("iqareward", 2): 30.0, ("iqareward", 1): 20.0, ("iqareward reward", 2): 9.0, ("iqareward reward", 1): 12.0}
    speeds = {**ours, ("a", 2): 5.0, ("a", 1): 10.0, ("b", 2): 2.0}
    rows = [
        {"metric": "ssim", "library": library, "threads": threads, "images_per_second": speed}
        for (library, threads), speed in speeds.items()
    ]
    assert [(row["name"], row["value"]) for row in busy_targets(rows)] == [
        ("ssim busy, iqareward, 2 threads vs one", 1.5),
        ("ssim busy, iqareward reward, 2 threads vs one", 0.75),
        ("ssim busy vs a", 3.0),
    ]
