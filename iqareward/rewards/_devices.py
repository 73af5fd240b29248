"""Which GPU "cuda" is. Every thread has a current device of its own, which is GPU 0 in a new one."""

import threading

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
        RuntimeError: it is "cuda" in a background thread, and the process sees several GPUs. That thread's own is GPU 0
            in every process of a distributed run.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    if threading.current_thread() is not threading.main_thread() and torch.cuda.device_count() > 1:
        raise RuntimeError(
            f'{name} expected to know which of {torch.cuda.device_count()} GPUs "cuda" is, and is used in a background '
            "thread, which cannot tell. Pass device=accelerator.device, or make it after torch.cuda.set_device(...)."
        )
    return torch.device("cuda", torch.cuda.current_device())
