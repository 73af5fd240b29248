"""Finite or stop: what a run does about NaN and infinity."""

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iqareward.groups import finite_or_nan


class TrainingError(RuntimeError):
    """Training cannot continue, because weights, gradients or rewards are unusable; saved files are intact.

    Example:
        >>> try:
        ...     require_finite("the model", {"bias": float("nan")})
        ... except TrainingError as error:
        ...     print(error)
        the model is not finite in `bias`.
    """


def require_finite(what: str, values: Any) -> None:
    """Raise a TrainingError if a tensor or number in `values`, at any depth of containers, is not finite."""
    bad = [name for name, value in _leaves(values) if not _is_finite(value)]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise TrainingError(f"{what} is not finite in `{bad[0]}`{more}.")


@contextmanager
def agreed(accelerator: Any) -> Generator[None]:
    """Raise a TrainingError of this context in all processes, so that none waits for one that has stopped."""
    error = None
    try:
        yield
    except TrainingError as found:
        error = found
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        messages = gather_object([] if error is None else [str(error)])
        if messages and error is None:
            error = TrainingError(messages[0])
    if error is not None:
        raise error


def require_usable_weights(weights: Sequence[Tensor], *, update: int, norm: float, learning_rate: float) -> None:
    """Raise a TrainingError if a step has made weights NaN, infinite, or larger than any network can bear."""
    # A sum of squares in fp32 also overflows for weights that are finite and larger than any network can bear.
    lengths = [torch.linalg.vector_norm(weight.detach().float()) for weight in weights]
    if not bool(torch.stack(lengths).isfinite().all()):
        raise TrainingError(
            f"Update {update} made weights that are not finite, with a gradient of norm {norm:.3g}. Lower "
            f"learning_rate, which is {learning_rate:g}."
        )


def require_options(options: Any, requirements: Mapping[str, tuple[str, bool]]) -> None:
    """Raise a ValueError for the first option whose requirement, `(range in words, whether it is met)`, is not met."""
    for name, (requirement, met) in requirements.items():
        if not met:
            owner, value = type(options).__name__, getattr(options, name)
            raise ValueError(f"{owner} expected {name} {requirement}, got {value!r}. Change that option.")


def is_count(value: Any) -> bool:
    """Whether `value` is an integer of at least 1."""
    return isinstance(value, Integral) and int(value) >= 1


class OptimizerStep(NamedTuple):
    """Whether the optimiser moved, and whether it failed to for a reason other than the scaler's search in fp16."""

    moved: bool
    failed: bool


def step_if_finite(accelerator: Any, optimizer: Any, norm: float) -> OptimizerStep:
    """Take the optimiser's step if the gradient norm is finite, and clear the gradient.

    In fp16 steps may be skipped while the scaler lowers the scale of the loss; below a scale of 1 that is a failure.
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
    """Mean of the finite values; NaN if there are none."""
    return float(finite_or_nan(values).nanmean())


def finite_inputs(*batches: Tensor) -> Tensor:
    """`[B]` bool: whether every pixel of an input is finite in all `batches` `[B, ...]`."""
    return torch.stack([batch.isfinite().flatten(1).all(1) for batch in batches]).all(0)


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
    if hasattr(value, "__tensor_flatten__"):  # quantised states are made of tensors, and know little arithmetic
        return all(_is_finite(getattr(value, name)) for name in value.__tensor_flatten__()[0])
    if isinstance(value, Tensor):
        return bool(value.isfinite().all())
    return not isinstance(value, float) or math.isfinite(value)
