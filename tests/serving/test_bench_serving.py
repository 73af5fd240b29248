"""The parts of bench_serving that need no Ray: the server it is measured against, and how figures become rows."""

import io
import json
import time

import pytest
import torch
from PIL import Image
from torch import Tensor

import iqareward
from benchmarks import bench_serving
from benchmarks.bench_serving import Judge, flask_client, load, pictures
from tests.serving.picture_files import encoded
from tests.tolerances import NETWORK_BATCH

SIDE = 64


@pytest.mark.slow
def test_flask_scores_what_jpeg_left():
    """The comparison is fair: the same network, on the pixels that come out of JPEG; and load comes back counted."""
    judge = Judge("tiny", 1, 4)
    images = pictures(SIDE)[:2]
    with bench_serving.flask_server("tiny", 1) as url:
        client = flask_client(url)
        found = torch.tensor([client(image) for image in images])
        loaded = bench_serving.clients("flask", [url], 2, 0.2, SIDE)
    files = [
        encoded(Image.fromarray(image.permute(1, 2, 0).mul(255).round().to(torch.uint8).numpy()), "JPEG")
        for image in images
    ]
    left = iqareward.to_images([Image.open(io.BytesIO(file)) for file in files])
    torch.testing.assert_close(found, judge(left), **NETWORK_BATCH)
    assert not torch.equal(found, judge(images))
    assert loaded["images"] == len(loaded["latencies"]) >= 2


def test_in_process_arms():
    """Batches, batches in several processes, and MicroBatched count what they scored."""
    judge = Judge("tiny", 1, 32)
    whole = bench_serving.in_process(judge, 0.01, SIDE, 8)
    apart = bench_serving.one_per_core("tiny", 0.01, SIDE, 4, 2)
    merged = bench_serving.micro_batched(judge, 0.2, SIDE)
    assert whole["images"] >= 8
    assert apart["images"] > 0
    assert len(merged["latencies"]) == merged["images"] > 0


def test_load_counts_what_is_answered_under_load():
    """Neither the warm-up nor the last answers count, and every client asks for images of its own."""
    asked: list[int] = []

    def score(image: Tensor) -> float:
        asked.append(int(image))
        time.sleep(0.05)
        return 0.0

    latencies, seconds = load([score] * 2, torch.arange(1000), 2.0, 1.0)
    assert seconds == 2.0
    assert 1 <= len(latencies) <= 80  # two clients, and forty times 50 ms
    assert len(latencies) + 2 <= len(asked)
    assert all(latency >= 50 for latency in latencies)
    assert {0, 1, 2} <= set(asked)


def test_rows_and_targets():
    """Rounds are pooled, and targets compare the right arms."""
    rounds = [{"images": n, "seconds": 2.0, "latencies": [10.0] * n, "images_per_batch": 4.0} for n in (8, 10, 12)]
    line = bench_serving.row("server", 64, rounds)
    assert (line["images_per_s"], line["p99_ms"], line["images_per_batch"]) == (5.0, 10.0, 4.0)
    speeds = {
        ("server", 64): 9.0,
        ("in process", 32): 10.0,
        ("flask", 64): 3.0,
        ("MicroBatched", 8): 8.0,
        ("in process", 8): 10.0,
    }
    rows = [{"arm": arm, "concurrency": count, "images_per_s": speed} for (arm, count), speed in speeds.items()]
    found = bench_serving.targets(rows, 64)
    assert [(line["value"], line["ok"]) for line in found] == [(0.9, True), (3.0, True), (0.8, False)]
    json.dumps(found)
