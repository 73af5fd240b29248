"""The benchmark of concurrent callers runs and ends in its document."""

import pytest

from benchmarks import bench_batching
from tests.benchmarks.quick import quick_run


@pytest.mark.slow
def test_quick_run_ends_in_its_document() -> None:
    """Every reward has every way of calling, and concurrent calls did become batches."""
    document = quick_run(bench_batching, "--threads", "1")
    assert document["theme"] == "batching"
    rows = {(row["reward"], row["calling"]): row for row in document["rows"]}
    callings = ("one batch", "8 threads, direct", "8 threads", "8 threads, calls of 4", "8 coroutines")
    assert set(rows) == {(reward, calling) for reward in ("owl2", "niqe", "ssim") for calling in callings}
    assert all(row["images_per_s"] > 0 for row in rows.values())
    assert rows["owl2", "8 coroutines"]["images_per_batch"] > 2
    assert len(document["targets"]) == 3
