"""Conditions: what a policy knows about its inputs, as a tree of tensors and strings with one row per input."""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

Condition: TypeAlias = dict[str, Any]
"""Named values, made from a batch: tensors with one row per input, lists of one string per input, None, and dicts,
lists and tuples of such values."""


def check_condition(condition: Any, num_rows: int, *, caller: str) -> Condition:
    """The condition itself, if it is a dict and every leaf has `num_rows` rows; an error names the leaf if not."""
    if not isinstance(condition, dict):
        raise TypeError(f"{caller}.condition expected to return a dict, got {type(condition).__name__}.")
    for name, leaf in _leaves(condition, ""):
        if isinstance(leaf, Tensor):
            count = leaf.shape[0] if leaf.ndim else None
        elif _is_text(leaf):
            count = len(leaf)
        else:
            raise TypeError(
                f"{caller}.condition expected tensors, lists of strings or None, got {type(leaf).__name__} in {name}. "
                "Keep what is the same for every input as an attribute of the policy."
            )
        if count != num_rows:
            shown = list(leaf.shape) if isinstance(leaf, Tensor) else f"{count} strings"
            raise ValueError(
                f"{caller}.condition expected {num_rows} rows in {name}, one per input, got {shown}. Keep what is the "
                "same for every input as an attribute of the policy, or repeat it for each."
            )
    return condition


def select(condition: Condition, rows: slice) -> Condition:
    """The condition of these rows."""
    return _mapped(lambda leaf: leaf[rows], condition)


def repeat(condition: Condition, times: int) -> Condition:
    """Each row `times` times, side by side: one for each rollout of an input."""

    def repeated(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.repeat_interleave(times, 0)
        return [text for text in leaf for _ in range(times)]

    return _mapped(repeated, condition)


def concatenated(first: Any, *others: Any) -> Any:
    """Conditions one below the other, for one pass of the network instead of several."""
    if first is None:
        return None
    if isinstance(first, Tensor):
        return torch.cat([first, *others])
    if _is_text(first):
        return [text for part in (first, *others) for text in part]
    if isinstance(first, dict):
        return {name: concatenated(value, *(other[name] for other in others)) for name, value in first.items()}
    return _like(first, [concatenated(*parts) for parts in zip(first, *others, strict=True)])


def _is_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, str) for item in value)


def _mapped(function: Callable[[Any], Any], value: Any) -> Any:
    if value is None:
        return None
    if isinstance(value, dict):
        return {name: _mapped(function, item) for name, item in value.items()}
    if isinstance(value, list | tuple) and not _is_text(value):
        return _like(value, [_mapped(function, item) for item in value])
    return function(value)


def _like(value: Any, items: list[Any]) -> Any:
    """A list, tuple or named tuple like `value`, of these items."""
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _leaves(value: Any, name: str) -> Any:
    if value is None:
        return
    if isinstance(value, dict):
        items: Any = value.items()
    elif isinstance(value, list | tuple) and not _is_text(value):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, f"{name}[{key!r}]")
