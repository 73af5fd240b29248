"""Weights are loaded onto the right GPU whatever the thread, are there before they are read, leave it and come back."""

import asyncio
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from iqareward import MicroBatched, Overlapped
from iqareward.adapters.reward_models import HPSv3Model
from iqareward.adapters.trl import AsyncTRLReward, TRLReward
from iqareward.adapters.verl import compute_score
from iqareward.rewards.loading import HostCopy, LazyModel, as_current
from iqareward.rewards.owl2 import checkpoints
from iqareward.rewards.owl2.preprocess import preprocess
from iqareward.rewards.owl2.rewards import QAlignReward
from iqareward.rewards.vlm import checkpoints as vlm_checkpoints
from iqareward.rewards.vlm.rewards import LevelReward
from tests.gpu import needs_cuda, no_waits, on_devices
from tests.owl2.owl2_tiny import SMALL, seeded_model
from tests.rewards.counting import Brightness, flat
from tests.tolerances import EXACT, FORMULA_FP32


class Machine:
    """Eight GPUs of which nothing but the current device and the current stream of each thread is there.

    Attributes:
        diary: what streams were told, in order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.diary: list[tuple[Any, ...]] = []
        self._thread = threading.local()
        self._streams: dict[int, Any] = {}
        self.in_use, main = True, threading.main_thread()
        for name, value in {
            "is_available": lambda: True,
            "is_initialized": lambda: self.in_use,
            "device_count": lambda: 8,
            "current_device": lambda: getattr(self._thread, "device", 3 if threading.current_thread() is main else 0),
            "device": self._device,
            "current_stream": lambda device: self._streams.setdefault(threading.get_ident(), Stream(self)),
            "Event": lambda **_: "an event",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def _device(self, device: torch.device) -> Iterator[None]:
        self._thread.device = device.index
        yield
        del self._thread.device


class Stream:
    """Writes down what it is told."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.name = threading.current_thread().name

    def record_event(self, event: Any) -> Any:
        self._machine.diary.append((self.name, "marks"))
        return self.name

    def wait_event(self, event: Any) -> None:
        self._machine.diary.append((self.name, "waits for", event))

    def wait_stream(self, stream: Any) -> None:
        self._machine.diary.append((self.name, "waits for", stream.name))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


BUILDS: list[str] = []


def build(device: torch.device) -> nn.Module:
    BUILDS.append(str(device))
    return nn.Linear(2, 2)


@pytest.fixture(autouse=True)
def fresh() -> None:
    BUILDS.clear()


def in_a_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1, thread_name_prefix="another") as pool:
        return pool.submit(call).result()


class Judge(Brightness):
    """Has weights, and scores wherever images are."""

    def __init__(self, device: str | None = "cuda") -> None:
        super().__init__()
        self.loader = LazyModel(build, device, name="brightness")

    def __call__(self, images: Any, *arguments: Any, **keywords: Any) -> Tensor:
        self.loader.ready(images[0])
        return super().__call__(images)


CALLS = {
    "a thread of the trainer's": lambda reward: in_a_thread(lambda: reward(flat(0.5))),
    "Overlapped": lambda reward: Overlapped(reward)(flat(0.5)),
    "MicroBatched": lambda reward: MicroBatched(reward)(flat(0.5)),
}


@pytest.mark.parametrize("call", CALLS)
def test_cuda_is_the_gpu_of_the_thread_that_makes_the_reward(call: str, machine: Machine) -> None:
    """A new thread's current device is GPU 0, where the judges of all eight ranks would meet."""
    CALLS[call](Judge())
    assert BUILDS == ["cuda:3"]


def test_foreign_code_that_says_cuda_gets_the_same_gpu(machine: Machine) -> None:
    """While it builds a network and while it computes, some of pyiqa's metrics call `.cuda()` in whatever thread."""
    seen = []
    loader = LazyModel(lambda device: seen.append(torch.cuda.current_device()) or nn.Linear(2, 2), "cuda")

    def score() -> None:
        loader.ready()
        with as_current(loader.device):
            seen.append(torch.cuda.current_device())
        seen.append(torch.cuda.current_device())

    in_a_thread(score)
    assert seen == [3, 3, 0]
    machine.in_use = False  # a network may be the first to use CUDA
    LazyModel(lambda device: seen.append(torch.cuda.current_device()) or nn.Linear(2, 2), "cuda:6").get()
    assert seen[3:] == [6]


@pytest.mark.parametrize("device", ["cuda", None])
def test_multimodal_judges_too(device: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name, and where CUDA is the default; the weights of these are on the CPU, only what they are told counts."""
    tiny = pytest.importorskip("tests.vlm.tiny", reason="the extra `vlm` is not installed")

    def load(*_: Any, device: torch.device, **__: Any) -> Any:
        BUILDS.append(str(device))
        return seeded_model(SMALL)

    def load_vlm(*_: Any, device: torch.device, **__: Any) -> Any:
        BUILDS.append(str(device))
        return tiny.pair("qwen2_5_vl")

    images = torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    LevelReward(tiny.pair("qwen2_5_vl"))(images)  # imports that look for GPUs
    monkeypatch.setattr(checkpoints, "load_owl2", load)
    monkeypatch.setattr(vlm_checkpoints, "load_model", load_vlm)
    Machine(monkeypatch)
    for reward in (QAlignReward("a/b", device=device), LevelReward("a/b", device=device)):
        assert isinstance(in_a_thread(lambda reward=reward: reward.model), nn.Module)
    assert BUILDS == ["cuda:3", "cuda:3"]


def test_the_first_images_tell_if_nothing_else_does(machine: Machine) -> None:
    """Where CUDA was not in use when the reward was made; without them only the main thread knows its GPU."""
    machine.in_use = False
    loaders = [LazyModel(build, "cuda", name="the judge") for _ in range(4)]
    in_a_thread(lambda: loaders[3].ready(flat(0.5)))  # nobody has chosen a GPU
    machine.in_use = True
    with FakeTensorMode():
        images = torch.zeros(1, 3, 4, 4, device="cuda:5")
    in_a_thread(lambda: loaders[0].ready(images))
    with pytest.raises(RuntimeError, match=r"the judge expected to know which of 8 GPUs .* device=accelerator.device"):
        in_a_thread(lambda: loaders[1].ready(flat(0.5)))
    loaders[2].ready(flat(0.5))
    assert BUILDS == ["cuda:0", "cuda:5", "cuda:3"]


def test_what_is_derived_follows_a_network_that_another_reward_moves() -> None:
    """Two rewards share a network; what one computed from weights that the other has moved is computed again."""
    network, made = nn.Linear(2, 2), list[str]()
    mover, other = (LazyModel(lambda _: network, is_built=True) for _ in range(2))

    def derive(found: nn.Module) -> int:
        made.append("derived")
        return id(found)

    mover.get()
    assert other.derived("graph", derive) == other.derived("graph", derive) == id(network)
    assert len(made) == 1
    for move in (mover.offload, mover.onload, lambda: mover.to("cpu")):
        move()
    assert other.derived("graph", derive) == other.derived("graph", derive) == id(network)
    assert len(made) == 2


def test_cuda_after_pickling_and_moving(machine: Machine) -> None:
    """A copy goes by the thread that unpickles it, `to` by the one that calls it; a given index always stays."""
    in_a_thread(lambda: pickle.loads(pickle.dumps(LazyModel(build, "cuda")))).get()
    moved = LazyModel(build, "cpu")
    moved.to("cuda")
    in_a_thread(moved.get)
    in_a_thread(pickle.loads(pickle.dumps(moved)).get)
    in_a_thread(LazyModel(build, "cuda:6").get)
    assert BUILDS == ["cuda:0", "cuda:3", "cuda:3", "cuda:6"]


ADAPTERS = {
    "trl": lambda: partial(
        AsyncTRLReward(TRLReward(Brightness(), "restored", device="cuda")),
        completions=["a"],
        restored=[torch.zeros(3, 4, 4)],
    ),
    "reward_models": lambda: partial(HPSv3Model(Brightness(), device="cuda").reward, ["a.png"], [""]),
}


@pytest.mark.parametrize(("device", "expected"), [("cuda", "cuda:0"), ("cuda:6", "cuda:6")])
def test_an_adapter_goes_by_the_thread_that_unpickles_it(
    device: str, expected: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the reward in it does, which on another rank is on another GPU."""
    seen = []
    monkeypatch.setattr(
        "iqareward.adapters._core.to_images",
        lambda images, device, **_: seen.append(str(device)) or torch.stack(images),
    )
    made = pickle.dumps(TRLReward(Brightness(), "restored", device=device))
    copied = in_a_thread(lambda: pickle.loads(made))
    copied(completions=["a"], restored=[torch.zeros(3, 4, 4)])
    assert seen == [expected]


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_move_images_to_the_gpu_of_the_thread_that_makes_them(
    adapter: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trainers call them in threads; TRL's asynchronous rewards run in a loop on a thread, and score in yet another."""
    seen = []
    monkeypatch.setattr(
        "iqareward.adapters._core.to_images",
        lambda images, device, **_: seen.append(str(device)) or torch.zeros(len(images), 3, 4, 4),
    )
    call = ADAPTERS[adapter]()

    def run() -> Any:
        scores = call()
        return asyncio.run(scores) if asyncio.iscoroutine(scores) else scores

    assert in_a_thread(run)[0] == 0
    assert seen == ["cuda:3"]


def test_verls_function_stays_on_the_gpu_of_its_first_call(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray runs it in a background thread, and the first call may be the first to use CUDA."""
    seen = []
    monkeypatch.setattr(
        "iqareward.adapters._core.to_images",
        lambda images, device, **_: seen.append(str(device)) or torch.zeros(1, 3, 4, 4),
    )
    machine.in_use, reward = False, Brightness()
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    for _ in range(2):
        in_a_thread(lambda: asyncio.run(compute_score(solution_image=image, reward=reward, device="cuda")))
        machine.in_use = True
    assert seen == ["cuda:0", "cuda:0"]


def test_weights_are_read_when_they_are_there(machine: Machine) -> None:
    """A second thread's stream waits for the first's, once, for weights and for what was computed from them."""
    loader = LazyModel(build, "cuda")
    with ThreadPoolExecutor(1, "a") as a, ThreadPoolExecutor(1, "b") as b:
        for thread in (a, b, b, a):
            thread.submit(loader.ready).result()
        assert machine.diary == [("a_0", "marks"), ("b_0", "waits for", "a_0")]
        machine.diary.clear()
        values = [thread.submit(loader.derived, "sum", total).result() for thread in (b, a, a)]
        assert machine.diary == [("b_0", "marks"), ("a_0", "waits for", "b_0")]
        machine.diary.clear()
        # Their memory belongs to the streams that made them, which must not reuse it while others read.
        loader.to("cpu")
        assert machine.diary[0] == ("MainThread", "waits for", "a_0")  # a copy reads them as well
        told = {maker: {reader for name, _, reader in machine.diary if name == maker} for maker in ("a_0", "b_0")}
        assert told == {"a_0": {"b_0", "MainThread"}, "b_0": {"a_0"}}
    assert values == [total(loader.get())] * 3
    assert loader.derived("sum", total) is not values[0]  # computed again from the weights that have moved


@on_devices
def test_constants_are_there_for_every_stream(device: str) -> None:
    """Those that one thread copies to the GPU behind other work are read at once, and right, on another's stream."""
    images = torch.rand(2, 3, 37, 53, generator=torch.Generator().manual_seed(0))
    expected = preprocess(images, 29)
    there = images.to(device)
    if device == "cuda":
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(200_000_000)
            preprocess(there, 29)
        with torch.cuda.stream(torch.cuda.Stream()):
            found = preprocess(there, 29)
        torch.cuda.synchronize()
    else:
        found = in_a_thread(lambda: preprocess(there, 29))
    torch.testing.assert_close(found.cpu(), expected, **FORMULA_FP32)


def total(network: nn.Module) -> Tensor:
    return network.get_parameter("weight").sum()


def quantized() -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization", reason="the extra `quant` is not installed")
    network = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2)).requires_grad_(False)
    torchao.quantize_(network[0], torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    return network


def varied() -> nn.Module:
    """Tied weights, a buffer, a scalar, an empty tensor, another dtype and another memory format."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(5, 5), nn.Linear(5, 5))
    network[2].weight = network[1].weight
    for name, value in {"a": torch.rand(5).bfloat16(), "b": torch.tensor(2.0), "c": torch.zeros(0, 3)}.items():
        network.register_buffer(name, value)
    return network.requires_grad_(False)


@on_devices
@pytest.mark.parametrize("make", [varied, quantized, lambda: seeded_model(SMALL)])
def test_weights_come_back_as_they_were(make: Callable[[], nn.Module], device: str) -> None:
    """Bit by bit, as often as they leave, in the same parameters; quantised and tied ones too."""
    network = make().to(device)
    where = next(network.parameters()).device
    before = {name: (value.clone(), value.stride()) for name, value in network.state_dict().items()}
    parameters = dict(network.named_parameters())
    copy = HostCopy(network, where)
    for _ in range(2):
        assert copy.is_current(network)
        copy.offload()
        assert network.state_dict().keys() == before.keys()
        copy.onload()
        assert all(value is parameters[name] for name, value in network.named_parameters())
        for name, value in network.state_dict().items():
            assert value.stride() == before[name][1]
            assert torch.equal(_plain(value), _plain(before[name][0]))


def _plain(value: Tensor) -> Tensor:
    return value.dequantize() if hasattr(value, "qdata") else value


class Wrapped(torch.Tensor):
    """A weight as torchao makes them: its numbers are another tensor's, its device is its own."""

    def __new__(cls, part: Tensor, device: Any = None) -> "Wrapped":
        made = torch.Tensor._make_wrapper_subclass(cls, part.shape, dtype=part.dtype, device=device or part.device)
        made.part = part
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["part"], None

    @classmethod
    def __tensor_unflatten__(cls, parts: dict[str, Tensor], *_: Any) -> "Wrapped":
        return cls(parts["part"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> "Wrapped":
        assert function is torch.ops.aten.detach.default
        return cls(args[0].part, args[0].device)


def test_a_quantised_weight_moves_with_its_numbers() -> None:
    """It says that it is where they are, as those do that are not quantised; otherwise not even a state can be read."""
    network, part = nn.Module(), torch.ones(2)
    network.register_parameter("weight", nn.Parameter(Wrapped(Wrapped(part, "cuda"), "cuda"), requires_grad=False))
    weight = network.weight
    copy = HostCopy(network, torch.device("cpu"))
    for move in (copy.offload, copy.onload):
        move()
        assert network.weight is weight
        assert weight.part.part is part
        assert (weight.device.type, weight.part.device.type) == ("cpu", "cpu")


def test_a_copy_knows_when_weights_have_changed() -> None:
    """Written to in place or replaced: what comes back must not be what was there before."""
    for change in (
        lambda network: network.weight.add_(1),
        lambda network: network.load_state_dict({"weight": torch.ones(2, 2), "bias": torch.ones(2)}),
        lambda network: network.half(),
        lambda network: network.register_buffer("more", torch.ones(1)),
    ):
        network = nn.Linear(2, 2).requires_grad_(False)
        copy = HostCopy(network, torch.device("cpu"))
        copy.offload()
        copy.onload()
        assert copy.is_current(network)
        change(network)
        assert not copy.is_current(network)


@pytest.mark.gpu
@needs_cuda
def test_gpu_memory_leaves_and_comes_back_without_waits() -> None:
    """The second time nothing is copied to the host, nothing waits, and streams that still read get what they read."""
    loader = LazyModel(lambda device: nn.Linear(2**12, 2**12, bias=False, device=device), "cuda")
    images, stream = torch.rand(64, 2**12, device="cuda"), torch.cuda.Stream()
    expected = loader.ready()(images)
    loader.offload()
    loader.onload()
    torch.testing.assert_close(loader.ready()(images), expected, **EXACT)
    torch.cuda.synchronize()
    with no_waits():
        with torch.cuda.stream(stream):
            torch.cuda._sleep(200_000_000)
            late = loader.ready()(images)
        held = torch.cuda.memory_allocated()  # now, because cuBLAS keeps 32 MiB for a new stream
        loader.offload()
        assert held - torch.cuda.memory_allocated() >= 2**26
        overwritten = torch.zeros(2**12, 2**12, device="cuda")
        loader.onload()
        again = loader.ready()(images)
    torch.cuda.synchronize()
    torch.testing.assert_close(again, expected, **EXACT)
    torch.testing.assert_close(late, expected, **EXACT)
    assert not overwritten.any()
    assert all(weight.is_cuda for weight in loader.get().parameters())
