"""A smoke run of the demo: its report holds the figures and tables, with plausible numbers."""

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

pytest.importorskip("skimage", reason="the photographs come with scikit-image")
pytest.importorskip("matplotlib", reason="the figures need matplotlib")
pytest.importorskip("diffusers", reason="the restorer needs diffusers")
pytest.importorskip("accelerate", reason="the trainer needs accelerate")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
REWARDS = {"psnr", "ssim", "ms_ssim", "gmsd", "haarpsi", "niqe", "piqe"}
FIGURES = {"curves.png", "samples.png", "weights.png", "restored.png", "training.png"}


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


def assert_drawn(image: Image.Image) -> None:
    """An image that is blank has one colour."""
    pixels = np.asarray(image.convert("RGB"))
    assert pixels.std() > 2
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 30


def test_figures_are_drawn(demo: Run) -> None:
    """Every figure is there and not blank, and so is every image within the report, which loads nothing else."""
    assert {path.name for path in demo.folder.glob("*.png")} == FIGURES
    for name in FIGURES:
        with Image.open(demo.folder / name) as figure:
            assert figure.width > 1000
            assert_drawn(figure)
    sources = re.findall(r'src="([^"]*)"', demo.page)
    assert len(sources) == len(FIGURES) + 2 * 4 * 3  # photographs, kinds of damage, levels
    for source in sources:
        assert source.startswith("data:image/")
        assert_drawn(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def test_correlations(demo: Run) -> None:
    """Rewards that see the original fall at every level; the page and the terminal show the numbers of the file."""
    assert demo.results["rewards"].keys() == REWARDS
    for name, found in demo.results["rewards"].items():
        (row,) = re.findall(rf'<tr data-reward="{name}">(.*?)</tr>', demo.page)
        cells = [text.replace("\N{MINUS SIGN}", "-") for text in re.findall(r"<td[^>]*>([^<]*)", row)]
        means = [cell["mean"] for cell in found["correlation"].values()]
        assert cells == [*(f"{mean:.2f}" for mean in means), f"{found['above_original']:.0%}"]
        assert all(-1 <= mean <= cell["worst"] <= 1 for mean, cell in zip(means, found["correlation"].values()))
        if name not in ("niqe", "piqe"):
            assert means == [-1] * 4
            assert found["above_original"] == 0
    assert all(title in demo.printed for title in ("PSNR", "MS-SSIM", "HaarPSI", "PIQE"))


def test_scores_and_weights(demo: Run) -> None:
    """Each image has all scores; SFT weighs more the smaller the error, and more when all errors shrink."""
    with (demo.folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 3
    assert all(row[name] for row in rows for name in REWARDS)
    assert all(row["ssim"] == "1.0" and not row["w_sft"] for row in rows if row["level"] == "0")
    damaged = sorted((float(row["rmse"]), float(row["w_sft"])) for row in rows if row["rmse"])
    assert [weight for _, weight in damaged] == sorted((weight for _, weight in damaged), reverse=True)
    shares = [row["sft"] for row in demo.results["mean_weights"]]
    assert shares == sorted(shares)
    assert 0.3 < shares[0] < 0.7
    assert shares[-1] > 0.9


def test_training(demo: Run) -> None:
    """Errors grow from the easy to the hard third, and every third has a row with all measures."""
    assert demo.results["training"].keys() == {"learned", "rmse", "ssim", "gmsd"}
    before = [pair[0] for pair in demo.results["training"]["rmse"].values()]
    assert 0 < before[0] < before[1] < before[2] < 1
    for third in ("easy", "middle", "hard"):
        assert re.search(rf"<tr><td>{third}</td>(<td>\S+ → \S+</td>){{4}}</tr>", demo.page)
        assert re.search(rf"^{third}( +\S+ → \S+){{4}} *$", demo.printed, re.M)


def test_terminal(demo: Run) -> None:
    """The summary fits on 80 columns, and without a terminal each stage still tells its progress and nothing else."""
    lines = demo.printed.splitlines()
    assert all(len(line) <= 80 for line in lines if str(demo.folder) not in line)
    assert "…" not in demo.printed
    for line in demo.progress.splitlines():
        assert re.match(r" *\d+ s  \w|(SFT|RL) \d+/4 |The ground truth scores ", line), line
