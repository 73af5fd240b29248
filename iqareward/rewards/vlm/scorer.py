"""The base of all rewards that ask a vision-language model; it loads the model at the first call."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from iqareward.functional._chunks import rows_at_once
from iqareward.rewards.core import ImageReward, masked
from iqareward.rewards.loading import LazyModel
from iqareward.rewards.vlm.loading import load_network, require_transformers
from iqareward.rewards.vlm.network import Features, Network
from iqareward.types import Images

Source = str | Path | tuple[Any, Any]
"""Hub id (`owner/name`, or `owner/name/folder`), folder, or a pair (model, processor), which is used as it is."""


class Readout(Protocol):
    """What a reward asks a network, prepared once for the network's tokenizer."""

    @property
    def width(self) -> int:
        """Columns of the answer."""
        ...

    def prepare(self, network: Network) -> Callable[[Features], Tensor]:
        """A function from a batch's features to `[B, width]` float32 numbers."""
        ...


class Asked(NamedTuple):
    """A network with a prepared question."""

    network: Network
    read: Callable[[Features], Tensor]


@final
class Judge(nn.Module):
    """A model, and the processor that belongs to it."""

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.processor = model, processor

    def train(self, mode: bool = True) -> "Judge":
        """Nothing: the model is in eval mode, except layers that are recomputed in the backward pass."""
        return self

    def asked(self, readout: Readout) -> Asked:
        """Everything that lives on the device."""
        network = Network(self.model, self.processor)
        return Asked(network, readout.prepare(network))


def _load(name: str, source: Source, dtype: torch.dtype | None, differentiable: bool, device: Any) -> Judge:
    require_transformers(name)
    if isinstance(source, tuple):
        model, processor = source
        return Judge(model.requires_grad_(False).eval().to(device=device, dtype=dtype), processor)
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    network = load_network(name, source, device=device, dtype=dtype, checkpointing=differentiable)
    return Judge(network.model, network.processor)


class VLMReward(ImageReward):
    """A reward by numbers that a vision-language model gives to images.

    Args:
        name: The reward's name.
        source: of the model.
        readout: what is asked.
        device: None = the GPU of the first images, else the current CUDA device if there is one, else the CPU (a model
            given stays where it is).
        dtype: None = bfloat16 on CUDA, float32 elsewhere (a model given keeps its own).
        differentiable: keep the graph to the pixels; layers of a model loaded here are recomputed in the backward pass.
        batch_size: images per run of the network.
    """

    _recomputes_layers = True

    def __init__(
        self,
        name: str,
        source: Source,
        readout: Readout,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        differentiable: bool,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"{name} expected `batch_size` >= 1, got {batch_size}.")
        if isinstance(source, tuple) and len(source) != 2:
            raise ValueError(f"{name} expected `model` as a pair (model, processor), got {len(source)} things.")
        self.name, self.batch_size, self.differentiable = name, batch_size, differentiable
        self._readout = readout
        build = partial(_load, name, source, dtype, differentiable)
        self.model_loader = LazyModel(build, device, name=name, is_built=isinstance(source, tuple))

    @property
    def model(self) -> Any:
        """The network, a native class of transformers; loads it if need be."""
        return self._judge.model

    @property
    def _judge(self) -> Judge:
        """Model and processor; loads them if need be."""
        judge: Any = self._loader.get()
        return judge

    def _asked(self) -> Asked:
        return self._loader.derived("asked", lambda judge: judge.asked(self._readout))

    def _numbers(self, images: Images) -> Tensor:
        """`[B, width]` float32 on the images' device; NaN for images that cannot be scored."""
        return self._rows(self._read, self._call(images), self._readout.width)

    def _read(self, images: Tensor) -> Tensor:
        """`[b, width]` of a clean batch; NaN if the model takes no image of that size."""
        asked = self._asked()
        features = asked.network.features(images)
        if features is None:
            return images.new_full((images.shape[0], self._readout.width), torch.nan)
        return masked(asked.read(features))

    def _rows_at_once(self, size: Sequence[int], device: torch.device) -> int:
        """`batch_size`, or fewer if their pixels would not fit on a device."""
        fitting = rows_at_once(size, device)
        if self.batch_size is None:
            return fitting
        return self.batch_size if device.type == "cpu" else min(self.batch_size, fitting)
