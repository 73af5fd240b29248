"""The correlation benchmark runs, and tells good rewards from bad ones."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import iqareward
from benchmarks import correlation
from benchmarks.correlation import NOISE, buildable, on_clean, on_round_trip
from tests.benchmarks.quick import quick_run


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


def test_rewards_with_prompts_are_named_as_missing() -> None:
    """A reward that compares an image with its prompt does not end the benchmark, which has none."""
    usable, missing = buildable(["psnr", "hpsv3", "clipscore"])
    assert usable == ["psnr"]
    assert list(missing) == ["hpsv3", "clipscore"]
