"""Finite or stop: what a run does about NaN and infinity."""

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iqareward.groups import finite_or_nan


class TrainingError(RuntimeError):
    """A run that cannot go on, because its weights, gradients or rewards are not usable; what it has saved is whole.

    Example:
        >>> try:
        ...     require_finite("the model", {"bias": float("nan")})
        ... except TrainingError as error:
        ...     print(error)
        the model is not finite in `bias`.
    """


def require_finite(what: str, values: Any) -> None:
    """Refuse NaN and infinity in tensors and numbers, however deep they lie in dictionaries, lists and tuples.

    Args:
        what: The whole of the values, for the message.
        values: A tensor, a number, or containers of them; anything else is left alone.

    Raises:
        TrainingError: Something is not finite; it is named.

    Example:
        >>> require_finite("the model", {"bias": torch.tensor([0.0, torch.inf])})
        Traceback (most recent call last):
        iqareward.diffusion.finite.TrainingError: the model is not finite in `bias`.
    """
    bad = [name for name, value in _leaves(values) if not _is_finite(value)]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise TrainingError(f"{what} is not finite in `{bad[0]}`{more}.")


def require_usable_weights(weights: Sequence[Tensor], *, update: int, norm: float, learning_rate: float) -> None:
    """Refuse weights that a step has made NaN, infinite, or larger than any network can bear.

    Args:
        weights: Those that train; looked at on their device, the host waits for the answer.
        update: Number of the step, from 1.
        norm: Norm of the gradient of that step.
        learning_rate: The learning rate, for the message.

    Raises:
        TrainingError: With that number, norm and learning rate.
    """
    # A sum of squares in fp32 also overflows for weights that are finite and larger than any network can bear.
    lengths = [torch.linalg.vector_norm(weight.detach().float()) for weight in weights]
    if not bool(torch.stack(lengths).isfinite().all()):
        raise TrainingError(
            f"Update {update} made weights that are not finite, with a gradient of norm {norm:.3g}. Lower "
            f"learning_rate, which is {learning_rate:g}."
        )


def require_options(options: Any, requirements: Mapping[str, tuple[str, bool]]) -> None:
    """Refuse an option that is out of its range.

    Args:
        options: What has the options as attributes.
        requirements: Maps each option to its range in words and whether it is met.

    Raises:
        ValueError: One is not; the message names it, its range and its value.

    Example:
        >>> from types import SimpleNamespace
        >>> require_options(SimpleNamespace(rate=-1), {"rate": ("in [0, inf)", False)})
        Traceback (most recent call last):
        ValueError: SimpleNamespace expected rate in [0, inf), got -1. Change that option.
    """
    for name, (requirement, met) in requirements.items():
        if not met:
            owner, value = type(options).__name__, getattr(options, name)
            raise ValueError(f"{owner} expected {name} {requirement}, got {value!r}. Change that option.")


def is_count(value: Any) -> bool:
    """Whether it is an integer of at least 1.

    Example:
        >>> is_count(2), is_count(0), is_count(1.5)
        (True, False, False)
    """
    return isinstance(value, Integral) and int(value) >= 1


class OptimizerStep(NamedTuple):
    """`moved`: whether the optimiser took its step; `failed`: whether it did not and nothing excuses that."""

    moved: bool
    failed: bool


def step_if_finite(accelerator: Any, optimizer: Any, norm: float) -> OptimizerStep:
    """Take the optimiser's step, or leave weights and optimiser as they are, and forget the gradient.

    A step in fp16 may be skipped while its scaler lowers the scale of the loss; below a scale of 1 it is a failure.

    Args:
        accelerator: The `Accelerator` of the run.
        optimizer: Prepared by it.
        norm: Gradient norm, the same number on all processes.
    """
    moved, scaler = math.isfinite(norm), accelerator.scaler
    searching = not moved and scaler is not None and scaler.get_scale() > 1
    if moved:
        optimizer.step()
    elif scaler is not None:
        scaler.update()  # lowers the scale
    optimizer.zero_grad()
    return OptimizerStep(moved, failed=not moved and not searching)


def finite_mean(values: Tensor) -> float:
    """Mean of what is finite; NaN if nothing is.

    Example:
        >>> finite_mean(torch.tensor([1.0, 3.0, torch.inf]))
        2.0
    """
    return float(finite_or_nan(values).nanmean())


def usable_rows(*batches: Tensor) -> Tensor:
    """`[B]` bool: whether every pixel of a row is finite in all `batches` `[B, ...]`.

    Example:
        >>> usable_rows(torch.tensor([[0.0], [torch.nan]]), torch.zeros(2, 1))
        tensor([ True, False])
    """
    return torch.stack([rows.isfinite().flatten(1).all(1) for rows in batches]).all(0)


def _leaves(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        pairs: Any = values.items()
    elif isinstance(values, Sequence) and not isinstance(values, str):
        pairs = enumerate(values)
    else:
        yield name, values
        return
    for key, value in pairs:
        yield from _leaves(value, f"{name}.{key}" if name else str(key))


def _is_finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)
