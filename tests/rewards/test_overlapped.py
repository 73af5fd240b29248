"""Scoring in the background is the same scoring, later: same scores, same errors, same gradients."""

import asyncio
import gc
import pickle
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import Tensor

import iqareward
from iqareward import Overlapped
from tests.gpu import needs_cuda
from tests.rewards.counting import Brightness, Held, Together, flat
from tests.tolerances import EXACT


@pytest.mark.parametrize("differentiable", [False, True])
def test_keeps_the_contract(differentiable: bool, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """`check_reward` finds nothing wrong, with and without gradients."""
    reward = Overlapped(iqareward.load("ssim", differentiable=differentiable))
    iqareward.check_reward(reward, degraded_photographs, photographs)


def test_it_overlaps() -> None:
    """`submit` returns while the reward is at work, and results come in any order."""
    held = Held()
    reward = Overlapped(held)
    first, second = reward.submit(flat(0.25)), reward.submit(flat(0.5))
    assert held.entered.wait(60)
    assert not first.done()
    with pytest.raises(TimeoutError):
        first.result(timeout=0.01)
    held.let_go.set()
    assert second.result().tolist() == [0.5]
    assert first.done()
    assert first.result().tolist() == first.result().tolist() == [0.25]
    assert held.most_inside == 1


def test_references_and_prompts_travel() -> None:
    """All columns reach the reward; what it would refuse is refused by `submit`, in the caller's thread."""
    reward = Overlapped(Together())
    images = flat(0.25, 0.5)
    pending = reward.submit(images, references=1 - images, prompts=["1", "2"])
    torch.testing.assert_close(pending.result(), torch.tensor([107.75, 205.5]))
    with pytest.raises(ValueError, match="references"):
        reward.submit(images, prompts=["1", "2"])
    with pytest.raises(TypeError, match="floating-point"):
        reward.submit(images.byte(), images, prompts=["1", "2"])


def test_exceptions_are_delivered() -> None:
    """The reward's exception comes out of `result`, and the next call is scored."""
    reward = Overlapped(Brightness())
    pending = reward.submit(flat(Brightness.poison))
    with pytest.raises(ArithmeticError, match="poisoned"):
        pending.result()
    assert reward(flat(0.5)).tolist() == [0.5]


def test_pending_calls_are_bounded() -> None:
    """`submit` waits for room; a cancelled call gives its place back without being scored."""
    held = Held()
    reward = Overlapped(held, max_pending=2)
    first, second = reward.submit(flat(0.25)), reward.submit(flat(0.5))
    third = []
    blocked = threading.Thread(target=lambda: third.append(reward.submit(flat(0.125))))
    blocked.start()
    assert held.entered.wait(60)
    time.sleep(0.05)  # enough to see an error of ours most of the time; the right behaviour passes at any speed
    assert not third
    assert second.cancel()
    blocked.join(60)
    assert len(third) == 1
    held.let_go.set()
    assert (first.result().tolist(), third[0].result().tolist()) == ([0.25], [0.125])
    assert held.sizes == [1, 1]
    with pytest.raises(ValueError, match="max_pending"):
        Overlapped(held, max_pending=0)


def test_pending_scores_can_be_awaited() -> None:
    """Coroutines wait without blocking their loop, and hear of errors."""
    held = Held()
    reward = Overlapped(held)

    async def scenario() -> Tensor:
        task = asyncio.ensure_future(_result(reward.submit(flat(0.5))))
        for _ in range(5):
            await asyncio.sleep(0.001)
        assert not task.done()
        held.let_go.set()
        scores = await task
        with pytest.raises(ArithmeticError):
            await reward.submit(flat(Brightness.poison))
        return scores

    assert asyncio.run(scenario()).tolist() == [0.5]


async def _result(pending: iqareward.rewards.batching.PendingScores) -> Tensor:
    return await pending


def test_gradients_cross_threads(photographs: Tensor) -> None:
    """The gradient of a differentiable reward is that of a direct call, also from two calls under way."""
    local = iqareward.load("ssim", differentiable=True)
    reward = Overlapped(local)
    images = [photographs[i : i + 2, :, :64, :64].clone().requires_grad_() for i in range(2)]
    with torch.no_grad():
        pending = [reward.submit(batch, references=batch.detach().flip(-1)) for batch in images]
    for batch, scores in zip(images, pending, strict=True):
        (gradient,) = torch.autograd.grad(scores.result().sum(), batch)
        (expected,) = torch.autograd.grad(local(batch, references=batch.detach().flip(-1)).sum(), batch)
        torch.testing.assert_close(gradient, expected, **EXACT)


def test_no_graph_without_gradients() -> None:
    """A reward that says it has no gradients gives none, even if it would build a graph."""
    assert not Overlapped(Brightness())(flat(0.5).requires_grad_()).requires_grad


def test_a_call_at_exit_is_refused_even_without_room() -> None:
    """A call by an exit handler fails; it does not wait for room that a call under way will never give back."""
    script = (
        "import atexit\n"
        "def late():\n"
        "    try: reward.submit(flat(0.5))\n"
        "    except RuntimeError as error: print(error)\n"
        "atexit.register(late)\n"  # before the imports, so that it runs after the handlers that these register
        "from iqareward import Overlapped\n"
        "from tests.rewards.counting import Brightness, flat\n"
        "reward = Overlapped(Brightness(seconds=0.5), max_pending=1)\n"
        "pending = reward.submit(flat(0.5))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    refused = "Overlapped of brightness was called while the interpreter exits.\n"
    assert (done.returncode, done.stderr, done.stdout) == (0, "", refused)


def test_copies_and_collection() -> None:
    """A pickled copy has a thread of its own, and without users the thread ends."""
    reward, before = Overlapped(Brightness()), threading.enumerate()
    copy = pickle.loads(pickle.dumps(reward))
    assert reward(flat(0.5)).tolist() == copy(flat(0.5)).tolist() == [0.5]
    threads = [thread for thread in threading.enumerate() if thread not in before]
    assert len(threads) == 2
    del reward, copy
    gc.collect()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.gpu
@needs_cuda
def test_streams_are_respected() -> None:
    """Scoring waits for the pixels, the caller's next kernel for the scores, and neither for the host."""
    images = torch.rand(16, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    local = iqareward.load("ssim")
    expected = local(images, references=images.flip(-1))
    reward = Overlapped(local)
    on_gpu = images.to("cuda")
    reward(on_gpu, references=on_gpu.flip(-1))  # warm
    torch.cuda.synchronize()
    start = time.perf_counter()
    torch.cuda._sleep(1_000_000_000)  # the sampler: about half a second of work
    late = on_gpu * 1
    pending = reward.submit(late, references=late.flip(-1))
    del late
    overwritten = torch.zeros_like(on_gpu)  # would take the memory of `late` if nobody held it
    submitted = time.perf_counter() - start
    scores = pending.result() + 0
    torch.testing.assert_close(scores.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert submitted < 0.2
    assert not overwritten.any()
