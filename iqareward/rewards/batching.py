"""Merge the calls that threads and coroutines make at the same time into batches, without anyone noticing."""

import asyncio
import os
import threading
import time
import uuid
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, final

import torch

from iqareward.rewards._batch_queue import BatchLimits, BatchQueue, Waiting
from iqareward.rewards._per_process import PerProcess
from iqareward.rewards._streams import mark, take_over
from iqareward.rewards._worker_thread import refuse_call_from_within, start_worker, working
from iqareward.rewards.calls import Call, merged
from iqareward.rewards.core import Wrapper
from iqareward.types import Images, Reward, Scores


@final
class MicroBatched(Wrapper):
    """The same reward for many callers at once: concurrent calls become batches, and each caller gets its own scores.

    Trainers score one image at a time from many threads; a network is several times as fast on a batch. One worker
    thread per process does the scoring, so the reward itself is never entered twice at the same time. It waits for more
    calls only while callers that were there a moment ago are missing, so a single caller is not slowed down.

    A call that is not valid fails at once and alone. If a batch fails, its calls are scored again one by one, and only
    those that fail again get the error. Pickled copies in the same process share the worker (and its weights); in
    another process, also after a fork, a copy starts its own.

    Args:
        reward: any reward that is not differentiable.
        max_batch: images per call of the reward; larger calls are cut.
        max_wait_ms: how long a free worker waits for calls that were there a moment ago.
        max_wait_share: the same as a share of what the last batch took; the longer of the two counts.
        max_queue: images that wait for the worker at most; further callers wait for room.
        key: rewards with the same key share one worker in each process; default: this object and its copies.

    Raises:
        ValueError: the reward is differentiable (one backward pass through a shared batch would free the graph of every
            other caller, so gradients need the reward itself), or a bound is not positive.

    Example:
        >>> import torch, iqareward
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> images, clean = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> with iqareward.MicroBatched(iqareward.load("ssim")) as reward, ThreadPoolExecutor(8) as threads:
        ...     rows = list(threads.map(lambda a, b: reward(a[None], references=b[None]), images, clean))
        >>> torch.equal(torch.cat(rows), iqareward.load("ssim")(images, references=clean))
        True
    """

    def __init__(
        self,
        reward: Reward,
        max_batch: int = 32,
        max_wait_ms: float = 5.0,
        *,
        max_wait_share: float = 0.2,
        max_queue: int = 1024,
        key: str | None = None,
    ) -> None:
        if reward.differentiable:
            raise ValueError(
                f"MicroBatched expected a reward without gradients, got {reward.name} with differentiable=True: "
                "callers would share one graph. Load it without, or call it directly."
            )
        super().__init__(reward)
        self.limits = BatchLimits(max_batch, max_wait_ms, max_wait_share, max_queue)
        self.key = key or uuid.uuid4().hex
        self._worker: _Worker | None = None

    def score_call(self, call: Call) -> Scores:
        """Together with whoever else is calling.

        Raises:
            RuntimeError: it was closed, or is called from within its own reward, whose worker would wait for itself.
        """
        call.check(self.name)
        sent: list[Waiting] = []
        try:
            for waiting in self._sent(call, sent):
                waiting.admitted.result()
            return _gathered(call, [waiting.scores.result() for waiting in sent])
        finally:
            for waiting in sent:
                waiting.cancel()  # of what is answered, nothing happens

    async def ascore(
        self,
        images: Images,
        references: Images | None = None,
        *,
        inputs: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """The same without blocking the event loop; cancelling it takes its images out of the queue."""
        call = self._call(images, references, inputs, prompts).check(self.name)
        sent: list[Waiting] = []
        try:
            for waiting in self._sent(call, sent):
                await asyncio.wrap_future(waiting.admitted)
            return _gathered(call, [await asyncio.wrap_future(waiting.scores) for waiting in sent])
        finally:
            for waiting in sent:
                waiting.cancel()

    def close(self) -> None:
        """Score what is in the queue, then end the worker of this process, for every copy; later calls fail."""
        worker = self._running()
        _WORKERS.get().forget(self.key)  # whoever comes later gets a new one
        worker.queue.close()
        worker.thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_worker": None}

    def _moved(self) -> Iterable[Any]:
        if self._worker is None and self.key in _WORKERS.get():
            self._running()  # this copy's reward may not be the one that scores in this process
        return (self.reward,)

    def _sent(self, call: Call, sent: list[Waiting]) -> Iterator[Waiting]:
        """Put the call into the queue in pieces, each when the one before has been admitted."""
        queue = self._running().queue
        for piece in call.pieces(self.limits.max_batch) if len(call) else ():
            waiting = Waiting(piece)
            queue.put(waiting)
            sent.append(waiting)
            yield waiting

    def _running(self) -> "_Worker":
        worker = self._worker
        if worker is None or worker.process != os.getpid():
            worker = self._worker = _WORKERS.get().find(self)
            self.reward = worker.reward  # one copy of the weights per process
        refuse_call_from_within(worker.queue, "MicroBatched", self.name)
        return worker


@final
class _Worker:
    """The queue of one key in one process, and the thread that empties it."""

    def __init__(self, batched: MicroBatched) -> None:
        self.process, self.reward = os.getpid(), batched.reward
        self.settings = (batched.name, batched.limits)
        self.queue = BatchQueue(batched.limits)
        work = partial(_serve, batched.reward)
        self.thread = start_worker(self, self.queue, work, f"iqareward-{batched.name}")


@final
class _Workers:
    """The running workers of a process, by key; it keeps none of them alive."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collection while it is held may end in the weak dictionary
        self._by_key: weakref.WeakValueDictionary[str, _Worker] = weakref.WeakValueDictionary()

    def find(self, batched: MicroBatched) -> _Worker:
        with self._lock:
            worker = self._by_key.get(batched.key)
            if worker is None:
                worker = self._by_key[batched.key] = _Worker(batched)
        settings = (batched.name, batched.limits)
        if worker.settings != settings:
            raise ValueError(f"MicroBatched key {batched.key!r} is in use for {worker.settings}, not for {settings}.")
        return worker

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._by_key

    def forget(self, key: str) -> None:
        with self._lock:
            self._by_key.pop(key, None)


_WORKERS = PerProcess(_Workers)


def _serve(reward: Reward, queue: BatchQueue) -> None:
    while _serve_batch(reward, queue):
        pass


def _serve_batch(reward: Reward, queue: BatchQueue) -> bool:
    """Score one batch; says whether to go on. A function of its own, so that an idle worker holds no images."""
    batch = queue.take()
    started = time.monotonic()
    outcomes = [outcome for group in _alike(batch) for outcome in _score(group, reward, queue)]
    queue.finished(len(batch), time.monotonic() - started)
    if queue.silent:
        return False
    for waiting, outcome in outcomes:
        if isinstance(outcome, BaseException):
            waiting.scores.set_exception(outcome)
        else:
            waiting.scores.set_result(outcome)
    return bool(batch)


def _alike(batch: list[Waiting]) -> Iterable[list[Waiting]]:
    """Calls that agree in columns and device, which can be scored as one."""
    alike: dict[Any, list[Waiting]] = {}
    for waiting in batch:
        alike.setdefault((waiting.call.device, waiting.call.prompts is None), []).append(waiting)
    return alike.values()


def _score(group: list[Waiting], reward: Reward, queue: BatchQueue) -> list[tuple[Waiting, Any]]:
    """(scores and the mark of their stream) or an error for each call."""
    try:
        for waiting in group:
            take_over(waiting.marked, waiting.call.tensors())
        callers = frozenset[Any]().union(*(waiting.callers for waiting in group))
        # without gradients: a graph must not cross threads, not even one that the reward built unasked
        with torch.no_grad(), working(queue, callers):
            scores = merged([waiting.call for waiting in group]).score(reward)
        rows = [row.clone() for row in scores.split([len(waiting.call) for waiting in group])]  # nobody shares memory
        done = mark(scores.device)
        if done is not None:  # else the next batch would be taken, and small, as soon as this one is queued on the GPU
            done.synchronize()
        return [(waiting, (row, done)) for waiting, row in zip(group, rows, strict=True)]
    except BaseException as error:  # the worker must live on, and the callers hear of it
        if len(group) == 1:
            return [(group[0], error)]
        return [outcome for waiting in group for outcome in _score([waiting], reward, queue)]


def _gathered(call: Call, parts: list[tuple[Scores, Any]]) -> Scores:
    """The scores of all pieces, on the stream of the caller."""
    for scores, marked in parts:
        take_over(marked, [scores])
    if not parts:
        return torch.zeros(0, device=call.device)
    return torch.cat([scores for scores, _ in parts]) if len(parts) > 1 else parts[0][0]
