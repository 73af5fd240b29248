"""A cached score is the score of exactly that content, computed once, whatever becomes of the file on the disk."""

import multiprocessing
import os
import random
import sqlite3
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import iqareward
from iqareward import Cached
from iqareward.rewards import ZERO_SHOT_LEVELS
from iqareward.rewards.calls import Call
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


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
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
    assert reward.hits + reward.misses == sum(len(call) for call in calls)
    if max_entries >= 10:
        assert sum(counting.sizes) == len({i for call in calls for i in call})


def test_the_least_recently_used_score_is_dropped() -> None:
    """With room for two scores, the third image takes the place of the one that was not asked for again."""
    counting = Brightness()
    reward, images = Cached(counting, max_entries=2), noise(3)
    for row in (0, 1, 0, 2, 0, 1):
        reward(images[row : row + 1])
    assert (len(counting.sizes), reward.hits) == (4, 2)  # 1 was scored twice


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
        reward(arguments[0], arguments[1], prompts=arguments[2])
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


def change(directory: Path, statement: str, *values: Any) -> None:
    """What somebody else does to the file of a cache."""
    (file,) = directory.iterdir()
    with sqlite3.connect(file) as table:
        table.execute(statement, values)
    table.close()


WRONG_VALUES = [b"", b"\xff" * 8, b"\0\0\xc0\x7f", "text", b"\xff".decode("latin"), 7, 0.5, float("inf"), 2**62]


@pytest.mark.parametrize("value", WRONG_VALUES)
def test_a_row_that_is_no_score_is_a_miss(value: Any, tmp_path: Path) -> None:
    """Values of other types and bytes without the right checksum are neither served nor an error, and are replaced."""
    images = noise(2)
    expected = Cached(Brightness(), directory=tmp_path)(images)
    change(tmp_path, "UPDATE scores SET value = ? WHERE place = 1", value)
    for sizes in ([1], []):
        again = Brightness()
        torch.testing.assert_close(Cached(again, directory=tmp_path)(images), expected, **EXACT)
        assert again.sizes == sizes


def test_a_score_belongs_to_its_key(tmp_path: Path) -> None:
    """A score that has come under the key of another image, such as by a flipped bit in a page, is a miss."""
    Cached(Brightness(), directory=tmp_path)(noise(2))
    change(tmp_path, "UPDATE scores SET value = (SELECT value FROM scores WHERE place = 2)")
    again = Brightness()
    Cached(again, directory=tmp_path)(noise(2))
    assert again.sizes == [1]


def test_nan_of_another_run_is_computed_again(tmp_path: Path) -> None:
    """NaN that a run with `cache_nan` left in the directory is served only to runs that ask for it."""
    images = flat(torch.nan)
    assert Cached(Brightness(), directory=tmp_path, cache_nan=True)(images).isnan().all()
    for cache_nan, sizes in ((True, []), (False, [1])):
        again = Brightness()
        assert Cached(again, directory=tmp_path, cache_nan=cache_nan)(images).isnan().all()
        assert again.sizes == sizes


def scores_beside(directory: Path) -> tuple[list[str], list[bool]]:
    """The warnings of a cache that is used, emptied and used again, and whether the file's entries are still served."""
    images, counting = noise(40), Brightness()
    reward = Cached(counting, directory=directory)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.testing.assert_close(reward(images), images.mean((1, 2, 3)))
            reward.close()
        new = noise(3, seed=1)
        torch.testing.assert_close(reward(new), new.mean((1, 2, 3)))
    return [str(warning.message) for warning in caught], [size == 40 for size in counting.sizes]


@pytest.mark.parametrize("damage", ["text", "empty", "short", "half", "first page", "directory", "folder is a file"])
def test_scores_do_not_depend_on_the_file(damage: str, tmp_path: Path) -> None:
    """Whatever is where the file should be: scores are right, one warning names the file, and nothing is deleted."""
    directory = tmp_path / "cache"
    Cached(Brightness(), directory=directory)(noise(40))
    (file,) = directory.iterdir()
    intact = file.read_bytes()
    content = {
        "text": b"no database at all, " * 1000,
        "empty": b"",
        "short": intact[:50],
        "half": intact[: len(intact) // 2],
        "first page": intact[:100] + b"\xff" * 3996 + intact[4096:],
    }.get(damage, intact)
    file.write_bytes(content)
    if damage == "directory":
        file.unlink()
        file.mkdir()
    if damage == "folder is a file":
        directory = file
    messages, _ = scores_beside(directory)
    if damage == "empty":  # what SQLite takes for a new file
        assert messages == []
        return
    assert len(messages) == 1
    assert "Cached cannot read" in messages[0]
    assert str(directory) in messages[0]
    assert damage == "directory" or file.read_bytes() == content


def test_flipped_bits_change_no_score(tmp_path: Path) -> None:
    """Bits that flip anywhere in the file, one or many, change no score and raise nothing."""
    Cached(Brightness(), directory=tmp_path)(noise(40))
    (file,) = tmp_path.iterdir()
    intact, rng = file.read_bytes(), random.Random(0)
    for flips in [1, 1, 1, 30] * 30:
        content = bytearray(intact)
        for _ in range(flips):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        messages, _ = scores_beside(tmp_path)
        assert len(messages) <= 2, messages


def test_a_full_disk_ends_writing_only(tmp_path: Path) -> None:
    """When a write fails half way, nothing of it is kept, a warning says so once, and what was stored is served."""
    images = noise(20)
    Cached(Brightness(), directory=tmp_path)(images)
    script = (
        "import resource, warnings, torch\n"
        "from tests.rewards.counting import Brightness\n"
        "from tests.rewards.test_cached import noise, Cached\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "counting = Brightness()\n"
        f"reward = Cached(counting, directory={str(tmp_path)!r})\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    for batch in (noise(2000, 1), noise(3, 2), noise(20)):\n"
        "        torch.testing.assert_close(reward(batch), batch.mean((1, 2, 3)))\n"
        "print(counting.sizes, [str(warning.message)[:19] for warning in caught])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("[2000, 3] ['Cached cannot write']\n", "", 0)
    later = Cached(Brightness(), directory=tmp_path)
    later(images), later(noise(2000, 1))
    assert (later.hits, later.misses) == (20, 2000)


@pytest.mark.slow
def test_a_locked_file_is_not_waited_for_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While another process keeps the file locked, the first call waits for it, and no later one."""
    Cached(Brightness(), directory=tmp_path)(noise(1))
    (file,) = tmp_path.iterdir()
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    connect = sqlite3.connect  # waits ten seconds
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **options: connect(*args, **options | {"timeout": 0.2}))
    messages, _ = scores_beside(tmp_path)
    other.close()
    assert len(messages) == 1
    assert "locked" in messages[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_may_only_be_read(tmp_path: Path) -> None:
    """A read-only directory serves what it has; new scores are computed, with one warning."""
    Cached(Brightness(), directory=tmp_path)(noise(40))
    (file,) = tmp_path.iterdir()
    file.chmod(0o400), tmp_path.chmod(0o500)
    try:
        messages, whole_calls = scores_beside(tmp_path)
    finally:
        tmp_path.chmod(0o700)
    assert len(messages) == 1
    assert "Cached cannot write" in messages[0]
    assert whole_calls == [False]


def test_the_disk_is_bounded(tmp_path: Path) -> None:
    """A directory stays within `max_bytes` whatever is put into it, and keeps what came last."""
    reward = Cached(Brightness(), directory=tmp_path, max_bytes=200_000)
    for seed in range(30):
        reward(noise(200, seed)[:, :, :2, :2].contiguous())
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 200_000
    later = Cached(Brightness(), directory=tmp_path)
    later(noise(200, 29)[:, :, :2, :2].contiguous())
    assert later.misses == 0


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


def one_of_many(directory: Path, seed: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    reward = Cached(Brightness(), directory=directory)
    for image in noise(40)[torch.randperm(40, generator=torch.Generator().manual_seed(seed))]:
        torch.testing.assert_close(reward(image[None]), image.mean()[None])


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_processes_write_at_the_same_time(tmp_path: Path) -> None:
    """Processes that begin with the same empty directory and store the same scores lose none and warn of nothing."""
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=one_of_many, args=(tmp_path, seed)) for seed in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(300)
    assert [child.exitcode for child in children] == [0] * 4
    reward = Cached(Brightness(), directory=tmp_path)
    reward(noise(40))
    assert reward.misses == 0


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


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda: iqareward.load("psnr_y"), lambda: iqareward.load("psnr")),
        (lambda: iqareward.load("lpips", weights="a.pth"), lambda: iqareward.load("lpips", weights="b.pth")),
        (lambda: iqareward.load("qalign", weights="me/one"), lambda: iqareward.load("qalign", weights="me/two")),
        (lambda: iqareward.load("qalign(dtype=float16)"), lambda: iqareward.load("qalign")),
        (lambda: iqareward.LevelReward("me/one"), lambda: iqareward.LevelReward("me/two")),
        (
            lambda: iqareward.LevelReward("me/one"),
            lambda: iqareward.LevelReward("me/one", replace(ZERO_SHOT_LEVELS, question="Is it sharp?")),
        ),
        (
            lambda: iqareward.Calibrated(iqareward.load("psnr"), iqareward.AffineMap(10.0, 50.0)),
            lambda: iqareward.Calibrated(iqareward.load("psnr"), iqareward.AffineMap(20.0, 50.0)),
        ),
        (
            lambda: iqareward.SoftMin([iqareward.load("ssim")], temperature=0.1),
            lambda: iqareward.SoftMin([iqareward.load("ssim")], temperature=0.2),
        ),
    ],
)
def test_a_directory_tells_rewards_apart(one: Callable[[], Any], other: Callable[[], Any], tmp_path: Path) -> None:
    """Scores of another checkpoint, question, map or option are never served, those of an equal object are."""
    images = noise(2)
    for make, misses in ((one, 2), (one, 0), (other, 2)):
        reward = Cached(make(), directory=tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Call, "score", lambda self, reward: torch.full((len(self),), 0.5))
            reward(images, references=images)
        assert reward.misses == misses


@pytest.mark.parametrize("inside", [False, True])
def test_weights_that_are_overwritten_are_other_weights(inside: bool, tmp_path: Path) -> None:
    """A file of one name and size, alone or in a folder, has no scores of what it held before."""
    weights = tmp_path / "weights"
    weights.mkdir()
    for content, time, misses in ((b"one", 1, 2), (b"one", 1, 0), (b"two", 2, 2)):
        file = weights / "net.pth"
        file.write_bytes(content)
        os.utime(file, (time, time))
        reward = Cached(iqareward.load("lpips", weights=weights if inside else file), directory=tmp_path / "scores")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Call, "score", lambda self, reward: torch.full((len(self),), 0.5))
            reward(noise(2), references=noise(2))
        assert reward.misses == misses


def test_networks_given_as_objects_are_told_apart_by_their_weights(tmp_path: Path) -> None:
    """Two networks of one class share no entry of a directory, and equal ones do."""
    for weight, misses in ((1.0, 2), (1.0, 0), (2.0, 2)):
        network = torch.nn.Linear(2, 1)
        torch.nn.init.constant_(network.weight, weight)
        torch.nn.init.zeros_(network.bias)
        reward = Cached(iqareward.load("lpips", model=network), directory=tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Call, "score", lambda self, reward: torch.full((len(self),), 0.5))
            reward(noise(2), references=noise(2))
        assert reward.misses == misses
