"""The latency benchmark runs and can build everything that it promises to time."""

from pathlib import Path

import pytest
import torch

from benchmarks import latency
from benchmarks.latency import build, measure, seconds_of, subjects
from tests.benchmarks.quick import quick_run


@pytest.mark.filterwarnings("ignore")
def test_quick_run_ends_in_its_document() -> None:
    """Three rewards, each with a time, a peak and a ratio to its fastest peer."""
    document = quick_run(latency)
    assert [row["reward"] for row in document["rows"]] == ["ssim", "piqe", "fsim"]
    for row in document["rows"]:
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["ratio"] == pytest.approx(row["images_per_second"] / row["peers"][row["fastest_peer"]])


def test_feature_distances_are_built_offline(tmp_path: Path) -> None:
    """LPIPS and its package run on seeded backbones, so that they can be timed without a network."""
    (lpips,) = (subject for subject in subjects(tmp_path) if subject.name == "lpips")
    calls, missing = build(lpips)
    assert (set(calls), missing) == ({"iqareward", "lpips"}, {})
    (row,) = measure(lpips, [(64, 2)], rounds=1)
    assert row["fastest_peer"] == "lpips"


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    """A peer that cannot be built is listed with the reason, and the others are timed."""
    (ssim,) = (subject for subject in subjects(tmp_path) if subject.name == "ssim")

    def make() -> None:
        raise ImportError("no module named peer")

    (row,) = measure(ssim._replace(peers={"peer": make}), [(64, 1)], rounds=1)
    assert row["missing"] == {"peer": "no module named peer"}
    assert row["ratio"] is None


def test_calls_are_taken_in_turns() -> None:
    """After one call each to warm up, every call is timed as often as asked, alternating."""
    order: list[str] = []
    times = seconds_of({name: lambda name=name: order.append(name) for name in "ab"}, rounds=3)
    assert order == list("abababab")
    assert {name: len(values) for name, values in times.items()} == {"a": 3, "b": 3}
    assert torch.tensor(times["a"]).gt(0).all()
