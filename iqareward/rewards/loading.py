"""Weights that are loaded once, on first use, and foreign code that runs as it was written to run."""

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from iqareward.rewards._per_process import ProcessLock, fork_waits_for

# Held while weights are loaded: a forked child would find the modules that are being imported half done for ever, and
# two threads that load at once would restore each other's random state.
LOADING = threading.RLock()
fork_waits_for(LOADING)


@final
class LazyModel:
    """A frozen network in eval mode that is built on first use, once, whichever thread comes first.

    Pickling leaves the built network behind: a copy builds its own. A fork waits while one is being built.

    Args:
        build: `build(device)` gives the network on that device; picklable.
        device: where to build it; None = where the first images are.
    """

    def __init__(self, build: Callable[[torch.device], nn.Module], device: torch.device | str | None = None) -> None:
        self._build = build
        self._device = None if device is None else torch.device(device)
        self._home: torch.device | None = None
        self._module: nn.Module | None = None
        self.lock = ProcessLock()

    def get(self, images: Tensor | None = None) -> nn.Module:
        """The network; built where it was asked to be, else where `images` are, else on the CPU."""
        with self.lock:
            if self._module is None:
                if self._device is None:
                    self._device = torch.device("cpu") if images is None else images.device
                self._module = self._build_aside(self._device)
            return self._module

    @property
    def device(self) -> torch.device:
        """Where the network is, or will be built if nobody says otherwise before."""
        return self._device or torch.device("cpu")

    def to(self, device: torch.device | str) -> None:
        """Move the network, or build it there when it is needed."""
        with self.lock:
            self._device = torch.device(device)
            if self._module is not None:
                self._module.to(self._device)

    def offload(self) -> None:
        """Move the network to the CPU and remember where it was. Calls until `onload` compute on the CPU."""
        with self.lock:
            if self._device is not None and self._home is None:
                self._home = self._device
                self.to("cpu")

    def onload(self) -> None:
        """Move the network back to where `offload` found it."""
        with self.lock:
            if self._home is not None:
                self.to(self._home)
                self._home = None

    def _build_aside(self, device: torch.device) -> nn.Module:
        """Build without a trace: ordinary tensors on CPU whatever the caller's modes, and the caller's random state."""
        with LOADING, ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.device("cpu"))
            stack.enter_context(torch.random.fork_rng(devices=[]))
            return self._build(device).eval().requires_grad_(False)

    def __getstate__(self) -> dict[str, Any]:
        return {"_build": self._build, "_device": self._device, "_home": self._home}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _module=None, lock=ProcessLock())


def each_part(reward: Any, method: str) -> None:
    """Call `offload` or `onload` on every part of a reward that has it, through sums and wrappers."""
    if hasattr(reward, method):
        getattr(reward, method)()
        return
    inner = (getattr(reward, name, None) for name in ("reward", "fidelity"))
    for part in (*getattr(reward, "rewards", ()), *inner):
        if part is not None:
            each_part(part, method)


@contextmanager
def computing_on(device: torch.device) -> Generator[None]:
    """No autocast where the network lives; `score_images` turns it off where the images are."""
    with torch.autocast(device.type, enabled=False):
        yield


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
