"""Concurrent calls become batches, and every caller gets exactly its own scores, or its own error."""

import asyncio
import gc
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import iqareward
from iqareward import MicroBatched
from tests.gpu import needs_cuda, on_devices
from tests.rewards.counting import Brightness, Held, Together, flat
from tests.tolerances import EXACT


def threads_named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"iqareward-{name}"]


async def behind(held: Held, reward: MicroBatched, *values: float) -> list[Any]:
    """The outcomes of calls that all wait while the worker is busy with an image of 0.5, and of that one first."""
    calls = [asyncio.create_task(reward.ascore(flat(0.5)))]
    await asyncio.to_thread(held.entered.wait, 60)
    calls += [asyncio.create_task(reward.ascore(flat(value))) for value in values]
    await asyncio.sleep(0)  # all are queued now
    held.let_go.set()
    return await asyncio.gather(*calls, return_exceptions=True)


@pytest.mark.parametrize("name", ["ssim", "piqe"])
def test_keeps_the_contract(name: str, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """`check_reward` finds nothing wrong, with and without references."""
    reward = MicroBatched(iqareward.load(name), max_wait_ms=1)
    iqareward.check_reward(reward, degraded_photographs, photographs)
    reward.close()


def test_eight_threads_become_batches() -> None:
    """Single images from threads in a loop are scored in batches, one at a time, each by the right number."""
    counting = Brightness(seconds=0.005)
    values = torch.rand(8, 20, generator=torch.Generator().manual_seed(0))

    def one_thread(row: Tensor) -> list[float]:
        return [reward(flat(value)).item() for value in row.tolist()]

    with MicroBatched(counting, max_wait_ms=100) as reward, ThreadPoolExecutor(8) as pool:
        scores = torch.tensor(list(pool.map(one_thread, values)))
    torch.testing.assert_close(scores, values)
    assert counting.most_inside == 1
    assert sum(counting.sizes) == 160
    assert len(counting.sizes) <= 30, counting.sizes  # 20 if all eight always come together


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    calls=st.lists(st.lists(st.integers(0, 99), max_size=12), min_size=1, max_size=12),
    max_batch=st.integers(1, 9),
    lists=st.booleans(),
    use_asyncio=st.booleans(),
)
def test_order_and_columns_survive(calls: list[list[int]], max_batch: int, lists: bool, use_asyncio: bool) -> None:
    """Calls of any size, as batches or lists of mixed sizes, keep their order, their references and their prompts."""
    counting = Together()

    def arguments(call: list[int]) -> dict[str, Any]:
        images = [flat(value / 100, side=1 + value % 3 if lists else 2)[0] for value in call]
        batch = images if lists or not images else torch.stack(images)
        return {
            "images": batch if images else torch.zeros(0, 3, 2, 2),
            "references": [1 - image for image in images] if lists else 1 - torch.as_tensor(batch) if images else [],
            "prompts": [str(value) for value in call],
        }

    async def all_at_once() -> list[Tensor]:
        return await asyncio.gather(*(reward.ascore(**arguments(call)) for call in calls))

    with MicroBatched(counting, max_batch) as reward, ThreadPoolExecutor(6) as pool:
        if use_asyncio:
            results = asyncio.run(all_at_once())
        else:
            results = list(pool.map(lambda call: reward(**arguments(call)), calls))
    for call, scores in zip(calls, results, strict=True):
        values = torch.tensor(call, dtype=torch.float32)
        torch.testing.assert_close(scores, values / 100 + 10 * (1 - values / 100) + 100 * values)
    assert all(size <= max_batch for size in counting.sizes)


def test_calls_of_different_sizes_are_merged() -> None:
    """Batches of another image size go into the same call of the reward."""
    held = Held()

    async def calls() -> list[Tensor]:
        first = asyncio.create_task(reward.ascore(flat(0.5)))
        await asyncio.to_thread(held.entered.wait, 60)
        later = [asyncio.create_task(reward.ascore(flat(0.1, 0.2, side=side))) for side in (4, 6, 5)]
        await asyncio.sleep(0)  # all are queued now
        held.let_go.set()
        return await asyncio.gather(first, *later)

    with MicroBatched(held) as reward:
        outcomes = asyncio.run(calls())
    torch.testing.assert_close(torch.cat(outcomes), torch.tensor([0.5, *[0.1, 0.2] * 3]))
    assert held.sizes == [1, 6]


def test_a_poisoned_image_fails_alone() -> None:
    """When a batch fails, only the caller whose image broke it gets the error."""
    held = Held()
    with MicroBatched(held) as reward:
        first, *outcomes = asyncio.run(behind(held, reward, 0.1, 0.2, Brightness.poison, 0.4))
        assert first.item() == 0.5
        assert isinstance(outcomes.pop(2), ArithmeticError)
        torch.testing.assert_close(torch.cat(outcomes), torch.tensor([0.1, 0.2, 0.4]))
        assert held.sizes == [1, 4, 1, 1, 1, 1]  # merged once, then one by one
        assert reward(flat(0.3)).shape == (1,)  # and the worker lives


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"images": torch.zeros(1, 4, 8, 8)}, ValueError),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, TypeError),
        ({"images": [torch.zeros(3, 8, 8), "no image"]}, TypeError),
        ({"references": torch.zeros(1, 3, 8, 9)}, ValueError),
        ({"references": None}, ValueError),
        ({"prompts": None}, ValueError),
        ({"prompts": ["a", "b"]}, ValueError),
    ],
)
def test_bad_arguments_fail_at_the_door(arguments: dict[str, Any], error: type[Exception]) -> None:
    """What the reward would refuse is refused in the caller's thread, and never meets other calls."""
    reward = MicroBatched(Together())
    good = {"images": torch.zeros(1, 3, 8, 8), "references": torch.zeros(1, 3, 8, 8), "prompts": ["1"]}
    with pytest.raises(error, match="together"):
        reward(**good | arguments)
    with pytest.raises(error, match="together"):
        asyncio.run(reward.ascore(**good | arguments))
    assert not threads_named("together")  # nothing was started for it


def test_a_reward_that_miscounts_is_an_error_of_every_call() -> None:
    """Scores that are not a tensor with one per image are never dealt out."""

    class Miscounts(Brightness):
        name = "miscounts"

        def __call__(self, images: Any, *arguments: Any, **keywords: Any) -> Tensor:
            return torch.zeros(len(images) + 1)

    class Lists(Brightness):
        def __call__(self, images: Any, *arguments: Any, **keywords: Any) -> Any:
            return [0.0] * len(images)

    for wrong, answer in ((Miscounts(), r"scores \[2\]"), (Lists(), "a list")):
        with MicroBatched(wrong) as reward, pytest.raises(ValueError, match=f"given 1 images, and answered {answer}"):
            reward(flat(0.5))


@pytest.mark.parametrize("images_of_a_batch", [1, 3])
def test_batches_are_bounded_in_bytes(images_of_a_batch: int) -> None:
    """Neither one large call nor many small ones make a batch of more than `max_bytes`, unless one image is larger."""
    held = Held()
    image = flat(0.5).nbytes
    with MicroBatched(held, max_bytes=images_of_a_batch * image + image // 2) as reward:
        first, *outcomes = asyncio.run(behind(held, reward, *[0.25] * 7))
        torch.testing.assert_close(torch.cat([first, *outcomes]), torch.tensor([0.5, *[0.25] * 7]), **EXACT)
        torch.testing.assert_close(reward(flat(*[0.25] * 7)), torch.full((7,), 0.25), **EXACT)
        assert reward(flat(0.25, side=64)).tolist() == [0.25]
    assert max(held.sizes) == images_of_a_batch
    assert sum(held.sizes) == 16


def test_a_lone_caller_does_not_wait() -> None:
    """Calls of a single thread are not held back by `max_wait_ms`."""
    with MicroBatched(Brightness(), max_wait_ms=100_000) as reward:
        start = time.monotonic()
        for _ in range(5):
            reward(flat(0.5))
        assert time.monotonic() - start < 50


def test_callers_that_left_are_missed_only_once() -> None:
    """After a batch of several callers, one that comes back alone waits `max_wait_ms`, and then never again."""
    held = Held()
    with MicroBatched(held, max_wait_ms=1000) as reward:
        asyncio.run(behind(held, reward, 0.5, 0.5, 0.5))
        times = [time.monotonic()]
        for _ in range(3):
            reward(flat(0.5))
            times.append(time.monotonic())
    waits = [end - start for start, end in pairwise(times)]
    assert waits[0] >= 0.9
    assert min(waits[1:]) < 0.9


class TenMinutes(Held):
    """A batch of two takes ten minutes of a clock that only this reward moves forward."""

    ahead = 0.0

    def __call__(self, images: Any, *arguments: Any, **keywords: Any) -> Tensor:
        scores = super().__call__(images)
        self.ahead += 600 * (len(images) == 2)
        return scores

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def test_slow_batches_are_worth_a_longer_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a batch of two that took ten minutes, the worker waits longer than `max_wait_ms` for a second caller."""
    slow = TenMinutes()
    monkeypatch.setattr("iqareward.rewards.batching.time", slow)

    async def two_calls() -> None:
        first = asyncio.create_task(reward.ascore(flat(0.1)))
        await asyncio.sleep(0.2)
        await asyncio.gather(first, reward.ascore(flat(0.2)))

    with MicroBatched(slow, max_wait_ms=0) as reward:
        asyncio.run(behind(slow, reward, 0.1, 0.2))
        asyncio.run(two_calls())
    assert slow.sizes == [1, 2, 2]


class Launches(Brightness):
    """Answers at once, while the GPU is at work for a while longer."""

    def __call__(self, images: Any, *arguments: Any, **keywords: Any) -> Tensor:
        scores = super().__call__(images)
        if scores.is_cuda:
            torch.cuda._sleep(400_000_000)  # about a fifth of a second
        return scores


class Event:
    """Of a GPU that works a fifth of a second."""

    def synchronize(self) -> None:
        time.sleep(0.2)


@on_devices
def test_a_batch_takes_until_the_device_is_done(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that a GPU has only been told of is not finished, so that the next one gathers callers meanwhile."""
    if device == "cpu":
        monkeypatch.setattr("iqareward.rewards.batching.mark", lambda _: Event())
        monkeypatch.setattr("iqareward.rewards.batching.take_over", lambda *_: None)
    with MicroBatched(Launches()) as reward:
        start = time.monotonic()
        assert reward(flat(0.5).to(device)).tolist() == [0.5]
    assert time.monotonic() - start >= 0.1


def test_cancelled_coroutines_are_not_scored() -> None:
    """A coroutine that is cancelled while it waits costs the reward nothing and holds nobody up."""
    held = Held()

    async def scenario() -> list[Any]:
        tasks = [asyncio.create_task(reward.ascore(flat(value))) for value in (0.1, 0.2, 0.3, 0.4)]
        await asyncio.to_thread(held.entered.wait, 60)
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.sleep(0)
        held.let_go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with MicroBatched(held, max_batch=1) as reward:
        results = asyncio.run(scenario())
    assert isinstance(results[2], asyncio.CancelledError)
    assert sum(held.sizes) == 3
    for value, result in zip((0.1, 0.2, 0.4), [results[0], results[1], results[3]], strict=True):
        torch.testing.assert_close(result, torch.tensor([value]))


def test_close_answers_what_was_accepted_and_refuses_the_rest() -> None:
    """Closing scores the queue, ends the thread, and makes later calls fail clearly; twice is as good as once."""
    held = Held()
    held.name = "closing"  # no thread of another test has this name
    reward = MicroBatched(held)

    async def scenario() -> list[Tensor]:
        calls = [asyncio.create_task(reward.ascore(flat(value))) for value in (0.5, 0.25)]
        await asyncio.to_thread(held.entered.wait, 60)
        closing = asyncio.create_task(asyncio.to_thread(reward.close))
        await asyncio.sleep(0.1)
        held.let_go.set()
        await closing
        return await asyncio.gather(*calls)

    assert [scores.item() for scores in asyncio.run(scenario())] == [0.5, 0.25]
    reward.close()
    assert not threads_named("closing")
    with pytest.raises(RuntimeError, match="closed"):
        reward(flat(0.5))


def test_closing_again_leaves_the_worker_of_later_copies() -> None:
    """A second `close` ends nothing that was begun since: copies made later still share their worker."""
    reward = MicroBatched(Brightness())
    reward(flat(0.5))
    reward.close()
    later = pickle.loads(pickle.dumps(reward))
    later(flat(0.5))
    reward.close()
    latest = pickle.loads(pickle.dumps(reward))
    latest(flat(0.5))
    assert latest.reward is later.reward
    later.close()


def test_copies_share_the_worker_and_its_weights() -> None:
    """Pickled copies in one process find the running worker; the last user takes it with it."""
    counting = Brightness()
    counting.name = "copied"  # no thread of another test has this name
    reward = MicroBatched(counting)
    del counting
    reward(flat(0.5))
    copies = [pickle.loads(pickle.dumps(reward)) for _ in range(3)]
    assert all(torch.equal(copy(flat(0.25)), torch.tensor([0.25])) for copy in copies)
    assert all(copy.reward is reward.reward for copy in copies)
    (thread,) = threads_named("copied")
    weights = weakref.ref(reward.reward)
    del reward, copies
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
    assert weights() is None


def test_a_key_of_ones_own_is_shared_if_it_means_the_same() -> None:
    """Two objects with one key have one worker; different settings under one key are an error."""
    first, second = (MicroBatched(Brightness(), key="shared") for _ in range(2))
    first(flat(0.5)), second(flat(0.5))
    assert second.reward is first.reward
    with pytest.raises(ValueError, match="in use"):
        MicroBatched(Brightness(), max_batch=4, key="shared")(flat(0.5))
    first.close()
    MicroBatched(Brightness(), max_batch=4, key="shared")(flat(0.5))  # free again


def in_child(reward: MicroBatched, results: Any) -> None:
    torch.set_num_threads(1)
    results.put((os.getpid(), reward(flat(0.125, 0.25)).tolist()))
    reward.close()


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # the point of the test
def test_works_in_worker_processes(method: str) -> None:
    """A child process starts its own worker, after a fork too, while the parent's is in the middle of a batch."""
    context = multiprocessing.get_context(method)
    reward = MicroBatched(Brightness(seconds=0.2 if method == "fork" else 0.0))
    reward(flat(0.5))
    results = context.Queue()
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(reward, flat(0.5))
        child = context.Process(target=in_child, args=(reward, results))
        child.start()
        process, scores = results.get(timeout=300)
        child.join(60)
        assert busy.result().tolist() == [0.5]
    assert child.exitcode == 0
    assert process == child.pid
    assert scores == [0.125, 0.25]
    assert reward(flat(0.5)).tolist() == [0.5]
    reward.close()


@pytest.mark.parametrize("busy", [False, True])
def test_the_interpreter_exits(busy: bool) -> None:
    """A process that forgets to close ends by itself; a call of a daemon thread that is under way is not answered."""
    script = (
        "import os, threading, time, iqareward\n"
        "from tests.rewards.counting import Brightness, flat\n"
        "entered = threading.Event()\n"
        "class UntilExit(Brightness):\n"
        "    def __call__(self, images, **ignored):\n"
        "        entered.set()\n"
        "        while threading.main_thread().is_alive(): time.sleep(0.01)\n"
        "        time.sleep(0.5)\n"  # to the end of the interpreter
        "        return super().__call__(images)\n"
        "def call():\n"
        "    reward(flat(0.5))\n"
        "    os.write(1, b'answered')\n"
        f"reward = iqareward.MicroBatched({'UntilExit' if busy else 'Brightness'}())\n"
        "caller = threading.Thread(target=call, daemon=True)\n"
        "caller.start()\n"
        f"{'entered.wait()' if busy else 'caller.join()'}\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr, done.stdout) == (0, "", "" if busy else "answered")


def test_gradients_are_refused_and_none_leak() -> None:
    """A differentiable reward is refused at once; images that carry a graph are scored without one."""
    with pytest.raises(ValueError, match="gradients"):
        MicroBatched(iqareward.load("ssim", differentiable=True))
    with MicroBatched(Brightness()) as reward:
        scores = reward(flat(0.5).requires_grad_())
        assert not scores.requires_grad
        scores += 1  # nobody else's memory


@pytest.mark.parametrize(
    "settings", [{"max_batch": 0}, {"max_wait_ms": -1}, {"max_wait_ms": float("nan")}, {"max_bytes": 0}]
)
def test_bounds_must_make_sense(settings: dict[str, Any]) -> None:
    """A bound that cannot work is a ValueError."""
    with pytest.raises(ValueError, match="max_batch"):
        MicroBatched(Brightness(), **settings)


@pytest.mark.gpu
@needs_cuda
def test_streams_are_respected() -> None:
    """Images written and scores read on a stream of the caller's own are right without any synchronisation."""
    device, stream = torch.device("cuda"), torch.cuda.Stream()
    images = torch.rand(64, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    expected = iqareward.load("ssim")(images, references=images.flip(-1))
    with MicroBatched(iqareward.load("ssim")) as reward, torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late = images.to(device, non_blocking=True)
        scores = reward(late, references=late.flip(-1)) + 0
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-4, atol=1e-5)
