"""What tests share that run on a GPU where there is one."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
fake_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tensors of a fake GPU are for machines without one")
on_devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
"""The test runs on the CPU everywhere, so that it does not rot, and on a GPU where there is one."""


@contextmanager
def no_waits() -> Iterator[None]:
    """Within it, an operation that makes the host wait for a GPU is an error, as far as torch notices."""
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    try:
        with warnings.catch_warnings():
            # said by the first call of a process, about the mode itself
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
