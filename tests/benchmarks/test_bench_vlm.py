"""The benchmark of vision-language rewards still runs, counts its work right, and ends in one line of JSON."""

import pytest

pytest.importorskip("transformers", reason="needs the extra vlm")

from benchmarks import bench_vlm
from tests.benchmarks.quick import quick_run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")  # of random weights
def test_smoke_run_ends_in_json() -> None:
    """Every mode of a tiny network appears, with a positive speed."""
    document = quick_run(bench_vlm, "--device", "cpu", "--threads", "1")
    assert document["theme"] == "vlm"
    modes = {"expected", "expected, one decimal", "levels", "published, answer only", "published, thinking"}
    assert {row["mode"] for row in document["rows"]} == modes
    assert all(row["images_per_s"] > 0 for row in document["rows"])


def test_work_of_the_full_network() -> None:
    """At 512 x 512 with 104 text tokens: 1.71, 5.62 and, for all positions, .47 TFLOP, as counted independently."""
    from benchmarks.bench_vlm import image_tokens, qwen_config, tflop_per_image

    config = qwen_config()
    assert image_tokens(config, 512) == 324
    tower, decoder, head = tflop_per_image(config, 512, text_tokens=104, read=428)
    assert abs(tower - 1.71) < 0.01
    assert abs(decoder - 5.62) < 0.01
    assert abs(head - 0.47) < 0.01
