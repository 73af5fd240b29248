"""The forward of mPLUG-Owl2 for a few fixed batch sizes: CUDA graphs, with or without compiled layers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iqareward.rewards.owl2.model import Owl2, PromptState
from iqareward.rewards.recompute import run_layer
from iqareward.rewards.threads import ProcessLock

WARM_UP_RUNS = 3  # compilation and autotuning must be over before a graph is captured
# Of one function. torch gives up after 8, but these are one for each kind of layer, batch size, dtype and network size.
MOST_COMPILATIONS = 256


class StaticForward:
    """`Owl2.forward` for batches of 1, 2, 4, ... and `batch_size` images, to which others are padded.

    On CUDA each size is captured as a graph when it is first needed, and replayed without Python between the kernels.
    All sizes share one pool of memory, which is smallest if the largest batch comes first. The capture is made here
    rather than by `torch.compile(mode="reduce-overhead")`, whose graphs cannot be replayed from a thread other than the
    one that compiled them, and trainers call rewards from thread pools:
    https://github.com/pytorch/pytorch/issues/123177

    Args:
        model: frozen; its weights must stay where they are.
        states: prompts.
        batch_size: most images per run.
        compile_layers: run layers compiled; one compilation serves all layers of a kind, for one batch size.
    """

    def __init__(self, model: Owl2, states: tuple[PromptState, ...], batch_size: int, *, compile_layers: bool) -> None:
        self._network: Callable[[Tensor], Tensor] = partial(model, states=states, run=run_layer)
        if compile_layers:
            from torch._dynamo import config  # takes a second to import

            run = torch.compile(_run, fullgraph=True, dynamic=False)
            self._network = config.patch(cache_size_limit=MOST_COMPILATIONS)(partial(model, states=states, run=run))
        self._batch_size = batch_size
        self._lock = ProcessLock()
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}  # by batch size, each with its output
        weight, side = model.model.norm.weight, model.config.image_size
        if weight.is_cuda:
            self._input = weight.new_zeros(batch_size, 3, side, side)
            self._pool, self._done = torch.cuda.graph_pool_handle(), torch.cuda.Event()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Level logits `[N, prompts, K]` of pixels `[N, 3, S, S]`, N <= batch_size."""
        count = pixels.shape[0]
        size = min(1 << (count - 1).bit_length(), self._batch_size)
        with self._lock:
            if pixels.device.type == "cuda":
                with torch.cuda.device(pixels.device):
                    return self._replay(pixels, size)[:count]
            return self._network(F.pad(pixels, (0,) * 7 + (size - count,)))[:count]

    def _replay(self, pixels: Tensor, size: int) -> Tensor:
        stream = torch.cuda.current_stream()
        stream.wait_event(self._done)  # another thread's stream may still be using the buffers
        self._input[: pixels.shape[0]].copy_(pixels)  # rows behind these are those of an earlier call
        if size not in self._graphs:
            self._graphs[size] = self._capture(self._input[:size])
        graph, output = self._graphs[size]
        graph.replay()
        found = output.clone()
        self._done.record(stream)
        return found

    def _capture(self, pixels: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Not one stream for both: cuBLAS keeps a workspace for each, and that of the captured one belongs in the pool.
        warm, side, graph = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.CUDAGraph()
        warm.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(warm):
            for _ in range(WARM_UP_RUNS):
                self._network(pixels)
        side.wait_stream(warm)
        with (
            torch.cuda.stream(side),  # which a capture that fails would not leave by itself
            torch.cuda.graph(graph, self._pool, stream=side, capture_error_mode="thread_local"),
        ):
            output = self._network(pixels)
        torch.cuda.current_stream().wait_stream(side)
        return graph, output


def _run(layer: nn.Module, *inputs: Any) -> Any:
    return layer(*inputs)
