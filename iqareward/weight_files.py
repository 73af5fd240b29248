"""Read files of weights that others wrote, and refuse those that are damaged or hold something else."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

Shape: TypeAlias = Sequence[int]

_ZIP_START = b"PK\x03\x04"
# What a network can be run with. Integers and eight-bit floats are quantised weights, whose scales are elsewhere.
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def decode(path: Path) -> tuple[Any, dict[str, str]]:
    """What a `.safetensors` file or a file of `torch.save` holds, on the CPU; no code of the file is run.

    Tensors are mapped into memory, not read, except in torch's format of before 2020.

    Returns:
        The content, and the metadata of a safetensors file.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is truncated or damaged, or needs code to be read.
    """
    with path.open("rb") as file:
        start = file.read(len(_ZIP_START))
    try:
        if path.suffix == ".safetensors":
            return _decode_safetensors(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=start == _ZIP_START), {}
    except Exception as error:  # a damaged file makes the decoders raise anything
        raise ValueError(
            f"{path} cannot be read as weights: it is truncated or damaged (an interrupted download?), or holds more "
            f"than tensors. Delete it and get it again. ({type(error).__name__}: {error})"
        ) from error


def _decode_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 - no mapping


@final
class WeightFile:
    """The tensors of one file by name, checked when they are taken.

    Args:
        path: a `.safetensors` file, or one of `torch.save`.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: the file is damaged, or holds anything but a dictionary of tensors.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._tensors, self.metadata = decode(self.path)
        if not isinstance(self._tensors, dict):
            raise ValueError(f"{path} expected a dictionary of tensors, got {type(self._tensors).__name__}.")
        for key, value in self._tensors.items():
            if not isinstance(key, str) or not isinstance(value, Tensor):
                raise ValueError(f"{path} expected tensors by name, got {type(value).__name__} for {key!r}.")

    def keys(self) -> set[str]:
        """Names of the tensors."""
        return set(self._tensors)

    def headers(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of every tensor by name."""
        return {key: (value.shape, value.dtype) for key, value in self._tensors.items()}

    def tensor(self, key: str, shape: Shape) -> Tensor:
        """One tensor in the dtype of the file, of which the header is checked and the values are not read.

        Args:
            key: its name.
            shape: what it has to be.

        Raises:
            ValueError: it is missing, has another shape, or is not of floating-point numbers.
        """
        if key not in self._tensors:
            raise ValueError(f"{self.path} lacks {key}.")
        value = self._tensors[key]
        if tuple(value.shape) != tuple(shape):
            raise ValueError(f"{self.path} has {key} of shape {list(value.shape)}, expected {list(shape)}.")
        if value.dtype not in FLOATS or value.layout != torch.strided or value.device.type != "cpu":
            raise ValueError(
                f"{self.path} has {key} as {value.dtype}, {value.layout}, on {value.device}; expected floating-point "
                "numbers of 16 bits or more. Quantised weights cannot be read: take the original ones."
            )
        return value.detach()

    def take(self, shapes: Mapping[str, Shape]) -> dict[str, Tensor]:
        """Copies of the tensors of these names, headers and values checked.

        Args:
            shapes: the shape of each tensor by its name; others in the file are left.

        Raises:
            ValueError: one is missing, or not what was expected, or damaged; see `tensor` and `check_values`.
        """
        taken = {key: self.tensor(key, shape).clone() for key, shape in shapes.items()}
        check_values(self.path, taken)
        return taken


def check_values(path: Path, tensors: Mapping[str, Tensor], *, may_be_zero: bool = False) -> None:
    """Refuse tensors with values that no trained network has.

    The weight of a layer (a name that ends in `.weight`, two or more dimensions longer than 1) that is zero throughout
    is a part of the file that was never written. Biases, scales, tokens and tables of positions may be zero.

    Args:
        path: where the tensors came from, for the error message.
        tensors: on any one device, which is waited for once.
        may_be_zero: also weights, for networks that are not known to be trained throughout.

    Raises:
        ValueError: a tensor holds NaN or infinity, or is a weight of zeros only.
    """
    # one pass without a copy; both extremes are NaN where one value is
    extremes = {key: torch.stack(torch.aminmax(value)).float() for key, value in tensors.items() if value.numel()}
    rows = torch.stack(list(extremes.values())).tolist() if extremes else []
    for key, (low, high) in zip(extremes, rows, strict=True):
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{path} has NaN or infinite values in {key} (as {tensors[key].dtype}): it is damaged.")
        matrix = key.endswith(".weight") and sum(side > 1 for side in tensors[key].shape) > 1
        if low == high == 0 and matrix and not may_be_zero:
            raise ValueError(f"{path} has nothing but zeros in {key}: it is damaged. Delete it and get it again.")


def listed(names: Iterable[str], shown: int = 5) -> str:
    """The first names in order, and how many more there are, for an error message."""
    names = sorted(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
