"""Score in the background while the next samples are drawn."""

import asyncio
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any, final

import torch

from iqareward.rewards._per_process import PerProcess
from iqareward.rewards._streams import mark, take_over
from iqareward.rewards._worker_thread import refuse_call_from_within, start_worker, waiting_workers, working
from iqareward.rewards.calls import Call
from iqareward.rewards.core import Wrapper
from iqareward.types import Images, Reward, Scores


@final
class Overlapped(Wrapper):
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
        super().__init__(reward)
        self.max_pending = max_pending
        self._background = PerProcess(partial(_Background, max_pending))

    def score_call(self, call: Call) -> Scores:
        return self._submit(call).result()

    def submit(
        self,
        images: Images,
        references: Images | None = None,
        *,
        inputs: Images | None = None,
        prompts: Sequence[str] | None = None,
    ) -> "PendingScores":
        """Begin to score.

        Args:
            images: as for any reward; do not write to them before the result is there.
            references: as for any reward; do not write to them either.
            inputs: as for any reward; do not write to them either.
            prompts: one per image.

        Raises:
            TypeError: something is not a floating-point tensor.
            ValueError: shapes are wrong, or references or prompts are missing or do not match.
            RuntimeError: it is called from within its own reward, whose thread would wait for itself for ever, or the
                interpreter exits.
        """
        return self._submit(self._call(images, references, inputs, prompts))

    def _submit(self, call: Call) -> "PendingScores":
        return self._background.get().submit(self.reward, call.check(self.name))


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
    """The thread of one process."""

    def __init__(self, max_pending: int) -> None:
        self._room = threading.BoundedSemaphore(max_pending)
        self._queue = _JobQueue()
        start_worker(self, self._queue, _serve, "iqareward-overlapped")

    def submit(self, reward: Reward, call: Call) -> PendingScores:
        refuse_call_from_within(self._queue, "Overlapped", reward.name)
        if self._queue.silent:
            raise RuntimeError(f"Overlapped of {reward.name} was called while the interpreter exits.")
        job = _Job(reward, call)
        self._room.acquire()
        job.future.add_done_callback(lambda _: self._room.release())  # cancelled ones too
        self._queue.jobs.put(job)
        return PendingScores(job.future)


@final
class _Job:
    """A call, and the future of its scores."""

    def __init__(self, reward: Reward, call: Call) -> None:
        self.reward, self.call, self.marked = reward, call, mark(call.device)
        self.callers = waiting_workers()
        self.future: Future[tuple[Scores, Any]] = Future()


@final
class _JobQueue:
    """What was submitted, first come, first served; None ends the thread."""

    def __init__(self) -> None:
        self.jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self.silent = False  # nobody is to be answered any more

    def abandon(self, *, silent: bool) -> None:
        """End the thread after what was submitted before; with `silent`, after the job under way."""
        self.silent = silent
        self.jobs.put(None)


def _serve(queue: _JobQueue) -> None:
    streams: dict[torch.device, torch.cuda.Stream] = {}
    while _serve_job(queue, streams):
        pass


def _serve_job(queue: _JobQueue, streams: dict[torch.device, torch.cuda.Stream]) -> bool:
    """Score one call; says whether to go on. A function of its own, so that an idle thread holds no images."""
    job = queue.jobs.get()
    if job is None or queue.silent:
        return False
    if not job.future.set_running_or_notify_cancel():
        return True
    try:
        with working(queue, job.callers):
            outcome = _score(job.reward, job.call, job.marked, streams)
    except BaseException as error:  # the thread must live on, and the caller hears of it
        if not queue.silent:
            job.future.set_exception(error)
    else:
        if not queue.silent:
            job.future.set_result(outcome)
    return not queue.silent


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
