"""Score on a background thread: merge calls into batches (`MicroBatched`), or run beside the caller (`Overlapped`)."""

import asyncio
import os
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self, final

import torch

from iqareward.rewards.calls import Call, merged
from iqareward.rewards.core import Wrapper, numbers, refuse_groups
from iqareward.rewards.threads import PerProcess, mark, take_over
from iqareward.types import Groups, Images, Reward, Scores

_EXIT_SECONDS = 10.0  # how long an exiting interpreter waits for the call under way
# Callers that score over a network come back slowly after a slow batch. Waiting for them for this share of the batch's
# time made batches of 19 to 25 images out of 32 possible; waiting 5 ms made batches of 12.
_WAIT_SHARE = 0.2


@final
class MicroBatched(Wrapper):
    """Merge concurrent calls of a reward into batches, and give each caller its own scores.

    Trainers score one image at a time from many threads; a network is several times as fast on a batch. One worker
    thread per process does the scoring, so the reward itself is never entered twice at the same time. It waits for more
    calls only if there were more callers a moment ago, so a single caller is not slowed down.

    An invalid call fails at once and alone. If a batch fails, its calls are scored again one by one, and only those
    that fail again get the error. Pickled copies in the same process share the worker (and its weights); in another
    process, also after a fork, a copy starts its own.

    Args:
        reward: any reward that is not differentiable.
        max_batch: The most images per call of the reward; larger calls are cut.
        max_wait_ms: Maximum time to wait for callers that are missing, or a fifth of the last batch's time if longer.
        max_bytes: The most bytes of images per call of the reward; larger calls are cut.
        key: Rewards with the same key share one worker in each process; by default this object and its copies do.

    Raises:
        ValueError: The reward is differentiable, it compares images with each other, or a limit is out of range. One
            backward pass through a shared batch would free the graph of every other caller, so gradients need the
            reward itself.

    Example:
        >>> import torch, iqareward
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> images, clean = torch.rand(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> with iqareward.MicroBatched(iqareward.load("ssim")) as reward, ThreadPoolExecutor(8) as threads:
        ...     scores = list(threads.map(lambda a, b: reward(a[None], references=b[None]), images, clean))
        >>> torch.equal(torch.cat(scores), iqareward.load("ssim")(images, references=clean))
        True
    """

    def __init__(
        self,
        reward: Reward,
        max_batch: int = 32,
        max_wait_ms: float = 5.0,
        *,
        max_bytes: int = 2**29,
        key: str | None = None,
    ) -> None:
        super().__init__(reward)
        refuse_groups("MicroBatched", reward)
        if reward.differentiable:
            raise ValueError(
                f"MicroBatched expected a reward without gradients, got {reward.name} with differentiable=True: "
                "callers would share one graph. Load it without, or call it directly."
            )
        numbers("MicroBatched", max_batch=max_batch, max_wait_ms=max_wait_ms, max_bytes=max_bytes)
        if not (max_batch >= 1 and max_wait_ms >= 0 and max_bytes >= 1):
            raise ValueError(
                "MicroBatched expected max_batch >= 1, max_wait_ms >= 0 and max_bytes >= 1, got "
                f"{max_batch}, {max_wait_ms} and {max_bytes}."
            )
        self.limits = _Limits(max_batch, max_wait_ms / 1000, max_bytes)
        self.key = key or uuid.uuid4().hex
        self._batcher: _Batcher | None = None

    def score_call(self, call: Call) -> Scores:
        """Score a call in one batch with those of other callers.

        Raises:
            RuntimeError: The reward was closed, or it is called from within itself and would wait for itself.
        """
        jobs = self._submit(call)
        try:
            return _gathered(call, [job.future.result() for job in jobs])
        finally:
            for job in jobs:
                job.future.cancel()  # has no effect on finished ones

    async def ascore(
        self,
        images: Images,
        references: Images | None = None,
        *,
        inputs: Images | None = None,
        prompts: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """Score without blocking the event loop; cancelling the coroutine removes its images from the queue."""
        call = self._call(images, references, inputs, prompts, tasks=tasks)
        jobs = self._submit(call)
        try:
            return _gathered(call, [await asyncio.wrap_future(job.future) for job in jobs])
        finally:
            for job in jobs:
                job.future.cancel()

    def close(self) -> None:
        """Score what is in the queue, then end the worker of this process, for every copy; later calls fail."""
        batcher = self._running()
        batcher.worker.refuse_from_within(f"MicroBatched of {self.name}")
        _BATCHERS.get().forget(self.key, batcher)  # whoever comes later gets a new one
        batcher.worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_batcher": None}

    def _moved(self) -> Iterable[Any]:
        if self._batcher is None and self.key in _BATCHERS.get():
            self._running()  # this copy's reward may not be the one that scores in this process
        return (self.reward,)

    def _submit(self, call: Call) -> list["_Job"]:
        call.check(self.name)
        worker = self._running().worker
        pieces = call.pieces(self.limits.max_batch, self.limits.max_bytes) if len(call) else ()
        return [worker.submit(_Job(piece), f"MicroBatched of {self.name}") for piece in pieces]

    def _running(self) -> "_Batcher":
        batcher = self._batcher
        if batcher is None or batcher.process != os.getpid():
            batcher = self._batcher = _BATCHERS.get().find(self)
            self.reward = batcher.reward  # one copy of the weights per process
        return batcher


@final
class Overlapped(Wrapper):
    """Run a reward on its own thread, and on a GPU on its own stream, while the caller samples the next batch.

    `submit` returns at once; the scores are there when you ask for them. Calling it is `submit(...).result()`, so it is
    a reward like any other. Work that the caller has queued on its stream comes before the scoring, and the scores
    before what the caller does with them, through events, without a synchronisation.

    The graph of a differentiable reward is built on the background thread and belongs to the caller alone: `backward`
    works as usual.

    Args:
        reward: Any reward; only one thread uses it at a time.
        max_pending: Maximum number of unfinished calls; `submit` waits beyond that, so that images do not pile up.

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
        numbers("Overlapped", max_pending=max_pending)
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
        ids: Groups | None = None,
        tasks: Sequence[str] | None = None,
        **ignored: Any,
    ) -> "PendingScores":
        """Start scoring, and return without the scores.

        Args:
            images: As for any reward; do not write to them before the result is there.
            references: As for any reward; do not write to them either.
            inputs: As for any reward; do not write to them either.
            prompts: One per image.
            ids: As for any reward.
            tasks: One per image.
            ignored: Anything else a trainer passes.

        Raises:
            TypeError: An argument is not a floating-point tensor.
            ValueError: Shapes are wrong, or references or prompts are missing or do not match.
            RuntimeError: The reward is called from within itself and would wait for itself for ever, or the
                interpreter exits.
        """
        return self._submit(self._call(images, references, inputs, prompts, ids, tasks))

    def _submit(self, call: Call) -> "PendingScores":
        return self._background.get().submit(self.reward, call.check(self.name))


@final
class PendingScores:
    """Scores that are being computed: a future that also knows CUDA streams. Can be awaited."""

    def __init__(self, future: "Future[_Scored]") -> None:
        self._future = future

    def result(self, timeout: float | None = None) -> Scores:
        """The scores `[B]`, ready for the caller's current stream, or the reward's own exception.

        Args:
            timeout: Maximum seconds to wait; None = as long as it takes.

        Raises:
            TimeoutError: The scores are not there yet; you may ask again.
        """
        return _received(self._future.result(timeout))

    def done(self) -> bool:
        """Whether `result` will not wait for the background thread."""
        return self._future.done()

    def cancel(self) -> bool:
        """Do not score if scoring has not begun; returns whether that was in time."""
        return self._future.cancel()

    def __await__(self) -> Generator[Any, None, Scores]:
        return _received((yield from asyncio.wrap_future(self._future).__await__()))


_Scored = tuple[Scores, Any]  # scores, and the mark of the stream that computes them


def _received(scored: _Scored) -> Scores:
    """The scores, for this thread's stream."""
    scores, marked = scored
    take_over(marked, [scores])
    return scores


def _gathered(call: Call, parts: Sequence[_Scored]) -> Scores:
    rows = [_received(part) for part in parts]
    return rows[0] if len(rows) == 1 else torch.cat(rows) if rows else torch.zeros(0, device=call.device)


# The workers that wait for the code that runs now. `asyncio.to_thread` carries them into its thread; a thread that a
# reward starts by itself does not know them.
_waiting: ContextVar[frozenset[Any]] = ContextVar("waiting", default=frozenset())


@final
class _Job:
    """A call on its way to a worker, and the future of its scores."""

    def __init__(self, call: Call, reward: Reward | None = None) -> None:
        self.call, self.reward, self.marked = call, reward, mark(call.device)
        self.waiting = _waiting.get()
        self.future: Future[_Scored] = Future()


@final
class _Inbox:
    """Jobs for one thread, first come, first served."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._closing = threading.RLock()  # a garbage collection may close it while this thread holds the lock
        self._is_closed = False
        self.is_silent = False  # the interpreter exits: nobody gets an answer any more

    def put(self, job: _Job, user: str) -> None:
        with self._closing:
            self.refuse_if_closed(user)
            self._jobs.put(job)

    def refuse_if_closed(self, user: str) -> None:
        """Raise a RuntimeError that says why no more jobs are accepted."""
        if self._is_closed:
            reason = "was called while the interpreter exits." if self.is_silent else "is closed; make a new one."
            raise RuntimeError(f"{user} {reason}")

    def get(self, timeout: float | None = None) -> _Job | None:
        """The next job; None after the last one of a closed inbox; `queue.Empty` when the time is over."""
        job = self._jobs.get(timeout=timeout) if timeout is None or timeout > 0 else self._jobs.get_nowait()
        return None if self.is_silent else job

    def close(self, *, silent: bool = False) -> None:
        """Accept no more jobs; the thread ends after those that are there, or with `silent` after the one under way."""
        with self._closing:
            self._is_closed, self.is_silent = True, silent
            self._jobs.put(None)


@final
class _Worker:
    """A daemon thread that scores for other threads; it ends with this object, or with the interpreter.

    Args:
        work: `work(inbox)` is the loop of the thread; it must not refer to whoever owns this object.
        name: The name of the thread.
    """

    def __init__(self, work: Callable[[_Inbox], None], name: str) -> None:
        self.inbox = _Inbox()
        self._thread = threading.Thread(target=work, args=(self.inbox,), name=name, daemon=True)
        self._thread.start()
        weakref.finalize(self, _end, self.inbox, self._thread, os.getpid())

    def submit(self, job: _Job, user: str) -> _Job:
        """Queue a job.

        Raises:
            RuntimeError: The worker is closed, or waits itself for the code that calls this.
        """
        self.refuse_from_within(user)
        self.inbox.put(job, user)
        return job

    def refuse_from_within(self, user: str) -> None:
        """Refuse a call for which this worker would wait for itself.

        Raises:
            RuntimeError: The worker waits for the code that calls this.
        """
        if self.inbox in _waiting.get():
            raise RuntimeError(
                f"{user} was called from within its own reward and would wait for itself for ever. Let that reward "
                "call the wrapped one instead (the attribute `reward`), or a wrapper of its own with another `key`."
            )

    def close(self) -> None:
        """Score what was submitted, then end the thread."""
        self.inbox.close()
        self._thread.join()


def _end(inbox: _Inbox, thread: threading.Thread, process: int) -> None:
    if os.getpid() != process:  # a forked child has the objects but not the thread
        return
    exiting = not threading.main_thread().is_alive()
    # At exit only daemon threads still wait. One woken now would free its tensors while the interpreter ends; torch
    # releases the GIL for that, cannot take it back, and aborts ("terminate called without an active exception").
    inbox.close(silent=exiting)
    if exiting:  # a mere collection must not wait
        thread.join(_EXIT_SECONDS)


@contextmanager
def _working(inbox: _Inbox, jobs: Iterable[_Job]) -> Generator[None]:
    """Score for the callers of `jobs`, of which some may be workers themselves."""
    token = _waiting.set(frozenset[Any]().union(*(job.waiting for job in jobs)) | {inbox})
    try:
        yield
    finally:
        _waiting.reset(token)


@final
@dataclass(frozen=True)
class _Limits:
    max_batch: int
    max_wait: float  # seconds
    max_bytes: int


@final
class _Batcher:
    """What copies of a `MicroBatched` share in one process: the reward, and the thread that scores."""

    def __init__(self, batched: MicroBatched) -> None:
        self.process, self.reward = os.getpid(), batched.reward
        self.settings = (batched.name, batched.limits)
        self.worker = _Worker(partial(_serve_batches, batched.limits, batched.reward), f"iqareward-{batched.name}")


@final
class _Batchers:
    """The running batchers of a process, by key; it keeps none of them alive."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a collection while it is held may end in the weak dictionary
        self._by_key: weakref.WeakValueDictionary[str, _Batcher] = weakref.WeakValueDictionary()

    def find(self, batched: MicroBatched) -> _Batcher:
        with self._lock:
            batcher = self._by_key.get(batched.key)
            if batcher is None:
                batcher = self._by_key[batched.key] = _Batcher(batched)
        settings = (batched.name, batched.limits)
        if batcher.settings != settings:
            raise ValueError(f"MicroBatched key {batched.key!r} is in use for {batcher.settings}, not for {settings}.")
        return batcher

    def __contains__(self, key: str) -> bool:
        with self._lock:
            return key in self._by_key

    def forget(self, key: str, batcher: _Batcher) -> None:
        with self._lock:
            if self._by_key.get(key) is batcher:  # else it was closed before, and a copy has begun a new one
                del self._by_key[key]


_BATCHERS = PerProcess(_Batchers)


def _serve_batches(limits: _Limits, reward: Reward, inbox: _Inbox) -> None:
    queue = _BatchQueue(limits, inbox)
    while _serve_batch(reward, queue, inbox):
        pass


def _serve_batch(reward: Reward, queue: "_BatchQueue", inbox: _Inbox) -> bool:
    """Score one batch; says whether to go on. A function of its own, so that an idle worker holds no images."""
    batch = queue.take()
    started = time.monotonic()
    outcomes = [outcome for group in _alike(batch) for outcome in _score_group(group, reward, inbox)]
    queue.finished(len(batch), time.monotonic() - started)
    for job, outcome in [] if inbox.is_silent else outcomes:
        if isinstance(outcome, BaseException):
            job.future.set_exception(outcome)
        else:
            job.future.set_result(outcome)
    return bool(batch) and not inbox.is_silent


@final
class _BatchQueue:
    """Batches from the jobs of an inbox.

    A batch is complete when it is full, or holds as many jobs as there were at the end of the last batch (threads in a
    loop come back all at once, and a caller alone must not wait for nobody), or when the wait is over.
    """

    def __init__(self, limits: _Limits, inbox: _Inbox) -> None:
        self._limits, self._inbox = limits, inbox
        self._jobs: deque[_Job] = deque()
        self._wait, self._num_expected, self._is_closed = limits.max_wait, 1, False

    def take(self) -> list[_Job]:
        """The next batch; empty when the inbox is closed and nothing is left."""
        batch: list[_Job] = []
        while not batch and (self._jobs or self._receive(None)):
            until = time.monotonic() + self._wait
            while self._receive(0) or (not self._is_complete() and self._receive(until - time.monotonic())):
                pass
            num_images, nbytes = 0, 0
            while self._jobs:
                call = self._jobs[0].call
                if batch and not self._fits(num_images + len(call), nbytes + call.nbytes):
                    break
                job = self._jobs.popleft()
                if job.future.set_running_or_notify_cancel():
                    batch.append(job)
                    num_images, nbytes = num_images + len(call), nbytes + call.nbytes
        return batch

    def finished(self, num_jobs: int, seconds: float) -> None:
        """A batch of so many jobs took so long; to be said before they are answered, so that none counts twice."""
        while self._receive(0):
            pass
        self._num_expected = num_jobs + len(self._jobs)
        self._wait = max(self._limits.max_wait, _WAIT_SHARE * seconds)

    def _receive(self, timeout: float | None) -> bool:
        """Wait for a job; returns whether one came."""
        if self._is_closed:
            return False
        try:
            job = self._inbox.get(timeout)
        except Empty:
            return False
        if job is None:
            self._is_closed = True
            return False
        self._jobs.append(job)
        return True

    def _fits(self, num_images: int, nbytes: int) -> bool:
        return num_images <= self._limits.max_batch and nbytes <= self._limits.max_bytes

    def _is_complete(self) -> bool:
        if self._is_closed or len(self._jobs) >= self._num_expected:
            return True
        return sum(len(job.call) for job in self._jobs) >= self._limits.max_batch


def _alike(batch: list[_Job]) -> Iterable[list[_Job]]:
    """Jobs that agree in columns and device, and can be scored as one call."""
    alike: dict[Any, list[_Job]] = {}
    for job in batch:
        alike.setdefault((job.call.device, job.call.prompts is None), []).append(job)
    return alike.values()


def _score_group(group: list[_Job], reward: Reward, inbox: _Inbox) -> Iterator[tuple[_Job, Any]]:
    """The scores, or an error, of each job."""
    try:
        for job in group:
            take_over(job.marked, job.call.tensors())
        # without gradients: a graph must not cross threads, not even one that the reward built unasked
        with torch.no_grad(), _working(inbox, group):
            scores = merged([job.call for job in group]).score(reward)
        rows = [row.clone() for row in scores.split([len(job.call) for job in group])]  # nobody shares memory
        done = mark(scores.device)
        if done is not None:  # else the next batch would be taken, and small, as soon as this one is queued on the GPU
            done.synchronize()
    except BaseException as error:  # the worker must live on, and the callers hear of it
        if len(group) == 1:
            yield group[0], error
        else:
            for job in group:
                yield from _score_group([job], reward, inbox)
    else:
        yield from ((job, (row, done)) for job, row in zip(group, rows, strict=True))


@final
class _Background:
    """The thread of an `Overlapped` in one process."""

    def __init__(self, max_pending: int) -> None:
        self._free = threading.BoundedSemaphore(max_pending)
        self._worker = _Worker(_serve_calls, "iqareward-overlapped")

    def submit(self, reward: Reward, call: Call) -> PendingScores:
        job, user = _Job(call, reward), f"Overlapped of {reward.name}"
        self._worker.refuse_from_within(user)  # before it waits for room, which a silent worker never makes
        self._worker.inbox.refuse_if_closed(user)
        self._free.acquire()
        job.future.add_done_callback(lambda _: self._free.release())  # cancelled ones too
        return PendingScores(self._worker.submit(job, user).future)


def _serve_calls(inbox: _Inbox) -> None:
    streams: dict[torch.device, torch.cuda.Stream] = {}
    while _serve_call(inbox, streams):
        pass


def _serve_call(inbox: _Inbox, streams: dict[torch.device, torch.cuda.Stream]) -> bool:
    """Score one call; says whether to go on. A function of its own, so that an idle thread holds no images."""
    job = inbox.get()
    if job is None:
        return False
    if not job.future.set_running_or_notify_cancel():
        return True
    try:
        with _working(inbox, [job]):
            outcome = _score_beside(job, streams)
    except BaseException as error:  # the thread must live on, and the caller hears of it
        if not inbox.is_silent:
            job.future.set_exception(error)
    else:
        if not inbox.is_silent:
            job.future.set_result(outcome)
    return not inbox.is_silent


def _score_beside(job: _Job, streams: dict[torch.device, torch.cuda.Stream]) -> _Scored:
    reward, call = job.reward, job.call
    assert reward is not None
    with torch.set_grad_enabled(reward.differentiable):
        if job.marked is None or call.device is None:
            return call.score(reward), None
        if call.device not in streams:
            streams[call.device] = torch.cuda.Stream(call.device)
        with torch.cuda.stream(streams[call.device]):
            take_over(job.marked, call.tensors())
            return call.score(reward), mark(call.device)
