"""The correlation benchmark runs, reads rated image sets, and tells good rewards from bad ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import iqareward
from benchmarks import correlation
from benchmarks.correlation import DATASETS, NOISE, buildable, on_clean, on_rated, on_round_trip
from tests.benchmarks.quick import quick_run


def noisy(level: int, rng: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    clean = np.kron(rng.integers(60, 195, (4, 4, 3)), np.ones((8, 8, 1)))
    worse = np.clip(clean + level * rng.normal(0, 8, clean.shape), 0, 255)
    return Image.fromarray(clean.astype(np.uint8)), Image.fromarray(worse.astype(np.uint8))


@pytest.fixture(params=list(DATASETS))
def rated(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """Six images of falling quality in the layout of each published set."""
    name, rng = request.param, np.random.default_rng(0)
    for folder in ("images", "distorted_images", "reference_images", "1024x768"):
        (tmp_path / folder).mkdir()
    lines = {"kadid10k": ["dist_img,ref_img,dmos,var"], "tid2013": [], "koniq10k": ["image_name,c1,MOS"]}[name]
    for level in range(6):
        clean, worse = noisy(level, rng)
        if name == "kadid10k":
            clean.save(tmp_path / "images" / f"I0{level}.png")
            worse.save(tmp_path / "images" / f"I0{level}_01_01.png")
            lines.append(f"I0{level}_01_01.png,I0{level}.png,{5 - 0.5 * level},0.1")
        elif name == "tid2013":
            clean.save(tmp_path / "reference_images" / f"I0{level}.BMP")
            worse.save(tmp_path / "distorted_images" / f"i0{level}_01_1.bmp")
            lines.append(f"{5 - 0.5 * level} I0{level}_01_1.bmp")
        else:
            worse.save(tmp_path / "1024x768" / f"{level}.jpg", quality=100)
            lines.append(f"{level}.jpg,3,{80 - level}")
    files = {
        "kadid10k": "dmos.csv",
        "tid2013": "mos_with_names.txt",
        "koniq10k": "koniq10k_scores_and_distributions.csv",
    }
    (tmp_path / files[name]).write_text("\n".join(lines) + "\n")
    return name, tmp_path


def test_rated_sets_are_read_and_ranked(rated: tuple[str, Path]) -> None:
    """PSNR orders six levels of noise as people would; without references it is not scored, and says so."""
    name, folder = rated
    images = list(DATASETS[name](folder))
    assert len(images) == 6
    (row,) = on_rated(name, images, [iqareward.load("psnr")], Console(quiet=True))
    if name == "koniq10k":
        assert (row["images"], row["spearman"]) == (0, None)
    else:
        assert row["images"] == 6
        assert row["spearman"] > 0.9


def test_quick_run_ends_in_its_document() -> None:
    """The last line is the document; PSNR falls at every level of every damage."""
    document = quick_run(correlation)
    assert document["theme"] == "correlation"
    assert {row["reward"]: row["spearman"] for row in document["rows"]}["psnr"] == -1.0
    assert "no photographs in --clean None" in document["missing"]["light noise"]
    assert "--taesd" in document["missing"]["round trip"]


def roughness(images: torch.Tensor) -> torch.Tensor:
    return images.diff(dim=-1).abs().mean(dim=(1, 2, 3))


def test_small_faults_that_a_reward_pays_for(tmp_path: Path) -> None:
    """A reward for roughness rises with noise on each photograph and falls with contrast, its negative not."""
    rng = np.random.default_rng(0)
    for number in range(3):
        pixels = np.kron(rng.integers(60, 195, (4, 4, 3)), np.ones((80, 80, 1)))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"{number}.png")
    files, console = sorted(tmp_path.iterdir()), Console(quiet=True)
    rewards = [
        iqareward.NoReference(roughness, higher_is_better=True, name="rough"),
        iqareward.NoReference(roughness, higher_is_better=False, name="smooth"),
    ]
    rough, smooth = on_clean(files, rewards, console)
    assert (rough["raised"], smooth["raised"]) == ([3] * (len(NOISE) - 1), [0] * (len(NOISE) - 1))
    assert (rough["spearman"], smooth["spearman"]) == (1.0, -1.0)
    assert rough["gain"] == sorted(rough["gain"])
    rough, smooth = on_round_trip(files, rewards, lambda images: images / 2, console)
    assert (rough["raised"], smooth["raised"], smooth["images"]) == (0, 3, 3)


def test_what_cannot_be_built_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A reward whose weights cannot be had is listed with the reason, and the others are measured."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    usable, missing = buildable(["psnr", "qalign"])
    assert usable == ["psnr"]
    assert set(missing) == {"qalign"}
