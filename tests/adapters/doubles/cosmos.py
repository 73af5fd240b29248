"""cosmos-rl, as far as a reward function can notice."""

from collections.abc import Callable, Sequence
from typing import Any


def compute_rewards(reward_fns: Sequence[Any], images: Any, reference: Any = None, prompt: str = "") -> Any:
    """A weighted sum of functions for one image, or for a group as a list, with what it asserts of them."""
    group = isinstance(images, list)
    totals = [0.0] * len(images) if group else 0.0
    for entry in reward_fns:
        function, weight = entry if isinstance(entry, tuple) else (entry, 1.0)
        assert isinstance(function, Callable)
        value = function(images, reference, prompt=prompt, data_packer=None, config=None, tokenizer=None)
        value, metrics = value if isinstance(value, tuple) else (value, None)
        if group:
            assert isinstance(value, list)
            assert len(value) == len(images)
            assert metrics is None or isinstance(metrics, list)
            totals = [total + weight * one for total, one in zip(totals, value)]
        else:
            assert isinstance(value, float)
            totals += weight * value
    return totals
