"""What a call would cost on a GPU, counted without one.

    python -m benchmarks.meter                 # table of rewards and of their peers, predicted for an H100
    python -m benchmarks.meter --only Q-Align

Example:
    >>> import iqareward
    >>> reward = iqareward.load("psnr")
    >>> with Meter() as meter:
    ...     images = torch.rand(32, 3, 512, 512, device="cuda")
    ...     scores = meter.second(lambda: reward(images, references=images))
    >>> meter.waits
    []
    >>> meter.kernels < 50, meter.bytes < 2e9, meter.peak_bytes < 1e9, meter.predicted_ms < 1
    (True, True, True, True)
"""

import argparse
import heapq
import itertools
import math
import sys
import tempfile
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.bench_classical import NO_REFERENCE, OURS, PEERS, Peer
from iqareward.rewards.catalog import CATALOG, load
from iqareward.rewards.loading import LazyModel

aten = torch.ops.aten
# an H100, measured (benchmarks/results/gpu_h100_2026-11-26.md); float64 is from its data sheet
BYTES_PER_S = 2.97e12
S_PER_LAUNCH = 10.2e-6
FLOP_PER_S = {torch.bfloat16: 756e12, torch.float16: 756e12, torch.float32: 51.5e12, torch.float64: 34e12}
CONVOLUTION_FLOP_PER_S = 385e12  # float32, as TF32: the default of cuDNN
ATTENTION_FLOP_PER_S = 350e12  # of a fused kernel in half precision; an estimate

# one for the process: a package's cached constants are tensors of the mode in which they were made
_FAKE = FakeTensorMode(allow_non_fake_inputs=True)
_TASKS = itertools.count(1)  # a checkpoint recomputes once in each backward pass
_FREE = {aten.empty, aten.empty_strided, aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.lift_fresh}
_WRITES_ONLY = {aten.copy_, aten.fill_, aten.zero_, aten.random_, aten.normal_, aten.uniform_}
_LOOKUPS = {aten.index, aten.gather, aten.embedding, aten.index_select}
_READS = {aten._local_scalar_dense, aten.equal, aten.allclose}
_COPIES = {aten._to_copy, aten.copy_}
_SELECTS = {aten.nonzero, aten.masked_select, aten._unique2, aten.repeat_interleave}
_CONVOLUTIONS = {aten.convolution, aten.convolution_backward}


class Place(NamedTuple):
    """An operator, and the innermost line of code outside torch that ran it."""

    operator: str
    line: str

    def __str__(self) -> str:
        return f"{self.operator} at {self.line}"


class Meter(TorchDispatchMode):
    """Counts what the code within it would do on a GPU, for tensors that it makes there with `device="cuda"`.

    Tensors within have shapes and no values (`FakeTensorMode`), gradients included, so that networks of any size run in
    no memory. Every operator is one kernel that reads its inputs and writes its outputs once; views and allocations
    cost nothing. What a kernel uses beside its result is not counted, nor the memory of what existed before.

    Args:
        read: the value of every number of the device that the code reads on the host.
        selected: how many elements a boolean mask selects; None = all.

    Attributes:
        kernels: launches.
        bytes: read and written.
        flops: operations of matrix products, convolutions and attention; a multiplication and an addition are two.
        copies: places that copy between host and device.
        waits: places where the host waits for the device: blocking copies, and reads of what the device computed.
        host_constants: places where a tensor of the host is an operand beside tensors of the device.
        peak_bytes: largest total size of the storages made within.
        launch_ms: that the host needs for all launches.
        device_ms: that the kernels need, each by its bytes or its FLOPs, whichever takes longer.
        by_operator: kernels, bytes and milliseconds of each operator.
    """

    def __init__(self, *, read: float = 0.0, selected: int | None = None):
        super().__init__()
        self.read, self.selected = read, selected
        self._live = 0
        self._known: set[int] = set()
        self.reset()

    def reset(self) -> None:
        """Begin to count anew; what lives goes on to count as memory from here on only if it is made anew."""
        self.kernels = self.bytes = self.flops = self.peak_bytes = 0
        self.device_ms = 0.0
        self.copies: list[Place] = []
        self.waits: list[Place] = []
        self._last_read: tuple[str, int] | None = None
        self.host_constants: list[Place] = []
        self.by_operator: dict[str, Counter[str]] = {}
        self._base = self._live

    def second(self, call: Callable[[], Any]) -> Any:
        """Call twice, and count the second call only: a warm one."""
        call()
        self.reset()
        return call()

    @property
    def launch_ms(self) -> float:
        return 1e3 * S_PER_LAUNCH * self.kernels

    @property
    def predicted_ms(self) -> float:
        """Milliseconds by the roofline: launches or kernels, whichever take longer."""
        return max(self.launch_ms, self.device_ms)

    def __enter__(self) -> "Meter":
        if torch.cuda.is_available():
            raise RuntimeError(
                "Meter is for machines without a GPU: constants of a fake one would stay in caches for the real one."
            )
        with ExitStack() as stack:
            stack.enter_context(_FAKE)
            stack.enter_context(_AsOnAGPU())
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_Saved, _Saved.unpack))
            for name, replacement in _REPLACED.items():
                stack.enter_context(mock.patch(name, replacement))
            super().__enter__()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
        if composite and func.overloadpacket is not aten._fused_rms_norm:  # one kernel on a GPU
            with _Again(self):  # in inference mode composites come undecomposed
                return func.decompose(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not _is_fake(inputs, kwargs):
            with _disable_current_modes():
                return func(*args, **kwargs)
        there = [tensor for tensor in inputs if tensor.device.type == "cuda"]
        packet = func.overloadpacket
        if packet in _READS:
            return self._read(func, args, kwargs, there)
        if there and (packet in _SELECTS or (packet is aten.index and _has_mask(args[1]))):
            self._wait(func)
            result = self._select(packet, args)
        else:
            result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        made = [tensor for tensor in outputs if tensor.device.type == "cuda"]
        for tensor in made:
            self._track(tensor)
        if (there or made) and (len(there) < len(inputs) or (packet in _COPIES and len(made) < len(outputs))):
            self._mixed(func, packet, args, kwargs)
        if made or there:
            self._count(func, packet, args, kwargs, there, made, result)
        return result

    def _read(self, func: Any, args: Any, kwargs: Any, there: list[Tensor]) -> Any:
        """A number that the host asks for."""
        if there:
            # one copy makes a list of all numbers of a tensor, which a fake one is asked for one by one
            place = _line(), args[0].untyped_storage()._cdata
            if place != self._last_read:
                self._wait(func)
            self._last_read = place
        else:
            try:
                return func(*args, **kwargs)
            except DataDependentOutputException:
                pass  # of the host, but unknown here all the same
        dtype = args[0].dtype if func.overloadpacket is aten._local_scalar_dense else torch.bool
        return torch.tensor(self.read).to(dtype).tolist() if dtype.is_complex else _as(dtype, self.read)

    def _select(self, packet: Any, args: Any) -> Any:
        """What an operator gives whose size depends on values."""
        first = args[0]
        if packet is aten.nonzero:
            return first.new_empty((self._rows(first), first.dim()), dtype=torch.long)
        if packet is aten.masked_select:
            return first.new_empty((self._rows(args[1]),))
        if packet is aten._unique2:
            flat = first.new_empty(first.numel())
            return flat, first.new_empty(first.shape, dtype=torch.long), flat.new_empty(first.numel(), dtype=torch.long)
        if packet is aten.repeat_interleave:
            return first.new_empty(self.selected or first.numel(), dtype=torch.long)
        indices: list[Any] = []
        for index in args[1]:
            mask = index is not None and index.dtype in (torch.bool, torch.uint8)
            rows = (self._rows(index),) if mask else ()
            indices += [index.new_empty(rows, dtype=torch.long)] * index.dim() if mask else [index]
        return aten.index(first, indices)

    def _rows(self, mask: Tensor) -> int:
        return mask.numel() if self.selected is None else self.selected

    def _mixed(self, func: Any, packet: Any, args: Any, kwargs: Any) -> None:
        """Host and device in one operator: a copy, or a constant of the host."""
        if packet in _COPIES and not args[0].numel():
            return  # torch does nothing then
        place = Place(str(func), _line())
        if packet in _COPIES:
            self.copies.append(place)
            blocking = not (kwargs.get("non_blocking") or (packet is aten.copy_ and len(args) > 2 and args[2]))
            if blocking:
                self.waits.append(place)
            return
        self.host_constants.append(place)
        if packet in _LOOKUPS or packet is aten.index_put_:
            self.waits.append(place)

    def _wait(self, func: Any) -> None:
        self.waits.append(Place(str(func), _line()))

    def _track(self, tensor: Tensor) -> None:
        """Count a storage from its first tensor to its end."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self._live += size
        self.peak_bytes = max(self.peak_bytes, self._live - self._base)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size

    def _count(
        self, func: Any, packet: Any, args: Any, kwargs: Any, there: list[Tensor], made: list[Tensor], result: Any
    ) -> None:
        mutated = func._schema.is_mutable
        if packet in _FREE or func.is_view or (not mutated and made and _shares(made, there)):
            return
        read = sum(map(_size, there))
        if packet in _WRITES_ONLY:
            read -= _size(args[0])
        elif packet in _LOOKUPS and there:
            read = read - _size(there[0]) + sum(map(_size, made))
        moved = read + sum(map(_size, made))
        flops = 0
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=result)
        rate = FLOP_PER_S.get((there or made)[0].dtype, FLOP_PER_S[torch.float32])
        if packet in _CONVOLUTIONS and rate == FLOP_PER_S[torch.float32]:
            rate = CONVOLUTION_FLOP_PER_S
        elif "attention" in str(func):
            rate = min(rate, ATTENTION_FLOP_PER_S)
        kernels = sum(args[-1]) if packet is aten.convolution_backward else 1
        milliseconds = 1e3 * max(moved / BYTES_PER_S, flops / rate)
        self.kernels += kernels
        self.bytes += moved
        self.flops += flops
        self.device_ms += milliseconds
        self.by_operator.setdefault(str(func), Counter()).update(kernels=kernels, bytes=moved, ms=milliseconds)


class _Again(TorchDispatchMode):
    """A meter within its own handling of an operator, without what surrounds it."""

    def __init__(self, meter: Meter):
        super().__init__()
        self.meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.meter.__torch_dispatch__(func, types, args, kwargs)


class _AsOnAGPU(TorchFunctionMode):
    """The fused attention of a GPU, which torch chooses only where it finds one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.scaled_dot_product_attention and args[0].device.type == "cuda":
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        flash = aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if enable_gqa:
        key, value = (rows.repeat_interleave(query.shape[-3] // rows.shape[-3], -3) for rows in (key, value))
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -math.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = aten._scaled_dot_product_efficient_attention
    grad = torch.is_grad_enabled() and any(rows.requires_grad for rows in (query, key, value))
    return efficient(query, key, value, attn_mask, grad, dropout_p, is_causal, scale=scale)[0]


class _Saved:
    """A tensor that the graph keeps, until the node that needs it has run."""

    unpacked: ClassVar[list["_Saved"]] = []

    def __init__(self, tensor: Tensor):
        self.tensor: Tensor | None = tensor

    def unpack(self) -> Tensor | None:
        self.unpacked.append(self)
        return self.tensor

    @classmethod
    def end_of_node(cls, *, keep: bool) -> None:
        for saved in cls.unpacked:
            saved.tensor = saved.tensor if keep else None
        cls.unpacked.clear()


def run_backward(
    outputs: Sequence[Any],
    gradients: Sequence[Tensor | None],
    keep_graph: bool,
    create_graph: bool,
    inputs: Sequence[Any] = (),
    allow_unreachable: bool = False,
    accumulate_grad: bool = False,
) -> tuple[Tensor | None, ...]:
    """Run the nodes of a graph as torch's engine does, which asks for the streams of a GPU even for fake tensors.

    Hooks of tensors and nodes are not run.
    """
    edge = torch.autograd.graph.get_gradient_edge
    roots = [edge(tensor) for tensor in outputs]
    targets = [edge(tensor) for tensor in inputs]
    needed = _leading_to({target.node for target in targets}, [root.node for root in roots]) if targets else None
    pending: dict[Any, dict[int, Tensor]] = {}
    queue: list[tuple[int, int, Any]] = []
    tie = itertools.count()

    def arrive(node: Any, index: int, gradient: Tensor) -> None:
        if needed is not None and node not in needed:
            return
        expected = node._input_metadata[index]
        gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
        if node not in pending:
            pending[node] = {}
            heapq.heappush(queue, (-node._sequence_nr(), next(tie), node))
        present = pending[node].get(index)
        pending[node][index] = gradient if present is None else present + gradient

    results: list[Tensor | None] = [None] * len(targets)
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(create_graph))
        stack.enter_context(_AsOnAGPU())  # set aside by torch.autograd, wanted where a checkpoint recomputes
        stack.enter_context(mock.patch("torch._C._current_graph_task_id", partial(int, next(_TASKS))))
        for root, gradient in zip(roots, gradients):
            assert gradient is not None
            arrive(root.node, root.output_nr, gradient)
        while queue:
            node = heapq.heappop(queue)[2]
            found = pending.pop(node)
            for place, target in enumerate(targets):
                if target.node == node:
                    results[place] = found.get(target.output_nr)
            is_leaf = not node.next_functions
            if targets and is_leaf and not accumulate_grad:
                continue
            arguments = [found.get(index) for index in range(len(node._input_metadata))]
            answers = getattr(node, "apply", node)(*arguments)
            _Saved.end_of_node(keep=keep_graph)
            answers = answers if isinstance(answers, tuple) else (answers,)
            answer = None
            for (child, index), answer in zip(node.next_functions, answers):
                if child is not None and answer is not None:
                    arrive(child, index, answer)
            del found, arguments, answers, answer
    return tuple(results)


class _Generator(torch.Generator):
    """A generator of the host for any device: one for a GPU needs a GPU, and fake numbers need neither."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made = super().__new__(cls)
        made._device = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self._device


_LOAD = torch.load


def _load(*args: Any, **kwargs: Any) -> Any:
    with _disable_current_modes():
        return _LOAD(*args, **kwargs)


def _swap(first: Tensor, second: Tensor) -> None:
    """What `Module.to` does with fake parameters; torch's refuses them for weak references of the fake mode's own."""
    first.__dict__, second.__dict__ = second.__dict__, first.__dict__
    torch._C._swap_tensor_impl(first, second)


def _leading_to(targets: set[Any], roots: Sequence[Any]) -> set[Any]:
    """The nodes of a graph from which one of the targets can be reached."""
    parents: dict[Any, list[Any]] = {}
    stack, seen = list(roots), set(roots)
    while stack:
        node = stack.pop()
        for child, _ in node.next_functions:
            if child is not None:
                parents.setdefault(child, []).append(node)
                if child not in seen:
                    seen.add(child)
                    stack.append(child)
    stack, found = list(targets), set(targets)
    while stack:
        for parent in parents.get(stack.pop(), ()):
            if parent not in found:
                found.add(parent)
                stack.append(parent)
    return found


_REPLACED: dict[str, Any] = {
    "torch.autograd._engine_run_backward": run_backward,
    "torch.utils.swap_tensors": _swap,
    "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,  # autocast looks for a GPU
    "torch.cuda.is_bf16_supported": lambda: True,
    "torch.cuda.get_rng_state": lambda device: device,
    "torch.cuda.set_rng_state": lambda state, device: None,
    "torch.cuda.default_generators": (torch.Generator(),),
    "torch.Generator": _Generator,
    "torch.load": _load,  # it would give tensors without numbers
}


def _is_fake(inputs: Sequence[Tensor], kwargs: Any) -> bool:
    """Whether an operator concerns the fake device; the host goes on computing with numbers."""
    device = kwargs.get("device")
    return any(isinstance(tensor, FakeTensor) for tensor in inputs) or (
        device is not None and torch.device(device).type == "cuda"
    )


def _as(dtype: torch.dtype, value: float) -> Any:
    return bool(value) if dtype is torch.bool else value if dtype.is_floating_point else int(value)


def _size(tensor: Tensor) -> int:
    """Bytes of a tensor in memory: an expanded dimension has one element."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


def _shares(made: Sequence[Tensor], there: Sequence[Tensor]) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in there}
    return all(tensor.untyped_storage()._cdata in storages for tensor in made)


def _has_mask(indices: Sequence[Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)


def _frames() -> Iterator[Any]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _line() -> str:
    """The innermost line that is neither torch's nor of this file, with the last parts of its path."""
    torch_folder = str(Path(torch.__file__).parent)
    for frame in _frames():
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith((torch_folder, "<")) and "unittest/mock" not in file:
            return f"{'/'.join(Path(file).parts[-3:])}:{frame.f_lineno}"
    return "?"


def row(subject: Any) -> dict[str, Any]:
    """What a subject of `_meter_subjects` costs, or why it could not be metered."""
    found: dict[str, Any] = {"name": subject.name, "mode": subject.mode, "batch": subject.batch}
    try:
        with Meter(read=1.0, selected=subject.selected) as meter, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scores that are not there
            meter.second(subject.begin())
    except Exception as error:
        return found | {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return found | {
        "kernels": meter.kernels,
        "gigabytes": round(meter.bytes / 1e9, 3),
        "tflop": round(meter.flops / 1e12, 4),
        "waits": len(meter.waits),
        "peak_gib": round(meter.peak_bytes / 2**30, 3),
        "launch_ms": round(meter.launch_ms, 3),
        "device_ms": round(meter.device_ms, 3),
        "predicted_ms": round(meter.predicted_ms, 3),
        "images_per_s": round(1e3 * subject.batch / meter.predicted_ms, 1),
        "places": dict(Counter(map(str, meter.waits + meter.host_constants))),
    }


SIDE, BATCH = 512, 32
LIBRARIES = ("piq", "pytorch-msssim", "torchmetrics", "piqa", "kornia")


class Subject(NamedTuple):
    """One row: `begin()` makes, within a meter, the call that is metered warm.

    Attributes:
        name: name of the metric or network.
        mode: implementation, and how it is called.
        batch: number of images.
        begin: returns the call.
        selected: number of elements that a boolean mask selects; None = all.
    """

    name: str
    mode: str
    batch: int
    begin: Callable[[], Callable[[], Any]]
    selected: int | None = None


def subjects() -> Iterator[Subject]:
    """Formulas, rewards, their peers, and networks at full size; the quick ones first."""
    for name, function in OURS.items():
        yield Subject(name, "formula", BATCH, partial(_function, lambda f=function: f, name))
        if name in CATALOG:
            yield Subject(name, "reward", BATCH, partial(_reward, lambda n=name, **o: load(n, **o), False))
            if CATALOG[name].differentiable:
                yield Subject(name, "reward, gradient", BATCH, partial(_reward, lambda n=name, **o: load(n, **o), True))
        for peer in PEERS[name]:
            if peer.library in LIBRARIES:
                yield Subject(name, peer.library, BATCH, partial(_function, partial(_made, peer), name))
    nets = {"lpips": "alex", "lpips_vgg": "vgg", "stlpips": "alex", "dists": "vgg", "cvvdp": "", "quick": ""}
    for name, net in nets.items():
        for grad in (False, True):
            mode = "reward, gradient" if grad else "reward"
            yield Subject(name, mode, BATCH, partial(_reward, partial(_perceptual, name, net), grad))
    for name in CLIP:
        for grad in (False, True):
            make = partial(clip_reward, name, "cuda")
            yield Subject(name, "reward, gradient" if grad else "reward", BATCH, partial(_reward, make, grad))
    for batch in (1, 32):
        yield Subject("Q-Align, bfloat16", "reward", batch, partial(_network, _qalign, batch))
    tokens = (round(SIDE / 28) ** 2, (SIDE // 32) ** 2)
    yield Subject("Qwen2.5-VL-7B, bfloat16", "levels", 8, partial(_network, _qwen2_5, 8), 8 * tokens[0])
    yield Subject("Qwen3-VL-2B, bfloat16", "levels", 8, partial(_network, _qwen3, 8), 8 * tokens[1])


def _pictures(batch: int) -> torch.Tensor:
    return torch.rand(batch, 3, SIDE, SIDE, device="cuda")


def _made(peer: Peer) -> Callable[..., Any]:
    made = peer.make()
    for cell in getattr(made, "__closure__", None) or ():
        if isinstance(cell.cell_contents, torch.nn.Module):
            cell.cell_contents.to("cuda")
    return made


def _function(make: Callable[[], Callable[..., Any]], name: str) -> Callable[[], Any]:
    function = make()
    arguments = [_pictures(BATCH) for _ in range(1 if name in NO_REFERENCE else 2)]
    return torch.no_grad()(lambda: function(*arguments))


def _reward(make: Callable[..., Any], grad: bool) -> Callable[[], Any]:
    reward = make(**({"differentiable": True} if grad else {}))
    images, references = _pictures(BATCH).requires_grad_(grad), _pictures(BATCH)
    prompts = ["a cat"] * BATCH

    def call() -> None:
        scores = reward(images, references=references, prompts=prompts)
        if grad:
            torch.autograd.grad(scores.sum(), images)

    return call


def _perceptual(name: str, net: str, **options: Any) -> Any:
    import torchvision.models

    from iqareward import DISTSReward, LPIPSReward
    from iqareward.rewards import STLPIPSReward

    if not net:
        return load(name, device="cuda", **options)
    if name == "stlpips":
        return STLPIPSReward(net, device="cuda", **options)
    function = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[net]
    with torch.device("meta"):
        whole = function(weights=None).state_dict()
    # not in the folder's own lifetime: the reward reads it at its first call
    file = Path(tempfile.mkdtemp()) / net
    torch.save({key: torch.rand(value.shape) for key, value in whole.items() if key.startswith("features.")}, file)
    if name == "dists":
        return DISTSReward(weights=file, device="cuda", **options)
    return LPIPSReward(net, weights=file, device="cuda", **options)


# Patch, widths, depths and heads of the image and text models, and width of the features.
_B, _L, _H = ((768, 12, 12, 512, 12, 8, 512), (1024, 24, 16, 768, 12, 12, 768), (1280, 32, 16, 1024, 24, 16, 1024))
CLIP = {
    "clipscore": (32, *_B),
    "clipiqa": (16, *_B),
    "laion_aesthetic": (14, *_L),
    "pickscore": (14, *_H),
    "hpsv2": (14, *_H),
}


def clip_reward(name: str, device: str, **options: Any) -> Any:
    """A reward of CLIP whose networks have the published sizes and random weights."""
    reward: Any = load(name, device=device, **options)
    reward.model_loader = LazyModel(partial(_clip_network, name), device, name=name)
    return reward


def _clip_network(name: str, device: torch.device) -> torch.nn.Module:
    import transformers

    from iqareward.rewards.clip.network import Network
    from iqareward.rewards.owl2.preprocess import CLIP_MEAN, CLIP_STD
    from tests.rewards.clip_tiny import tokenizer

    patch, width, depth, heads, text_width, text_depth, text_heads, features = CLIP[name]
    both = {"projection_dim": features, "hidden_act": "gelu" if width == 1280 else "quick_gelu"}
    vision = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads, "patch_size": patch}
    text = {"hidden_size": text_width, "num_hidden_layers": text_depth, "num_attention_heads": text_heads}
    config = transformers.CLIPConfig(
        vision_config=vision | both | {"intermediate_size": 4 * width},
        text_config=text | both | {"intermediate_size": 4 * text_width},
        projection_dim=features,
    )
    with device:
        model = transformers.CLIPModel(config)
        sizes = (features, 1024, 128, 64, 16, 1)
        head = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))
    return Network(model, (CLIP_MEAN, CLIP_STD), tokenizer(), head)


def _network(make: Callable[[int], Any], batch: int) -> Callable[[], Any]:
    reward, images = make(batch), _pictures(batch)
    return lambda: reward(images)


def _qalign(batch: int) -> Any:
    from benchmarks.bench_qalign import random_model
    from iqareward import QAlignReward
    from iqareward.rewards.owl2.network import Owl2Config

    model = random_model(Owl2Config(), torch.device("cuda", 0), torch.bfloat16)
    return QAlignReward(model, scale="mos", batch_size=batch)


def _qwen2_5(batch: int) -> Any:
    from benchmarks.bench_vlm import qwen_config, random_pair
    from iqareward import LevelReward

    pair = random_pair(qwen_config(), torch.device("cuda", 0), torch.bfloat16)
    return LevelReward(pair, device="cuda", dtype=torch.bfloat16, batch_size=batch)


def _qwen3(batch: int) -> Any:
    import transformers

    from iqareward import LevelReward
    from tests.vlm import tiny

    processor = tiny.processor("qwen3_vl")
    processor.image_processor.size = {"shortest_edge": 64**2, "longest_edge": 16384 * 32**2}
    config = tiny.config("qwen3_vl", processor.tokenizer)
    text = {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_parameters": {
            "rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "hidden_size": 1024, "intermediate_size": 4096, "depth": 24, "num_heads": 16, "out_hidden_size": 2048,
        "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
    }  # fmt: skip
    config = transformers.Qwen3VLConfig(
        text_config=config.text_config.to_dict() | text, vision_config=config.vision_config.to_dict() | vision,
        **{key: getattr(config, key) for key in ("image_token_id", "video_token_id", "vision_start_token_id",
                                                 "vision_end_token_id")},
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda", 0):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)
    pair = model.requires_grad_(False).eval(), processor
    return LevelReward(pair, device="cuda", dtype=torch.bfloat16, batch_size=batch)


def main() -> None:
    """Print a row for each subject as it comes, and end with one line of JSON."""
    from benchmarks._harness import document, finish

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="subjects whose name contains this")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    options = parser.parse_args()
    rows = []
    for subject in subjects():
        if options.only in subject.name:
            rows.append(row(subject))
            print("  ".join(f"{key}={value}" for key, value in rows[-1].items() if key != "places"), flush=True)
    packages = ["transformers", "piq", "pytorch-msssim", "torchmetrics", "piqa", "kornia"]
    record = document("meter", rows, [], packages) | {"hardware": "predicted for an NVIDIA H100 80GB"}
    finish(record, options.output)


if __name__ == "__main__":
    main()
