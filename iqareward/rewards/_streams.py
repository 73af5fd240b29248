"""Hand tensors from one thread to another: on CUDA each works on a stream of its own, and must wait for the other's."""

from collections.abc import Iterable
from typing import Any, final

import torch
from torch import Tensor


def mark(device: torch.device | None) -> Any:
    """The work that this thread has queued on the device so far, for `take_over`; None where nothing is queued."""
    if device is None or device.type != "cuda" or not torch.cuda.is_initialized():
        return None
    # blocking: a thread that waits for it sleeps, and leaves its core to the others
    return torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True))


def take_over(marked: Any, tensors: Iterable[Tensor]) -> None:
    """Let this thread's further work come after what was marked, and keep the tensors' memory until then; no sync."""
    if marked is None:
        return
    for tensor in tensors:
        stream = torch.cuda.current_stream(tensor.device)
        stream.wait_event(marked)
        tensor.record_stream(stream)  # else the allocator may give the memory away while this stream still reads it


@final
class StreamOrder:
    """Orders the streams of all threads that read what this thread has just made and keeps, without a wait of the host.

    Not needed for what was only copied from ordinary host memory: such a copy returns when the device has it.

    Args:
        device: where it was made.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._made = device, mark(device)
        self._maker: Any = None if self._made is None else torch.cuda.current_stream(device)
        self._readers = {self._maker}

    def read(self) -> None:
        """Let this thread's further work come after the making."""
        if self._made is None:
            return
        stream = torch.cuda.current_stream(self._device)
        if stream not in self._readers:
            stream.wait_event(self._made)
            self._readers.add(stream)

    def drop(self) -> None:
        """To be called before it is thrown away: its memory is the maker's, who must not reuse it while others read."""
        if self._maker is not None:
            for stream in self._readers - {self._maker}:
                self._maker.wait_stream(stream)
