"""What the tests that need a GPU share."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_waits() -> Iterator[None]:
    """Within it, an operation that makes the host wait for the GPU is an error, as far as torch notices."""
    try:
        with warnings.catch_warnings():
            # said by the first call of a process, about the mode itself
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
