"""Score in the background while the next samples are drawn."""

import asyncio
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, final

import torch

from iqareward.rewards._per_process import PerProcess
from iqareward.rewards._streams import mark, take_over
from iqareward.rewards.calls import Call, checked_call
from iqareward.types import Images, Reward, Scores


@final
class Overlapped:
    """The same reward on a thread of its own, and on a GPU on a stream of its own, so that it works beside the sampler.

    `submit` returns at once; the scores are there when you ask for them. Calling it is `submit(...).result()`, so it is
    a reward like any other. Work that the caller has queued on its stream comes before the scoring, and the scores
    before what the caller does with them, through events, without a synchronisation.

    The graph of a differentiable reward is built on the background thread and belongs to the caller alone: `backward`
    works as usual.

    Args:
        reward: any reward; it is entered by one thread at a time.
        max_pending: calls that are not finished at most; `submit` waits for room, so that images do not pile up.

    Raises:
        ValueError: `max_pending` is below 1.

    Example:
        >>> import torch, iqareward
        >>> reward = iqareward.Overlapped(iqareward.load("ssim"))
        >>> images, clean = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> pending = reward.submit(images, references=clean)
        >>> # ... draw the next samples here ...
        >>> torch.equal(pending.result(), iqareward.load("ssim")(images, references=clean))
        True
    """

    def __init__(self, reward: Reward, *, max_pending: int = 4) -> None:
        if max_pending < 1:
            raise ValueError(f"Overlapped expected `max_pending` >= 1, got {max_pending}.")
        self.reward, self.max_pending = reward, max_pending
        self.name, self.bounds, self.differentiable = reward.name, reward.bounds, reward.differentiable
        self.needs_references, self.needs_prompts = reward.needs_references, reward.needs_prompts
        self._background = PerProcess(partial(_Background, max_pending))

    def __call__(
        self,
        images: Images,
        references: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """Score each image, and wait for it; `[B]` float32, higher is better, NaN = not scored."""
        return self.submit(images, references, prompts).result()

    def submit(
        self,
        images: Images,
        references: Images | None = None,
        prompts: Sequence[str] | None = None,
    ) -> "PendingScores":
        """Begin to score.

        Args:
            images: as for any reward; do not write to them before the result is there.
            references: likewise.
            prompts: one per image.

        Raises:
            TypeError: something is not a floating-point tensor.
            ValueError: shapes are wrong, or references or prompts are missing or do not match.
        """
        return self._background.get().submit(self.reward, checked_call(self.reward, images, references, prompts))


@final
class PendingScores:
    """Scores that are being computed: a future that also knows CUDA streams. Can be awaited."""

    def __init__(self, future: "Future[tuple[Scores, Any]]") -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> Scores:
        """The scores `[B]`, ready for the caller's current stream, or the reward's own exception.

        Args:
            timeout: seconds to wait at most; None = as long as it takes.

        Raises:
            TimeoutError: they are not there yet; asking again is fine.
        """
        return _handed_over(*self._future.result(timeout))

    def done(self) -> bool:
        """Whether `result` will not wait for the background thread."""
        return self._future.done()

    def cancel(self) -> bool:
        """Do not score if it has not begun; says whether that was in time."""
        return self._future.cancel()

    def __await__(self) -> Generator[Any, None, Scores]:
        return _handed_over(*(yield from asyncio.wrap_future(self._future).__await__()))


@final
class _Background:
    """The thread of one process, and a stream for each device."""

    def __init__(self, max_pending: int) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="iqareward-overlapped")
        self._room = threading.BoundedSemaphore(max_pending)
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def submit(self, reward: Reward, call: Call) -> PendingScores:
        marked = mark(call.device)
        self._room.acquire()
        future = self._thread.submit(_score, reward, call, marked, self._streams)
        future.add_done_callback(lambda _: self._room.release())  # cancelled ones too
        return PendingScores(future)


def _score(
    reward: Reward, call: Call, marked: Any, streams: dict[torch.device, torch.cuda.Stream]
) -> tuple[Scores, Any]:
    with torch.set_grad_enabled(reward.differentiable):
        if marked is None or call.device is None:
            return call.score(reward), None
        if call.device not in streams:
            streams[call.device] = torch.cuda.Stream(call.device)
        with torch.cuda.stream(streams[call.device]):
            take_over(marked, call.tensors())
            return call.score(reward), mark(call.device)


def _handed_over(scores: Scores, marked: Any) -> Scores:
    take_over(marked, [scores])
    return scores
