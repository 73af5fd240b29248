"""A vision-language model that is loaded at the first call, and the reward contract around it."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn

from iqareward.functional._chunks import rows_at_once
from iqareward.rewards.batches import shape_buckets
from iqareward.rewards.loading import LazyModel, any_device_mode
from iqareward.rewards.mllm.vlm.loading import load_network, require_transformers
from iqareward.rewards.mllm.vlm.network import Features, Network
from iqareward.rewards.scoring import UnscoredWatch, sanitize
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


@final
class VLMScorer:
    """Numbers that a vision-language model gives to images, under the reward contract.

    Args:
        name: The reward's name, for error messages.
        source: of the model.
        readout: what is asked.
        device: None = CUDA if there is one, else the CPU (a model given stays where it is).
        dtype: None = bfloat16 on CUDA, float32 elsewhere (a model given keeps its own).
        differentiable: keep the graph to the pixels; layers of a model loaded here are recomputed in the backward pass.
        batch_size: images per run of the network.
    """

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
        self.name, self.width, self.batch_size = name, readout.width, batch_size
        self._readout = readout
        build = partial(_load, name, source, dtype, differentiable)
        default = "stay" if isinstance(source, tuple) else "cuda"
        self.loader = LazyModel(build, device, name=name, default=default)
        self.mode = partial(any_device_mode, differentiable=differentiable)
        self.watch = UnscoredWatch()

    @property
    def judge(self) -> Judge:
        """Model and processor; loads them if need be."""
        judge: Any = self.loader.get()
        return judge

    def asked(self, images: Tensor) -> Asked:
        """What scores; `images` tell where, if nobody else has."""
        self.loader.ready(images)
        return self.loader.derived("asked", lambda judge: judge.asked(self._readout))

    def rows(self, images: Images) -> Tensor:
        """`[B, width]` float32 on the images' device; NaN for images that cannot be scored."""
        with self.mode():
            return self._rows(images)

    def _rows(self, images: Images) -> Tensor:
        buckets, order = shape_buckets(self.name, images, None)
        if not buckets:
            device = images.device if isinstance(images, Tensor) else None
            return torch.zeros(0, self.width, dtype=torch.float32, device=device)
        asked = self.asked(buckets[0][0])
        device = asked.network.device
        pieces = [piece for (bucket,) in buckets for piece in bucket.split(self.rows_at_once(bucket, device))]
        found = torch.cat([self._read(asked, piece) for piece in pieces])
        if order is None:
            return found
        rows = found.unbind(0)  # views: restoring the order copies no index to the device
        return torch.stack([rows[i] for i in order])

    def rows_at_once(self, bucket: Tensor, device: torch.device) -> int:
        """How many images of a bucket to run on: `batch_size`, or fewer if their pixels would not fit on a device."""
        return self.batch_size if device.type == "cpu" else min(self.batch_size, rows_at_once(bucket.shape[2:], device))

    def _read(self, asked: Asked, images: Tensor) -> Tensor:
        clean, valid = sanitize(images.to(asked.network.device))
        features = asked.network.features(clean)
        if features is None:
            shape = (images.shape[0], self.width)
            return torch.full(shape, torch.nan, dtype=torch.float32, device=images.device)
        found = asked.read(features)
        valid = valid & found.isfinite().all(1)
        return torch.where(valid[:, None], found, torch.nan).to(images.device)
