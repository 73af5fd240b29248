"""The benchmark still runs and ends in one line of JSON."""

import pytest

from benchmarks import bench_qalign
from iqareward.rewards.owl2.network import Owl2Config
from tests.benchmarks.quick import quick_run


@pytest.mark.slow
def test_smoke_run_ends_in_json() -> None:
    """Every mode of a tiny network appears, with a positive speed."""
    document = quick_run(bench_qalign, "--no-compile", "--device", "cpu")
    assert document["theme"] == "qalign"
    assert {row["mode"] for row in document["rows"]} == {"eager", "shared", "eager, mixed sizes", "reference"}
    assert all(row["images_per_s"] > 0 for row in document["rows"])


def test_work_of_the_full_network() -> None:
    """The estimate agrees with the count that the design started from, 1.74 TFLOP per image."""
    from benchmarks.bench_qalign import tflop_per_image

    assert abs(tflop_per_image(Owl2Config()) - 1.74) < 0.01
