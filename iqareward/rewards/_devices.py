"""Which GPU "cuda" is. Every thread has a current device of its own, which is GPU 0 in a new one."""

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, final

import torch


def device_here(device: torch.device | str) -> torch.device:
    """The device as the thread that names it means it: "cuda" is its current GPU, if it uses CUDA already.

    Args:
        device: as it was given.

    Returns:
        The device. "cuda" stays without an index where CUDA is not in use yet: asking would start it, in a process
        that may only pickle or fork what it makes.
    """
    found = torch.device(device)
    if found.type == "cuda" and found.index is None and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return found


def device_now(device: torch.device, *, name: str) -> torch.device:
    """The device, with an index if it is "cuda": now it has to be used.

    Args:
        device: from `device_here`.
        name: who uses it, for the error message.

    Raises:
        RuntimeError: it is "cuda" in a background thread, and the process uses CUDA and sees several GPUs. That
            thread's own is GPU 0 in every process of a distributed run.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    if not torch.cuda.is_initialized():  # so nobody has chosen one
        return torch.device("cuda", 0)
    if threading.current_thread() is not threading.main_thread() and torch.cuda.device_count() > 1:
        raise RuntimeError(
            f'{name} expected to know which of {torch.cuda.device_count()} GPUs "cuda" is, and is used in a background '
            "thread, which cannot tell. Pass device=accelerator.device, or make it after torch.cuda.set_device(...)."
        )
    return torch.device("cuda", torch.cuda.current_device())


def as_current(device: torch.device | None) -> AbstractContextManager[Any]:
    """Within it, this is the current GPU of the thread, for foreign code that names none when it moves to CUDA."""
    if device is None or device.type != "cuda" or not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return nullcontext()
    return torch.cuda.device(device)


@final
class ImageDevice:
    """Where an adapter moves its images, which it may do in another thread than the one that it was made in.

    Args:
        device: as it was given; None = the images stay where they are.
        name: The adapter's name, for error messages.
    """

    def __init__(self, device: torch.device | str | None, *, name: str) -> None:
        self._asked, self._name = device, name
        self._device = None if device is None else device_here(device)

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        # the thread that unpickles it may mean another GPU
        return partial(ImageDevice, name=self._name), (self._asked,)

    def get(self) -> torch.device | None:
        """The device, now that it has to be used."""
        return None if self._device is None else device_now(self._device, name=self._name)
