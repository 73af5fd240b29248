"""A process that holds one reward: it merges concurrent calls into batches, and returns errors as values."""

import asyncio
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from iqareward.optional import require
from iqareward.rewards.batching import MicroBatched
from iqareward.rewards.calls import Call, parts_of
from iqareward.rewards.core import Wrapper
from iqareward.rewards.loading import device_here
from iqareward.serving.requests import ByteSemaphore
from iqareward.serving.wire import as_floats
from iqareward.types import Images, Reward, Scores

Arrays: TypeAlias = np.ndarray | list[np.ndarray]
"""Images between processes: Ray passes large arrays through shared memory, without a copy."""

Columns: TypeAlias = tuple[Arrays, Arrays | None, Arrays | None, Sequence[str] | None]
"""Images, references, inputs and prompts of a call."""

WARM_UP_SIDE = 256  # every reward of the catalogue scores images of this side
_MAX_FLOAT_BYTES = 2**30  # of the images that are scored and those that are next; further ones wait as they came
_SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
_SECONDS = [0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10]


@dataclass(frozen=True)
class Scored:
    """Scores of a call `[b]`, and those of the parts of a weighted sum."""

    scores: Scores
    components: dict[str, Scores] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoredRows:
    """`Scored` between processes: arrays pickle in 8 us, tensors in 140."""

    scores: np.ndarray
    components: dict[str, np.ndarray] = field(default_factory=dict)

    def unpacked(self) -> Scored:
        """The same as tensors."""
        parts = {name: torch.from_numpy(row) for name, row in self.components.items()}
        return Scored(torch.from_numpy(self.scores), parts)


@dataclass(frozen=True)
class Failed:
    """An error that the client is to see; a plain value, because exceptions change on their way between processes."""

    status: int
    code: str
    message: str


def pack(call: Call) -> Columns:
    """The arguments of `RewardReplica.score`."""
    images, references, inputs = (
        column.numpy() if isinstance(column, Tensor) else column and [image.numpy() for image in column]
        for column in (call.images, call.references, call.inputs)
    )
    return images, references, inputs, None if call.prompts is None else tuple(call.prompts)  # pyright: ignore


@final
class BatchMetrics:
    """Counts batches for Prometheus by Ray: `iqareward_images`, `iqareward_batch_size`, `iqareward_batch_seconds`."""

    def __init__(self) -> None:
        metrics: Any = require("ray.serve.metrics", extra="serve", purpose="the reward server")
        tags = ("reward",)
        self._images = metrics.Counter("iqareward_images", "Images scored.", tag_keys=tags)
        self._sizes = metrics.Histogram("iqareward_batch_size", "Images per batch.", boundaries=_SIZES, tag_keys=tags)
        self._seconds = metrics.Histogram(
            "iqareward_batch_seconds", "Seconds to score a batch.", boundaries=_SECONDS, tag_keys=tags
        )

    def __call__(self, reward: str, num_images: int, seconds: float) -> None:
        """Count one batch."""
        tags = {"reward": reward}
        self._images.inc(num_images, tags)
        self._sizes.observe(num_images, tags)
        self._seconds.observe(seconds, tags)


@final
class RewardReplica:
    """One reward, loaded when this is built, and scoring in batches of concurrent calls.

    After each batch, what `observer` makes in this process is called with the reward's name, the number of images and
    the seconds. A process that starts while it is `told_to_sleep` loads nothing until it is woken.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        device: str = "cpu",
        max_batch: int = 32,
        max_wait_ms: float = 5.0,
        observer: Callable[[], Callable[[str, int, float], None]] | None = None,
        told_to_sleep: Callable[[], bool] = bool,
    ) -> None:
        # shared memory is read-only, and no reward writes to its images
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        parts = parts_of(reward)
        self._whole: Any = reward if parts else None
        observe = None if observer is None else observer()
        self._parts = [_OnDevice(part, torch.device(device), observe) for part in parts or [reward]]
        self._told_to_sleep = told_to_sleep
        self._asleep = told_to_sleep()
        if not self._asleep:
            self._warm_up()
        self._batched = [MicroBatched(part, max_batch=max_batch, max_wait_ms=max_wait_ms) for part in self._parts]
        self._in_work = ByteSemaphore(_MAX_FLOAT_BYTES)
        self._following: asyncio.Task[Failed | None] | None = None
        self._broken = ""

    async def score(
        self,
        images: Arrays,
        references: Arrays | None = None,
        inputs: Arrays | None = None,
        prompts: Sequence[str] | None = None,
    ) -> ScoredRows | Failed:
        """Scores of a call, or why there are none."""
        columns = [None if column is None else _tensors(column) for column in (images, references, inputs)]
        call = Call(*columns, prompts=prompts)  # pyright: ignore[reportArgumentType]
        async with self._in_work.taken(4 * sum(tensor.numel() for tensor in call.tensors())):
            if self._asleep:
                return Failed(409, "asleep", "the reward sleeps: wake it with POST /v1/rewards/NAME/wake, or onload().")
            try:
                floats, truths, given = (None if column is None else as_floats(column) for column in columns)
                assert floats is not None
                rows = await asyncio.gather(
                    *(part.ascore(floats, truths, inputs=given, prompts=prompts) for part in self._batched)
                )
            except (ValueError, TypeError) as error:  # by the contract: the input is at fault
                return Failed(422, "refused_by_reward", _first_line(error))
            except Exception as error:
                if "CUDA error" in str(error):  # the context is lost: every later call in this process fails too
                    self._broken = _first_line(error)
                return Failed(500, "reward_failed", _first_line(error))
        if self._whole is None:
            return ScoredRows(rows[0].numpy())
        scores = {part.name: row for part, row in zip(self._parts, rows, strict=True)}
        return ScoredRows(self._whole.combine(scores).numpy(), {name: row.numpy() for name, row in scores.items()})

    async def follow(self) -> Failed | None:
        """Give the device back, or take it again, as the reward is told to, after the calls that came before."""
        async with self._in_work.taken(_MAX_FLOAT_BYTES):
            asleep = await asyncio.to_thread(self._told_to_sleep)
            if asleep == self._asleep:
                return None
            try:
                await asyncio.to_thread(self._sleep if asleep else self._wake)
            except Exception as error:  # of waking: another may still use the memory
                return Failed(503, "device_busy", _first_line(error))
            self._asleep = asleep
            return None

    async def check_health(self) -> None:
        """Raises if this process cannot score any more, so that Ray Serve replaces it.

        Also puts a process to sleep, or wakes it, that started while the others were told.
        """
        if self._broken:
            raise RuntimeError(self._broken)
        idle = self._following is None or self._following.done()
        if idle and await asyncio.to_thread(self._told_to_sleep) != self._asleep:
            self._following = asyncio.create_task(self.follow())  # may wait longer than a health check may

    def statistics(self) -> tuple[int, dict[str, tuple[int, int]]]:
        """The id of this process, and the batches and images that it has scored so far, by part."""
        return os.getpid(), {part.name: (part.num_batches, part.num_images) for part in self._parts}

    def _sleep(self) -> None:
        for part in self._parts:
            part.offload()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # the process is ours, and the memory is to be another's

    def _wake(self) -> None:
        for part in self._parts:
            part.onload()
        self._warm_up()  # loads what a process that started asleep has not

    def _warm_up(self) -> None:
        for part in self._parts:
            part.warm_up()


@final
class _OnDevice(Wrapper):
    """A reward whose images arrive on the CPU and are scored elsewhere, in whole batches."""

    def __init__(self, reward: Reward, device: torch.device, observe: Callable[[str, int, float], None] | None) -> None:
        # here, because the thread that scores has a current GPU of its own
        super().__init__(reward)
        self.device, self.observe = device_here(device), observe
        self.num_batches = self.num_images = 0

    def score_call(self, call: Call) -> Scores:
        started = time.perf_counter()
        columns = (self._there(column) for column in (call.images, call.references, call.inputs))
        moved = Call(*columns, prompts=call.prompts)  # pyright: ignore[reportArgumentType]
        scores = moved.score(self.reward).float().cpu()
        self.num_batches += 1
        self.num_images += len(call)
        if self.observe is not None:
            self.observe(self.name, len(call), time.perf_counter() - started)
        return scores

    def warm_up(self) -> None:
        """Load what has to be loaded, now rather than while the first client waits."""
        # noise, because some rewards have no score for a flat image, and would warn of it
        image = torch.rand(1, 3, WARM_UP_SIDE, WARM_UP_SIDE, generator=torch.Generator().manual_seed(0)).to(self.device)
        Call(image, image, image if self.needs_inputs else None, ["a photograph"]).score(self.reward)

    def _there(self, images: Images | None) -> Images | None:
        if images is None or isinstance(images, Tensor):
            return images if images is None else images.to(self.device, non_blocking=True)
        return [image.to(self.device, non_blocking=True) for image in images]


def _tensors(arrays: Arrays) -> Images:
    return torch.from_numpy(arrays) if isinstance(arrays, np.ndarray) else [torch.from_numpy(row) for row in arrays]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:500]
