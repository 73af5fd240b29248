"""`iqareward compare`: pairs, differences, intervals, and a page that a browser shows."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter
from typer.testing import CliRunner

from iqareward.cli import app
from iqareward.cli.comparison import difference, disagreement

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Truth, a blurred and a noisy version of five pictures; the noisy ones have another suffix."""
    rng = np.random.default_rng(0)
    for name in ("truth", "blurred", "noisy"):
        (tmp_path / name / "deep").mkdir(parents=True)
    for index in range(5):
        path = f"deep/{index}" if index else "0"
        picture = np.kron(rng.integers(40, 215, (6, 6, 3)), np.ones((8, 8, 1)))
        clean = Image.fromarray(picture.astype(np.uint8))
        clean.save(tmp_path / "truth" / f"{path}.png")
        clean.filter(ImageFilter.GaussianBlur(3)).save(tmp_path / "blurred" / f"{path}.png")
        noisy = np.clip(picture + rng.normal(0, 1 + index, picture.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / "noisy" / f"{path}.webp", lossless=True)
    return tmp_path


def run(folder: Path, *options: str, code: int = 0) -> str:
    arguments = ["compare", str(folder / "blurred"), str(folder / "noisy"), *options]
    result = CliRunner().invoke(app, [*arguments, "--output", str(folder / "page.html")])
    assert result.exit_code == code, result.output
    return result.stdout if code != 2 else result.stderr


def test_pairs_by_path_and_tells_the_better_folder(folders: Path) -> None:
    """Five pairs across suffixes; a little noise beats much blur by PSNR, with an interval above zero."""
    options = ("--reward", "psnr", "--reward", "ssim", "--reference", str(folders / "truth"))
    found = json.loads(run(folders, *options, "--json"))
    psnr = found["rewards"][0]
    assert (found["pairs"], found["unpaired"], found["unreadable"]) == (5, 0, 0)
    assert psnr["verdict"] == "second"
    assert psnr["wins"] == 1.0
    assert 0 < psnr["low"] < psnr["mean"] < psnr["high"]
    assert psnr["mean"] == pytest.approx(psnr["second"] - psnr["first"])
    page = (folders / "page.html").read_text()
    assert page.count("<article>") == 5
    assert page.count("<img") == 15  # both results and the reference
    assert "http" not in page
    assert "noisy" in run(folders, *options)


def test_what_cannot_be_compared_is_said(folders: Path) -> None:
    """Lone images are counted; a broken one costs its pair and the exit code; references are asked for."""
    (folders / "noisy" / "0.webp").unlink()
    (folders / "noisy" / "deep" / "1.webp").write_bytes(b"no image")
    found = json.loads(run(folders, "--reward", "piqe", "--json", code=1))
    assert (found["pairs"], found["unpaired"], found["unreadable"]) == (3, 1, 1)
    assert "--reference" in run(folders, "--reward", "ssim", code=2)
    for file in (folders / "noisy" / "deep").iterdir():
        file.rename(file.with_stem(f"other{file.stem}"))
    assert "no image in common" in run(folders, "--reward", "piqe", code=2)


def test_names_cannot_inject_markup(folders: Path) -> None:
    """A file name is text on the page, whatever it says."""
    for folder, suffix in (("blurred", ".png"), ("noisy", ".webp")):
        (folders / folder / f"0{suffix}").rename(folders / folder / f"<script>{suffix}")
    run(folders, "--reward", "piqe")
    page = (folders / "page.html").read_text()
    assert "&lt;script&gt;" in page
    assert "<script" not in page


def test_interval_covers_the_truth() -> None:
    """In 200 draws of 40 pairs the 95 % interval holds the true difference in 88 % to 99 %."""
    rng = np.random.default_rng(1)
    hits = 0
    for seed in range(200):
        base = rng.normal(0, 5, 40)
        found = difference("r", base, base + rng.normal(0.3, 1, 40), seed=seed)
        hits += found.low <= 0.3 <= found.high
    assert 176 <= hits <= 198


def test_missing_scores_cost_their_pair() -> None:
    """NaN is left out of means, wins and interval; a single pair has no interval, none has no mean."""
    found = difference("r", [0.0, np.nan, 1.0, 2.0], [1.0, 5.0, np.nan, 2.0])
    assert (found.pairs, found.first, found.second, found.mean, found.wins) == (2, 1.0, 1.5, 0.5, 0.75)
    assert difference("r", [0.0], [1.0]).verdict == "unclear"
    assert difference("r", [np.nan], [1.0]).pairs == 0


def test_disagreement_finds_contradiction() -> None:
    """The pair that one reward praises and the other condemns comes first, whatever the rewards' units."""
    first = np.zeros((4, 2))
    second = np.array([[1.0, 100.0], [1.0, -100.0], [0.5, 50.0], [np.nan, 100.0]])
    found = disagreement(first, second)
    assert np.nanargmax(found) == 1
    assert np.isnan(found[3])
    np.testing.assert_allclose(found[[0, 2]], 0, atol=0.5)
    np.testing.assert_allclose(disagreement(first[:, :1], second[:, :1])[:3], [1.1547, 1.1547, 0.57735], rtol=1e-4)


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium on this machine")
@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 500])
def test_page_in_a_browser(folders: Path, width: int) -> None:
    """Chromium draws the page at the width of a desk and of a telephone: text, and the pictures in colour."""
    run(folders, "--reward", "psnr", "--reward", "piqe", "--reference", str(folders / "truth"))
    shot = folders / "shot.png"
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folders / 'profile'}",
    ]
    options += [f"--window-size={width},1600", f"--screenshot={shot}", (folders / "page.html").as_uri()]
    subprocess.run([str(BROWSER), *options], check=True, capture_output=True, timeout=600)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert pixels.shape[1] == width
    colourful = (pixels.max(2) - pixels.min(2) > 60).mean()
    assert colourful > 0.05  # the pictures
    assert (pixels.max(2) < 80).mean() > 0.005  # the text
