"""What a reward holds on a device: loaded by the first call, moved as a whole, left behind by pickling."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar, final

import torch

from iqareward.rewards._per_process import ProcessLock
from iqareward.rewards.loading import LOADING
from iqareward.rewards.scoring import reward_mode


class Movable(Protocol):
    """Weights, and whatever was computed from them."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        ...

    def to(self, device: torch.device) -> Any:
        """The same on another device."""
        ...


T = TypeVar("T", bound=Movable)


@final
class Held(Generic[T]):
    """Weights that are loaded once, whichever thread comes first. A pickled copy loads its own, and a fork waits.

    Unlike `rewards.loading.LazyModel` it does not compute while offloaded: on a CPU these models would take minutes.

    Args:
        name: of the reward, for error messages.
        load: `load(device)`; picklable. None = where it belongs by default.
        device: where to load it.
    """

    def __init__(self, name: str, load: Callable[[torch.device | None], T], device: torch.device | str | None) -> None:
        self._name, self._load = name, load
        self._device = None if device is None else torch.device(device)
        self._home: torch.device | None = None  # where it was before it was offloaded
        self._value: T | None = None
        self.lock = ProcessLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_name": self._name, "_load": self._load, "_device": self._device}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _home=None, _value=None, lock=ProcessLock())

    def get(self) -> T:
        """What is held, wherever it is; loaded if need be."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            if self._value is None:
                with LOADING:
                    self._value = self._load(self._device)
            return self._value

    def ready(self) -> T:
        """What is held, on its device.

        Raises:
            RuntimeError: it is offloaded.
        """
        value = self.get()
        if self._home is not None:
            raise RuntimeError(f"{self._name} is offloaded; call .onload() before scoring.")
        return value

    def to(self, device: torch.device | str) -> None:
        """Move it, now if it is loaded, else when it will be."""
        self._device = torch.device(device)
        self._place(self._device, home=None)

    def offload(self) -> None:
        """Move it to host memory, if it is loaded, and remember where it was."""
        if self._value is not None and self._home is None:
            self._place(torch.device("cpu"), home=self._value.device)

    def onload(self) -> None:
        """Undo `offload`."""
        if self._home is not None:
            self._place(self._home, home=None)

    def _place(self, device: torch.device, *, home: torch.device | None) -> None:
        with self.lock, torch.inference_mode(False), torch.no_grad():
            if self._value is not None:
                self._value, self._home = self._value.to(device), home


@contextmanager
def any_device_mode(*, differentiable: bool) -> Generator[None]:
    """`reward_mode` on every kind of device: images and weights may be on different ones."""
    with reward_mode("cpu", differentiable=differentiable), reward_mode("cuda", differentiable=differentiable):
        yield
