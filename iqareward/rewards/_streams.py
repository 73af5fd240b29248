"""Hand tensors from one thread to another: on CUDA each works on a stream of its own, and must wait for the other's."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def mark(device: torch.device | None) -> Any:
    """The work that this thread has queued on the device so far, for `take_over`; None where nothing is queued."""
    if device is None or device.type != "cuda":
        return None
    return torch.cuda.current_stream(device).record_event()


def take_over(marked: Any, tensors: Iterable[Tensor]) -> None:
    """Let this thread's further work come after what was marked, and keep the tensors' memory until then; no sync."""
    if marked is None:
        return
    for tensor in tensors:
        stream = torch.cuda.current_stream(tensor.device)
        stream.wait_event(marked)
        tensor.record_stream(stream)  # else the allocator may give the memory away while this stream still reads it
