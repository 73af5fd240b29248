"""A vision-language model that is loaded at the first call, and the reward contract around it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor

from iqareward.rewards.batches import shape_buckets
from iqareward.rewards.mllm.vlm.loading import load_network
from iqareward.rewards.mllm.vlm.network import Features, Network
from iqareward.rewards.scoring import reward_mode, sanitize
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


class _Loaded:
    """Everything that lives on the device; dropped and rebuilt when the weights move."""

    def __init__(self, network: Network, readout: Readout, *, offloaded: bool = False) -> None:
        self.network, self.read, self.offloaded = network, readout.prepare(network), offloaded


@final
class VLMScorer:
    """Numbers that a vision-language model gives to images, under the reward contract.

    Args:
        name: of the reward, for error messages.
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
        self.name, self.source, self.readout = name, source, readout
        self.device = None if device is None else torch.device(device)
        self.dtype, self.differentiable, self.batch_size = dtype, differentiable, batch_size
        self._home = torch.device("cpu")
        self._loaded: _Loaded | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what was loaded: a copy in another process loads its own weights."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_loaded", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _loaded=None, _lock=threading.Lock())

    def load(self) -> _Loaded:
        """The network on its device, loaded by the first thread that asks."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._loaded is None:
                self._loaded = _Loaded(self._load_network(), self.readout)
            return self._loaded

    def _load_network(self) -> Network:
        if isinstance(self.source, tuple):
            model, processor = self.source
            return Network(model.requires_grad_(False).eval().to(device=self.device, dtype=self.dtype), processor)
        device = self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = self.dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        return load_network(self.name, self.source, device=device, dtype=dtype, checkpointing=self.differentiable)

    def move(self, device: torch.device | str) -> None:
        """Move the weights, now if they are loaded, else when they will be."""
        self.device = torch.device(device)
        self._place(self.device)

    def offload(self) -> None:
        """Move the weights to host memory."""
        if self._loaded is not None and not self._loaded.offloaded:
            self._home = self._loaded.network.device
            self._place(torch.device("cpu"), offloaded=True)

    def onload(self) -> None:
        """Undo `offload`."""
        if self._loaded is not None and self._loaded.offloaded:
            self._place(self._home)

    def _place(self, device: torch.device, *, offloaded: bool = False) -> None:
        with self._lock, torch.inference_mode(False):
            if self._loaded is not None:
                network = self._loaded.network
                moved = Network(network.model.to(device), network.processor)
                self._loaded = _Loaded(moved, self.readout, offloaded=offloaded)

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Grad mode and autocast of a reward, on every kind of device."""
        graph = self.differentiable
        with reward_mode("cpu", differentiable=graph), reward_mode("cuda", differentiable=graph):
            yield

    def rows(self, images: Images) -> Tensor:
        """`[B, width]` float32 on the images' device; NaN for images that cannot be scored."""
        with self.mode():
            return self._rows(images)

    def _rows(self, images: Images) -> Tensor:
        buckets, order = shape_buckets(self.name, images, None)
        if not buckets:
            device = images.device if isinstance(images, Tensor) else None
            return torch.zeros(0, self.readout.width, dtype=torch.float32, device=device)
        loaded = self.ready()
        pieces = [piece for (bucket,) in buckets for piece in bucket.split(self.batch_size)]
        found = torch.cat([self._read(loaded, piece) for piece in pieces])
        if order is None:
            return found
        rows = found.unbind(0)  # views: restoring the order copies no index to the device
        return torch.stack([rows[i] for i in order])

    def ready(self) -> _Loaded:
        """What is loaded, on its device.

        Raises:
            RuntimeError: the weights are offloaded.
        """
        loaded = self.load()
        if loaded.offloaded:
            raise RuntimeError(f"{self.name} is offloaded; call .onload() before scoring.")
        return loaded

    def _read(self, loaded: _Loaded, images: Tensor) -> Tensor:
        clean, valid = sanitize(images.to(loaded.network.device))
        features = loaded.network.features(clean)
        if features is None:
            shape = (images.shape[0], self.readout.width)
            return torch.full(shape, torch.nan, dtype=torch.float32, device=images.device)
        found = loaded.read(features)
        valid = valid & found.isfinite().all(1)
        return torch.where(valid[:, None], found, torch.nan).to(images.device)
