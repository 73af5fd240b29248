"""The policy as it was before RL: what KL measures against."""

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from iqareward.diffusion.policy import Policy, adapters_off


@contextmanager
def as_reference(policy: Policy, frozen: nn.Module | None) -> Generator[None]:
    """Within it the policy answers as before RL, without a gradient.

    Args:
        policy: the model.
        frozen: a copy of its module from before RL; not needed for a LoRA model, whose adapters are switched off.

    Raises:
        TypeError: the model has no adapters and there is no copy.
    """
    with torch.no_grad():
        if frozen is None:
            with adapters_off(policy.model):
                yield
            return
        trained, policy.model = policy.model, frozen
        try:
            yield
        finally:
            policy.model = trained
