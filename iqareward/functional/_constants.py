"""Constants on a device, copied there once: a copy in every call would make the host wait for the device each time.

That one wait makes them safe for every stream: a copy from ordinary host memory returns when the device has it, so no
other thread can find one in the cache that is not there yet. It needs no events, which capturing a CUDA graph forbids.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=64)
def constant(
    values: tuple[float, ...] | tuple[tuple[float, ...], ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """`values` as a tensor that all callers share and none may change."""
    with torch.inference_mode(False):  # an ordinary tensor whoever asks first: later callers may want gradients
        return torch.tensor(values, dtype=dtype, device=device)
