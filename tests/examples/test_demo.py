"""A smoke run of the demo: its report holds the photographs and tables, with the numbers of its data."""

import base64
import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="the figures need matplotlib")
pytest.importorskip("diffusers", reason="the restorer needs diffusers")
pytest.importorskip("accelerate", reason="the trainer needs accelerate")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
VERSIONS = ["degraded", "one step", "restored", "after RL", "ground truth"]
REWARDS = {"haarpsi", "psnr", "ssim", "cvvdp", "quick", "niqe"}  # and ST-LPIPS where it is installed
PHOTOGRAPHS, CHARTS = 6, 5


class Run(NamedTuple):
    """What a run wrote and printed."""

    folder: Path
    page: str
    results: dict[str, Any]
    printed: str
    progress: str


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One run with the smallest settings, as `make demo` starts it, on 80 columns."""
    folder = tmp_path_factory.mktemp("demo") / "new"
    command = [sys.executable, "-m", "examples.demo", "--quick", "--output", str(folder)]
    environment = {**os.environ, "COLUMNS": "80", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=True, timeout=600
    )
    page = (folder / "report.html").read_text(encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return Run(folder, page, results, done.stdout, done.stderr)


def shown(value: float, measure: str) -> str:
    """A number as page and terminal show it."""
    value *= 255 if measure == "rmse" else 1
    digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1.5 else 3
    return f"{value + 0.0:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def test_photographs_are_shown(demo: Run) -> None:
    """Every photograph is there in every version, none of them blank, and the page loads nothing from outside."""
    sources = re.findall(r'src="([^"]*)"', demo.page)
    photographs = [source for source in sources if source.startswith("data:image/jpeg;base64,")]
    charts = [source for source in sources if source.startswith("data:image/svg+xml;base64,")]
    assert (len(photographs), len(charts)) == (PHOTOGRAPHS * len(VERSIONS), CHARTS)
    assert len(sources) == len(photographs) + len(charts)
    assert not re.search(r"<(script|link)|url\(|@import", demo.page)
    for source in photographs:
        image = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))
        assert image.size == (96, 96)
        assert np.asarray(image).std() > 2
    with Image.open(demo.folder / "demo_photographs.jpg") as picture:
        assert picture.width > len(VERSIONS[:-1]) * 96


def test_numbers_agree(demo: Run) -> None:
    """The page and the terminal show the means of the file, which are those of the photographs."""
    means = demo.results["means"]
    assert list(means) == VERSIONS
    assert set(demo.results["rewards"]) | {"stlpips"} == REWARDS | {"stlpips"}
    for name in (*demo.results["rewards"], "rmse"):
        row = re.findall(rf'<tr data-measure="{name}">(.*?)</tr>', demo.page)[0]
        cells = [shown(means[version][name], name) for version in VERSIONS]
        assert re.findall(r"<td[^>]*>([^<]*)", row) == cells
        assert re.search(" +".join(map(re.escape, cells)), demo.printed)
        for version in VERSIONS:
            values = [each["scores"][version][name] for each in demo.results["photographs"]]
            assert np.mean(values) == pytest.approx(means[version][name], rel=1e-4, abs=1e-6)
    assert means["ground truth"]["haarpsi"] == 1
    assert means["ground truth"]["rmse"] == 0


def test_thirds_and_weights(demo: Run) -> None:
    """Errors grow from the easy to the hard third, and SFT weighs more the smaller the error."""
    errors = [found["restored"]["rmse"] for found in demo.results["thirds"].values()]
    assert 0 < errors[0] < errors[1] < errors[2] < 1
    for version in ("restored", "after RL"):
        found = sorted(
            (each["scores"][version]["rmse"], each["weights"][version]["sft"]) for each in demo.results["photographs"]
        )
        weights = [weight for _, weight in found]
        assert weights == sorted(weights, reverse=True)
        assert 0 <= weights[-1] < weights[0] <= 1


def test_scores_as_a_table(demo: Run) -> None:
    """A row for each version of each photograph; restorations have weights."""
    with (demo.folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["version"] for row in rows] == VERSIONS * PHOTOGRAPHS
    assert {row["task"] for row in rows} == {"denoising", "deblurring", "super-resolution", "jpeg", "blind"}
    for row in rows:
        assert all(row[name] for name in (*REWARDS, "rmse"))
        assert bool(row["w_rl"]) == bool(row["w_sft"]) == (row["version"] in ("restored", "after RL"))


def test_terminal(demo: Run) -> None:
    """The summary fits on 80 columns, and without a terminal each stage still tells its progress and nothing else."""
    lines = demo.printed.splitlines()
    assert all(len(line) <= 80 for line in lines if str(demo.folder) not in line)
    assert "…" not in demo.printed
    for line in demo.progress.splitlines():
        assert re.match(r" *\d+ s  \w|RL \d+/2 |The ground truth scores ", line), line
