"""A process that holds one reward: it collects concurrent calls into batches and never passes an exception on."""

import asyncio
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import numpy as np
import torch
from torch import Tensor

from iqareward.rewards.batching import MicroBatched
from iqareward.rewards.calls import Call, parts_of
from iqareward.rewards.core import Wrapper
from iqareward.rewards.loading import device_here
from iqareward.serving.dispatch import Scored
from iqareward.serving.memory import Room
from iqareward.serving.wire import as_floats
from iqareward.types import Images, Reward, Scores

Arrays: TypeAlias = np.ndarray | list[np.ndarray]
"""Images as they travel between processes: Ray passes large arrays through shared memory, without a copy."""

Rows: TypeAlias = tuple[np.ndarray, dict[str, np.ndarray]]
"""Scores on their way back, with those of the parts of a sum: arrays pickle in 8 us, tensors in 140."""

Observer: TypeAlias = Callable[[str, int, float], None]
"""Called after each batch with the reward's name, the number of images and the seconds."""

WARM_UP_SIDE = 256  # every reward of the catalogue scores images of this side
MAX_FLOAT_BYTES = 2**30  # of the images that are scored and those that are next; further ones wait as they came


@dataclass(frozen=True)
class Failed:
    """An error that the client is to see; a plain value, because exceptions change on their way between processes."""

    status: int
    code: str
    message: str


def pack(call: Call) -> tuple[Arrays, Arrays | None, tuple[str, ...] | None]:
    """The arguments of `RewardReplica.score`."""
    references = None if call.references is None else _arrays(call.references)
    return _arrays(call.images), references, None if call.prompts is None else tuple(call.prompts)


def unpack(rows: Rows) -> Scored:
    """What `RewardReplica.score` answered, as tensors again."""
    scores, parts = rows
    return Scored(torch.from_numpy(scores), {name: torch.from_numpy(row) for name, row in parts.items()})


@final
class RewardReplica:
    """One reward, loaded when this is built, and scoring in batches of concurrent calls.

    Args:
        reward: the reward; its weights are loaded here, and a picture is scored to see that they can be.
        device: where images are moved to before they are scored.
        max_batch: images per call of the reward.
        max_wait_ms: how long a free process waits for more requests, or a fifth of its last batch's time if longer.
        observer: makes what is told of each batch; made here because it may belong to this process.
        told_to_sleep: whether the reward is to be asleep now; default: never. A process that starts asleep loads
            nothing until it is woken.
    """

    def __init__(
        self,
        reward: Reward,
        *,
        device: str = "cpu",
        max_batch: int = 32,
        max_wait_ms: float = 5.0,
        observer: Callable[[], Observer] | None = None,
        told_to_sleep: Callable[[], bool] | None = None,
    ) -> None:
        # shared memory is read-only, and no reward writes to its images
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        parts = parts_of(reward)
        self._whole: Any = reward if parts else None
        observe = None if observer is None else observer()
        self._parts = [_OnDevice(part, torch.device(device), observe) for part in parts or [reward]]
        self._told_to_sleep = told_to_sleep or _never
        self._asleep = self._told_to_sleep()
        if not self._asleep:
            self._warm_up()
        self._batched = [MicroBatched(part, max_batch=max_batch, max_wait_ms=max_wait_ms) for part in self._parts]
        self._room = Room(MAX_FLOAT_BYTES)
        self._settling: asyncio.Task[Failed | None] | None = None
        self._broken = ""

    async def score(
        self, images: Arrays, references: Arrays | None = None, prompts: Sequence[str] | None = None
    ) -> Rows | Failed:
        """Scores of a call, or why there are none."""
        call = Call(_tensors(images), None if references is None else _tensors(references), prompts=prompts)
        async with self._room.taken(4 * sum(tensor.numel() for tensor in call.tensors())):
            if self._asleep:
                return Failed(409, "asleep", "the reward sleeps: wake it with POST /v1/rewards/NAME/wake, or onload().")
            try:
                floats = as_floats(call.images)
                truths = None if call.references is None else as_floats(call.references)
                rows = await asyncio.gather(*(part.ascore(floats, truths, prompts=prompts) for part in self._batched))
            except (ValueError, TypeError) as error:  # by the contract: the input is at fault
                return Failed(422, "refused_by_reward", _first_line(error))
            except Exception as error:
                if "CUDA error" in str(error):  # the context is lost: every later call in this process fails too
                    self._broken = _first_line(error)
                return Failed(500, "reward_failed", _first_line(error))
        if self._whole is None:
            return rows[0].numpy(), {}
        scores = {part.name: row for part, row in zip(self._parts, rows, strict=True)}
        return self._whole.combine(scores).numpy(), {name: row.numpy() for name, row in scores.items()}

    async def settle(self) -> Failed | None:
        """Give the device back, or take it again, as the reward is told to, after the calls that came before."""
        async with self._room.taken(MAX_FLOAT_BYTES):
            asleep = await asyncio.to_thread(self._told_to_sleep)
            if asleep == self._asleep:
                return None
            try:
                await asyncio.to_thread(self._sleep if asleep else self._wake)
            except Exception as error:  # of waking: another may still use the memory
                return Failed(503, "cannot_settle", _first_line(error))
            self._asleep = asleep
            return None

    async def check_health(self) -> None:
        """Raises if this process cannot score any more, so that Ray Serve replaces it.

        Also settles, for a process that started while the reward was put to sleep or woken, and was not told.
        """
        if self._broken:
            raise RuntimeError(self._broken)
        idle = self._settling is None or self._settling.done()
        if idle and await asyncio.to_thread(self._told_to_sleep) != self._asleep:
            self._settling = asyncio.create_task(self.settle())  # may wait longer than a health check may

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

    def statistics(self) -> tuple[int, dict[str, tuple[int, int]]]:
        """The id of this process, and the batches and images that it has scored so far, by part."""
        return os.getpid(), {part.name: (part.num_batches, part.num_images) for part in self._parts}


@final
class _OnDevice(Wrapper):
    """A reward whose images arrive on the CPU and are scored elsewhere, in whole batches."""

    def __init__(self, reward: Reward, device: torch.device, observe: Observer | None) -> None:
        # here, because the thread that scores has a current GPU of its own
        super().__init__(reward)
        self.device, self.observe = device_here(device), observe
        self.num_batches = self.num_images = 0

    def score_call(self, call: Call) -> Scores:
        started = time.perf_counter()
        truths = None if call.references is None else self._there(call.references)
        moved = Call(self._there(call.images), truths, prompts=call.prompts)
        scores = moved.score(self.reward).float().cpu()
        self.num_batches += 1
        self.num_images += len(call)
        if self.observe is not None:
            self.observe(self.name, len(call), time.perf_counter() - started)
        return scores

    def warm_up(self) -> None:
        """Load what has to be loaded, now rather than while the first client waits."""
        picture = torch.full((1, 3, WARM_UP_SIDE, WARM_UP_SIDE), 0.5, device=self.device)
        self.reward(picture, references=picture, prompts=["a photograph"])

    def _there(self, images: Images) -> Images:
        if isinstance(images, Tensor):
            return images.to(self.device, non_blocking=True)
        return [image.to(self.device, non_blocking=True) for image in images]


def _never() -> bool:
    return False


def _arrays(images: Images) -> Arrays:
    return images.numpy() if isinstance(images, Tensor) else [image.numpy() for image in images]


def _tensors(arrays: Arrays) -> Images:
    return torch.from_numpy(arrays) if isinstance(arrays, np.ndarray) else [torch.from_numpy(row) for row in arrays]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:500]
