"""Pieces that stay in a CPU's cache, on as many threads as find a core."""

import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from iqareward import functional as F
from iqareward.functional._chunks import CPU_PIXELS_PER_CHUNK, map_chunks, rows_at_once
from iqareward.rewards.core import sanitize
from tests.functional.pairs import METRIC, METRICS, textured
from tests.tolerances import FORMULA_FP32

CPU, OTHER = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(("side", "rows"), [(64, 64), (512, 1), (2048, 1), (0, CPU_PIXELS_PER_CHUNK)])
def test_rows_in_cache(side, rows):
    """On a CPU as many images as have so many pixels, at least one."""
    assert rows_at_once((side, side), CPU) == rows


@pytest.mark.parametrize(
    ("side", "per_pixel", "rows"), [(512, 128, 128), (1024, 1024, 4), (16, 1024, 83), (9000, 64, 1)]
)
def test_rows_on_a_device(side, per_pixel, rows):
    """Elsewhere as many as 4 GiB of working memory allow, small ones as if networks enlarged them, at least one."""
    assert rows_at_once((side, side), OTHER, bytes_per_pixel=per_pixel) == rows


def test_one_thread_takes_smaller_pieces():
    """One thread has less cache than several."""
    assert rows_at_once((64, 64), CPU, threads=1) == 32


def first_pixels(batch):
    return batch.flatten(1)[:, 0]


def test_map_chunks_calls_with_pieces(threads):
    """Every row once, in order, in pieces that are not larger than they should be."""
    sizes = []

    def formula(rows):
        sizes.append(len(rows))
        return first_pixels(rows)

    batch = torch.arange(10.0)[:, None, None].expand(10, 256, 512)
    for count, expected in ((1, [1] * 10), (2, [2] * 5)):
        threads(count)
        sizes.clear()
        with ThreadPoolExecutor(1) as fresh:  # this one may have learnt from earlier tests that cores are taken
            assert torch.equal(fresh.submit(map_chunks, formula, batch).result(), torch.arange(10.0))
        assert sizes == expected
    assert map_chunks(first_pixels, batch[:0]).shape == (0,)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def cores(monkeypatch):
    """Sets the share of the time that threads get to run; whoever asks for the time waits an hour for it."""
    share, now, seen, ran = [1.0], 0.0, 0.0, 0.0

    def perf_counter():
        nonlocal now
        now += 3600
        return now

    def thread_time():
        nonlocal seen, ran
        ran, seen = ran + (now - seen) * share[0], now
        return ran

    monkeypatch.setattr(time, "perf_counter", perf_counter)
    monkeypatch.setattr(time, "thread_time", thread_time)
    return lambda value: share.__setitem__(0, value)


@pytest.mark.skipif(sys.platform != "linux", reason="needs torch with OpenMP")
def test_threads_without_a_core_are_not_used(threads, cores):
    """A thread that hardly runs halves its threads down to one, and doubles them again when it runs all the time.

    Neither the caller's own number nor that of another thread changes.
    """
    batch = torch.arange(3.0)[:, None, None].expand(3, 512, 512)
    used = []

    def formula(rows):
        used.append(torch.get_num_threads())
        return first_pixels(rows)

    def score(share):
        cores(share)
        assert torch.equal(map_chunks(formula, batch), torch.arange(3.0))
        assert torch.get_num_threads() == 4
        return [used.pop(0) for _ in range(3)]

    threads(4)
    with ThreadPoolExecutor(1) as mine, ThreadPoolExecutor(1) as other:
        assert mine.submit(score, 0.5).result() == [4, 2, 1]
        assert mine.submit(score, 0.9).result() == [1, 1, 1]
        assert other.submit(torch.get_num_threads).result() == 4
        assert mine.submit(score, 1.0).result() == [1, 2, 4]
        assert mine.submit(score, 1.0).result() == [4, 4, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="needs torch with OpenMP")
def test_pieces_within_pieces_take_the_same_threads(threads, cores):
    """What a formula cuts into pieces of its own neither takes half as many threads again nor is observed twice."""
    batch = torch.arange(3.0)[:, None, None].expand(3, 512, 512)
    used = []

    def inner(rows):
        used.append(torch.get_num_threads())
        return first_pixels(rows)

    threads(8)
    cores(0.5)
    with ThreadPoolExecutor(1) as mine:
        mine.submit(map_chunks, lambda rows: map_chunks(inner, rows), batch).result()
    assert used == [8, 4, 2]


@pytest.mark.skipif(sys.platform != "linux", reason="needs torch with OpenMP")
def test_threads_come_back_after_an_error(threads, cores):
    """A formula that fails on fewer threads leaves the caller with its own number."""
    threads(2)
    cores(0.1)
    batch = torch.zeros(2, 512, 512)

    def fail(rows):
        raise ValueError(torch.get_num_threads())

    def score():
        for expected in (2, 1):
            with pytest.raises(ValueError, match=str(expected)):
                map_chunks(fail, batch)
        return torch.get_num_threads()

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(score).result() == 2


@pytest.mark.parametrize("metric", [F.psnr, F.ssim, F.ms_ssim, F.gmsd, F.haarpsi, F.piqe, F.niqe, F.brisque])
def test_digits_do_not_depend_on_threads(threads, cores, metric):
    """One thread and several give the same bits, so that the number may change at any time."""
    images, references = torch.rand(2, 2, 3, 200, 224, generator=torch.Generator().manual_seed(0))
    arguments = (images,) if metric in (F.piqe, F.niqe, F.brisque) else (images, references)
    scores = []
    for count in (1, 2, 3):
        threads(count)
        scores += [metric(*arguments), torch.cat([metric(*row) for row in zip(*(a.split(1) for a in arguments))])]
    for score in scores[1:]:
        torch.testing.assert_close(score, scores[0], rtol=0, atol=0)


@METRIC
def test_one_graph_for_the_compiler(name):
    """`torch.compile` takes a metric whole, larger batches than fit in the cache too, and leaves its scores."""
    images, references = (pictures.float() for pictures in textured(0, 8, 168, 192))
    torch._dynamo.reset()
    compiled = torch.compile(METRICS[name][0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images, references), METRICS[name][0](images, references), **FORMULA_FP32)


def test_checks_are_one_graph_for_the_compiler():
    """`torch.compile` takes the checks of the reward contract whole as well."""
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images[1, 0, 0, 0] = torch.nan
    torch._dynamo.reset()
    cleaned, valid = torch.compile(sanitize, backend="eager", fullgraph=True)(images)
    torch.testing.assert_close(cleaned, sanitize(images)[0], **FORMULA_FP32)
    assert valid.tolist() == [True, False]
