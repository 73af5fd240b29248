"""Lazily loaded weights, their devices, and the global defaults that third-party code expects."""

import os
import threading
import weakref
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar, final

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from iqareward.rewards.threads import ProcessLock, StreamOrder, fork_waits_for


def device_here(device: torch.device | str) -> torch.device:
    """The device as the thread that names it means it: "cuda" is its current GPU, if it uses CUDA already.

    Args:
        device: The device as the user gave it.

    Returns:
        The device. "cuda" stays without an index where CUDA is not in use yet: asking would start it, in a process
        that may only pickle or fork what it makes.
    """
    found = torch.device(device)
    if found.type == "cuda" and found.index is None and torch.cuda.is_initialized():
        return torch.device("cuda", torch.cuda.current_device())
    return found


def _device_now(device: torch.device, *, name: str) -> torch.device:
    """The device, with an index if it is "cuda": now it has to be used.

    Args:
        device: The result of `device_here`.
        name: The name of the user, for the error message.

    Raises:
        RuntimeError: it is "cuda" in a background thread, and the process uses CUDA and sees several GPUs. That
            thread's own is GPU 0 in every process of a distributed run.
    """
    if device.type != "cuda" or device.index is not None:
        return device
    if not torch.cuda.is_initialized():  # so nobody has chosen one
        return torch.device("cuda", 0)
    if threading.current_thread() is not threading.main_thread() and torch.cuda.device_count() > 1:
        raise RuntimeError(
            f'{name} expected to know which of {torch.cuda.device_count()} GPUs "cuda" is, and is used in a background '
            "thread, which cannot tell. Pass device=accelerator.device, or make it after torch.cuda.set_device(...)."
        )
    return torch.device("cuda", torch.cuda.current_device())


def as_current(device: torch.device | None) -> AbstractContextManager[Any]:
    """Within it, this is the current GPU of the thread, for foreign code that names none when it moves to CUDA."""
    if device is None or device.type != "cuda" or not (torch.cuda.is_initialized() or torch.cuda.is_available()):
        return nullcontext()
    return torch.cuda.device(device)


@final
class ImageDevice:
    """Where an adapter moves its images, which it may do in another thread than the one that it was made in.

    Args:
        device: The device as the user gave it; None = the images stay where they are.
        name: The adapter's name, for error messages.
    """

    def __init__(self, device: torch.device | str | None, *, name: str) -> None:
        self._asked, self._name = device, name
        self._device = None if device is None else device_here(device)

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        # the thread that unpickles it may mean another GPU
        return partial(ImageDevice, name=self._name), (self._asked,)

    def get(self) -> torch.device | None:
        """The device, now that it has to be used; the same ever after."""
        if self._device is not None:
            self._device = _device_now(self._device, name=self._name)
        return self._device


# Held while weights are loaded: a forked child would find the modules that are being imported half done for ever, and
# two threads that load at once would restore each other's random state.
LOADING = threading.RLock()
fork_waits_for(LOADING)

_ALIGNMENT = 256  # bytes, of the tensors of a `HostCopy`
# How often the weights of a network have moved. Several rewards may share one, and CUDA graphs hold their addresses.
_MOVES = weakref.WeakKeyDictionary[nn.Module, int]()

T = TypeVar("T")


@final
class LazyModel:
    """A frozen network in eval mode that is built on first use, once, whichever thread comes first.

    Pickling leaves the built network behind: a copy builds its own. A fork waits while one is being built.

    "cuda" without an index is the current GPU of the thread that makes this object, or unpickles it, or calls `to`. If
    that thread does not use CUDA yet, it is the GPU of the first images, else that of the main thread.

    Args:
        build: `build(device)` gives the network on that device; picklable.
        device: where to build it; None = the GPU of the first images, else "cuda" if there is one, else the CPU.
        name: The reward's name, for error messages.
        is_built: `build` gives a network that exists already, and with `device=None` gets None and lets it stay.

    Example:
        >>> model = LazyModel(lambda device: nn.Linear(2, 1).to(device), "cpu")
        >>> model.ready().training
        False
    """

    def __init__(
        self,
        build: Callable[[Any], nn.Module],
        device: torch.device | str | None = None,
        *,
        name: str = "the reward",
        is_built: bool = False,
    ) -> None:
        self.build, self._asked, self._name, self._is_built = build, device, name, is_built
        self._begin()

    def __getstate__(self) -> dict[str, Any]:
        return {key: self.__dict__[key] for key in ("build", "_asked", "_name", "_is_built")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin()

    def _begin(self) -> None:
        self._device = None if self._asked is None else device_here(self._asked)
        self._cuda = device_here("cuda")
        self._network: nn.Module | None = None
        self._host: HostCopy | None = None
        self._offloaded = False
        self._order = StreamOrder(torch.device("cpu"))
        self._derived: dict[Hashable, tuple[Any, StreamOrder]] = {}
        self._moves = 0
        self.lock = ProcessLock()

    def get(self, images: Tensor | None = None) -> nn.Module:
        """The network on whatever device, built if need be, by default on the device of `images`."""
        with self.lock:
            if self._network is None:
                device = self._where_to_build(images)
                network = self._build_aside(device)
                first = next(tensors_of(network), None)
                here = torch.device("cpu") if images is None else images.device
                self._device = device or (here if first is None else first.device)
                self._order, self._network = StreamOrder(self._device), network
            return self._network

    def ready(self, images: Tensor | None = None) -> nn.Module:
        """The network on its device, ready for this thread's stream.

        Raises:
            RuntimeError: It is offloaded, or its GPU is not known.
        """
        network = self.get(images)
        if self._offloaded:
            raise RuntimeError(f"{self._name} is offloaded; call .onload() before scoring.")
        self._order.read()
        return network

    def derived(self, key: Hashable, make: Callable[[Any], T]) -> T:
        """The cached result of `make(network)`, computed again when the network has moved; for this thread's stream."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            network = self.ready()
            if self._moves != _MOVES.get(network, 0):
                self._drop_derived(network)
            if key not in self._derived:
                value = make(network)
                self._derived[key] = value, StreamOrder(self.device)
            value, order = self._derived[key]
        order.read()
        return value

    @property
    def device(self) -> torch.device:
        """Where the network is, or will be built if nobody says otherwise before."""
        return self._device or torch.device("cpu")

    def to(self, device: torch.device | str) -> None:
        """Move the network, or build it there when it is needed."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            target = device_here(device)
            if self._network is not None:
                target = _device_now(target, name=self._name)
                if self._offloaded and target == self.device:
                    self.onload()
                else:
                    self._release(self._network)
                    self._network.to(target)
                    self._host, self._offloaded, self._order = None, False, StreamOrder(target)
            self._asked, self._device = device, target

    def offload(self) -> None:
        """Free the device memory of the weights, if they are loaded; calls are refused until `onload`.

        The first call copies the weights to host memory. The copy is kept, so that later calls copy nothing.
        """
        with self.lock, torch.inference_mode(False), torch.no_grad():
            if self._network is None or self._offloaded:
                return
            self._release(self._network)
            if self.device.type != "cpu":
                if self._host is None or not self._host.is_current(self._network):
                    self._host = None  # two copies need not fit
                    self._host = HostCopy(self._network, self.device)
                self._host.offload()
            self._offloaded = True

    def onload(self) -> None:
        """Undo `offload`."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            if self._offloaded:
                if self._host is not None:
                    self._host.onload()
                self._offloaded, self._order = False, StreamOrder(self.device)

    def _release(self, network: nn.Module) -> None:
        """Drop derived values; the memory of the weights is reused only after all streams that read it are done."""
        self._order.read()
        self._order.drop()
        _MOVES[network] = _MOVES.get(network, 0) + 1
        self._drop_derived(network)

    def _drop_derived(self, network: nn.Module) -> None:
        for _, order in self._derived.values():
            order.drop()
        self._derived.clear()
        self._moves = _MOVES.get(network, 0)

    def _where_to_build(self, images: Tensor | None) -> torch.device | None:
        near = images.device if images is not None and images.device.type == "cuda" else None
        if self._device is None:
            if self._is_built:
                return None
            if near is not None or not torch.cuda.is_available():
                return near or torch.device("cpu")
            return _device_now(self._cuda, name=self._name)
        if near is not None and self._device.type == "cuda" and self._device.index is None:
            return near
        return _device_now(self._device, name=self._name)

    def _build_aside(self, device: torch.device | None) -> nn.Module:
        """Build without a trace: ordinary tensors on CPU whatever the caller's modes, and the caller's random state."""
        with LOADING, ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.device("cpu"))
            stack.enter_context(as_current(device))
            stack.enter_context(torch.random.fork_rng(devices=[]))
            return self.build(device).eval().requires_grad_(False)


@final
class HostCopy:
    """A copy of a network's weights in host memory, which makes offloading free after the first time.

    For CUDA the memory is page-locked, so that weights come back at the speed of the bus and without a host wait.

    Args:
        network: A frozen network; its weights may be quantised by torchao.
        device: The device of the network.

    Example:
        >>> network = nn.Linear(2, 1).requires_grad_(False)
        >>> copy = HostCopy(network, torch.device("cpu"))
        >>> copy.offload()  # the weights are in the copy now, and nowhere else
        >>> copy.onload()
        >>> copy.is_current(network)
        True
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        self._device = device
        self._weights = [*network.parameters(), *network.buffers()]
        self._tensors = [tensor for tensor in tensors_of(network) if tensor.device == device]
        sizes = [-(-tensor.numel() * tensor.itemsize // _ALIGNMENT) * _ALIGNMENT for tensor in self._tensors]
        memory = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu")
        if device.type == "cuda" and self._tensors:
            self._lock_pages(memory)
        self._copies = [
            _shaped_like(tensor, part) for tensor, part in zip(self._tensors, memory.split(sizes), strict=True)
        ]
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            copy.copy_(tensor)
        self._seen = _versions(self._tensors)

    def is_current(self, network: nn.Module) -> bool:
        """Whether the network's weights have been neither written to nor replaced since the copy."""
        return self._seen == _versions(tensor for tensor in tensors_of(network) if tensor.device == self._device)

    def offload(self) -> None:
        """Point the network's weights at the copies, which frees their memory on the device."""
        for tensor, copy in zip(self._tensors, self._copies, strict=True):
            tensor.data = copy
        _follow_parts(self._weights)

    def onload(self) -> None:
        """Copy the weights to the device, in this thread's stream; all of them or, without enough memory, none."""
        try:
            for tensor, copy in zip(self._tensors, self._copies, strict=True):
                tensor.data = copy.to(self._device, non_blocking=True)
        except BaseException:
            self.offload()
            raise
        _follow_parts(self._weights)
        self._seen = _versions(self._tensors)

    def _lock_pages(self, memory: Tensor) -> None:
        # Not torch's own pinned memory: its sizes are powers of two, and it is never given back to the system.
        runtime: Any = torch.cuda.cudart()
        torch.cuda.check_error(int(runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)))
        weakref.finalize(self, _unlock_pages, memory.data_ptr(), self._device, os.getpid()).atexit = False


def _unlock_pages(address: int, device: torch.device, process: int) -> None:
    if os.getpid() != process:  # a forked child has the object, and no CUDA
        return
    torch.cuda.synchronize(device)  # copies from there may be under way
    runtime: Any = torch.cuda.cudart()
    runtime.cudaHostUnregister(address)


def tensors_of(network: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, each once, and of a quantised one the ordinary tensors that it consists of."""
    for tensor in (*network.parameters(), *network.buffers()):
        yield from _ordinary(tensor)


def _ordinary(tensor: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _ordinary(getattr(tensor, name))


def _follow_parts(tensors: Iterable[Tensor]) -> None:
    """Move quantised tensors to where the tensors are that they consist of."""
    for tensor in tensors:
        if is_traceable_wrapper_subclass(tensor):
            names, context = tensor.__tensor_flatten__()
            parts = {name: getattr(tensor, name) for name in names}
            _follow_parts(parts.values())
            tensor.data = type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())


def _shaped_like(tensor: Tensor, memory: Tensor) -> Tensor:
    """A tensor in these bytes, with the strides that a copy of `tensor` has."""
    stride = torch.empty_like(tensor, device="meta").stride()
    return memory[: tensor.numel() * tensor.itemsize].view(tensor.dtype).as_strided(tensor.shape, stride)


def _versions(tensors: Iterable[Tensor]) -> list[tuple[int, int, int | None]]:
    """Changes when a tensor is written to or replaced."""
    return [(id(t), t.data_ptr(), None if t.is_inference() else t._version) for t in tensors]


@contextmanager
def plain_defaults(name: str) -> Generator[None]:
    """Run code that makes tensors without naming dtype or device as if nobody had changed the defaults.

    The default device is thread-local and is set aside. The default dtype is not, so another one is refused: with
    bfloat16, constants of piq and pyiqa lose digits and scores move without an error.

    Raises:
        RuntimeError: the default dtype is not float32.
    """
    if torch.get_default_dtype() != torch.float32:
        raise RuntimeError(
            f"{name} expected float32 as torch's default dtype while scoring, got {torch.get_default_dtype()}, which "
            "would change its constants. Call torch.set_default_dtype(torch.float32) once your model is built."
        )
    if torch.get_default_device().type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield
