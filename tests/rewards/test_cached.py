"""A cached score is the score of exactly that content, computed once, and nothing on the disk can run code."""

import multiprocessing
import pickle
import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import iqareward
from iqareward import Cached
from tests.rewards.counting import Brightness, Together, flat
from tests.tolerances import EXACT


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("name", ["ssim", "piqe"])
def test_keeps_the_contract(
    name: str, directory: bool, photographs: Tensor, degraded_photographs: Tensor, tmp_path: Path
) -> None:
    """`check_reward` finds nothing wrong, with and without a disk."""
    reward = Cached(iqareward.load(name), directory=tmp_path if directory else None)
    iqareward.check_reward(reward, degraded_photographs, photographs)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    calls=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=8), min_size=1, max_size=8),
    max_entries=st.integers(1, 12),
    lists=st.booleans(),
)
def test_any_sequence_of_calls_gives_the_true_scores(calls: list[list[int]], max_entries: int, lists: bool) -> None:
    """However calls repeat and overlap and however small the memory is, scores are those of the reward."""
    counting = Brightness()
    reward, pool = Cached(counting, max_entries=max_entries), noise(10)
    for call in calls:
        images = [pool[i] for i in call] if lists else pool[call]
        torch.testing.assert_close(reward(images), pool[call].mean((1, 2, 3)))
        assert len(reward._store.get()._memory) <= max_entries
    assert reward.hits + reward.misses == sum(len(call) for call in calls)
    if max_entries >= 10:
        assert sum(counting.sizes) == len({i for call in calls for i in call})


def test_the_first_score_is_kept_bit_for_bit() -> None:
    """Equal images in one call are scored once, and later calls, in any float dtype of the same values, not at all."""
    counting = Brightness()
    reward, images = Cached(counting), noise(3).half().float()
    first = reward(images[[0, 1, 0, 2, 1]])
    assert counting.sizes == [3]
    for again in (images, images.half(), images.contiguous(memory_format=torch.channels_last), list(images)):
        torch.testing.assert_close(reward(again), first[[0, 1, 3]], **EXACT)
    assert counting.sizes == [3]
    assert (reward.hits, reward.misses) == (12, 5)


def test_whatever_the_score_depends_on_is_in_the_key() -> None:
    """One pixel, the shape, the reference, the prompt: a change of any of them is another score."""
    counting = Together()
    reward = Cached(counting)
    image, reference = noise(1), noise(1, seed=1)
    reward(image, references=reference, prompts=["1"])
    changed = image.clone()
    changed[0, 0, 0, 0] += 2**-20
    for arguments in (
        (changed, reference, ["1"]),
        (image, changed, ["1"]),
        (image, reference, ["2"]),
        (image.view(1, 3, 4, 16), reference.view(1, 3, 4, 16), ["1"]),
    ):
        reward(*arguments)
    assert counting.sizes == [1] * 5
    reward(image, references=reference, prompts=["1"])
    assert counting.sizes == [1] * 5


def test_nan_is_computed_again_unless_asked() -> None:
    """An image that could not be scored is tried again; with `cache_nan` it is not."""
    images = noise(2)
    images[0, 0, 0, 0] = torch.nan
    for cache_nan, calls in ((False, [2, 1]), (True, [2])):
        counting = Brightness()
        reward = Cached(counting, cache_nan=cache_nan)
        for _ in range(2):
            assert reward(images).isnan().tolist() == [True, False]
        assert counting.sizes == calls


def test_the_disk_serves_other_objects(tmp_path: Path) -> None:
    """A new object (another run) finds the scores bit for bit; another version, name or NaN does not."""
    images = noise(5)
    images[4, 0, 0, 0] = torch.nan
    first = Cached(Brightness(), directory=tmp_path)(images)
    again = Brightness()
    torch.testing.assert_close(Cached(again, directory=tmp_path)(images), first, equal_nan=True, **EXACT)
    assert again.sizes == [1]
    other = Brightness()
    Cached(other, directory=tmp_path, version="2")(images)
    assert other.sizes == [5]
    renamed = Brightness()
    renamed.name = "other"  # pyright: ignore
    Cached(renamed, directory=tmp_path)(images)
    assert renamed.sizes == [5]


class Exploit:
    """What an attacker would leave in a cache directory."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import sys; sys.exploited = True",)


@pytest.mark.parametrize("mode", [1, 2, 3, 4])
def test_a_poisoned_disk_is_a_miss(mode: int, tmp_path: Path) -> None:
    """Pickles, files outside and values of other types are neither run, read nor deleted; the score is computed."""
    images, victim = noise(1), tmp_path / "victim"
    victim.write_bytes(b"1234")
    directory = tmp_path / "cache"
    reward = Cached(Brightness(), directory=directory)
    expected = reward(images)
    reward.close()
    payload = pickle.dumps(Exploit())
    with sqlite3.connect(directory / "cache.db") as table:
        values = (mode, payload if mode in (1, 4) else None, None if mode in (1, 4) else str(victim))
        table.execute("UPDATE Cache SET mode = ?, value = ?, filename = ?", values)
    table.close()
    again = Brightness()
    torch.testing.assert_close(Cached(again, directory=directory)(images), expected, **EXACT)
    assert again.sizes == [1]
    assert not hasattr(sys, "exploited")
    assert victim.read_bytes() == b"1234"
    torch.testing.assert_close(Cached(again, directory=directory)(images), expected, **EXACT)
    assert again.sizes == [1]  # the bad entry was replaced


def test_the_disk_is_bounded(tmp_path: Path) -> None:
    """A directory stays near `max_bytes` whatever is put into it."""
    reward = Cached(Brightness(), directory=tmp_path, max_bytes=200_000)
    for seed in range(30):
        reward(noise(200, seed)[:, :, :2, :2].contiguous())
    disk = reward._store.get()._disk
    assert disk is not None
    assert disk._cache.volume() < 400_000
    assert 0 < len(disk._cache) < 6000


def test_threads_share_a_cache(tmp_path: Path) -> None:
    """Many threads over one object and one directory lose nothing and mix nothing up."""
    pool = noise(20)
    reward = Cached(Brightness(), max_entries=10, directory=tmp_path)

    def one_thread(seed: int) -> None:
        rows = torch.randint(20, (30, 4), generator=torch.Generator().manual_seed(seed))
        for row in rows:
            torch.testing.assert_close(reward(pool[row]), pool[row].mean((1, 2, 3)))
        reward.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(one_thread, range(4)))


def in_child(reward: Cached, images: Tensor, results: Any) -> None:
    torch.set_num_threads(1)
    results.put((reward(images).tolist(), reward.misses))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_share_a_directory(method: str, tmp_path: Path) -> None:
    """A worker process opens the directory itself and finds what the parent stored."""
    images = noise(3)
    reward = Cached(Brightness(), directory=tmp_path)
    expected = reward(images)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    child = context.Process(target=in_child, args=(reward, images, results))
    child.start()
    assert results.get(timeout=300) == (expected.tolist(), 0)
    child.join(60)
    assert child.exitcode == 0


def test_closing_forgets(tmp_path: Path) -> None:
    """After `close`, memory is empty, and the object still works."""
    counting = Brightness()
    reward = Cached(counting)
    for _ in range(2):
        reward(noise(2))
        reward.close()
    assert counting.sizes == [2, 2]


def test_what_cannot_be_cached_is_refused() -> None:
    """A score with a graph, and bounds that keep nothing, are a ValueError."""
    with pytest.raises(ValueError, match="gradients"):
        Cached(iqareward.load("ssim", differentiable=True))
    for bounds in ({"max_entries": 0}, {"max_bytes": 0}):
        with pytest.raises(ValueError, match="max_entries"):
            Cached(Brightness(), **bounds)
    with pytest.raises(ValueError, match="references"):
        Cached(Together())(flat(0.5), prompts=["1"])
