"""One compiled forward for one batch size, replayed as a CUDA graph where there is one."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from iqareward.rewards._per_process import ProcessLock
from iqareward.rewards.mllm.owl2.model import Owl2, PromptState

WARM_UP_RUNS = 3  # compilation and autotuning must be over before a graph is captured


class StaticForward:
    """`Owl2.forward` for up to `batch_size` images, padded to exactly that many, without Python overhead per layer.

    The graph is captured here rather than by `torch.compile(mode="reduce-overhead")`, whose graphs cannot be replayed
    from a thread other than the one that compiled them, and trainers call rewards from thread pools:
    https://github.com/pytorch/pytorch/issues/123177

    Args:
        model: frozen; its weights must stay where they are.
        states: prompts.
        batch_size: images per run.
    """

    def __init__(self, model: Owl2, states: tuple[PromptState, ...], batch_size: int) -> None:
        self._states, self._batch_size = states, batch_size
        self._lock = ProcessLock()
        self._compiled = torch.compile(model, fullgraph=True, dynamic=False)
        self._replay: _Replay | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Level logits `[N, prompts, K]` of pixels `[N, 3, S, S]`, N <= batch_size."""
        count = pixels.shape[0]
        padded = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, self._batch_size - count))
        with self._lock:
            if padded.device.type != "cuda":
                return self._compiled(padded, self._states)[:count]
            if self._replay is None:
                self._replay = _Replay(self._compiled, padded, self._states)
            return self._replay(padded)[:count]


class _Replay:
    """A captured CUDA graph with its input and output buffers."""

    def __init__(self, compiled: Callable[..., Tensor], pixels: Tensor, states: tuple[PromptState, ...]) -> None:
        with torch.cuda.device(pixels.device):
            self._input = pixels.clone()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP_RUNS):
                    compiled(self._input, states)
            torch.cuda.current_stream().wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._output = compiled(self._input, states)
            self._done = torch.cuda.Event()

    def __call__(self, pixels: Tensor) -> Tensor:
        with torch.cuda.device(pixels.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # another thread's stream may still be using the buffers
            self._input.copy_(pixels)
            self._graph.replay()
            output = self._output.clone()
            self._done.record(stream)
        return output
