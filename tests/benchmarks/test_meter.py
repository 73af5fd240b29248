"""The meter against what can be counted by hand, and its backward pass against torch's."""

import doctest
from unittest import mock

import pytest
import torch
from torch import nn

from benchmarks import meter as module
from benchmarks.meter import Meter, run_backward
from tests.gpu import fake_gpu

pytestmark = fake_gpu
SIDE = 64


def test_a_product_is_one_kernel() -> None:
    """Kernels, bytes and FLOPs are those of the shapes, and views are free."""
    with Meter() as meter:
        left, right = (torch.empty(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        left @ right.t()[:, : SIDE // 2].view(SIDE, -1)
    assert (meter.kernels, meter.flops) == (1, SIDE**3)
    assert meter.bytes == 2 * SIDE * (SIDE + SIDE // 2 + SIDE // 2)
    assert meter.predicted_ms == meter.launch_ms > meter.device_ms


def test_memory_lives_as_long_as_its_last_view() -> None:
    """The peak counts a storage from its first tensor to the end of its last view."""
    with Meter() as meter:
        first = torch.zeros(SIDE, device="cuda")
        view = first[1:]
        del first
        second = view + 1
        del view, second
        torch.zeros(SIDE, device="cuda")
    assert meter.peak_bytes == 4 * (SIDE + SIDE - 1)


WAITS = {
    "item": lambda x: x.sum().item(),
    "branch": lambda x: bool((x > 0).all()),
    "equal": lambda x: torch.equal(x, x),
    "mask": lambda x: x[x > 0],
    "nonzero": lambda x: (x > 0).nonzero(),
    "unique": lambda x: x.unique(),
    "list": lambda x: x[[0, 1]],
    "tuple": lambda x: x[..., (0, -1)],
    "indices of the host": lambda x: x[torch.arange(2)],
    "constant": lambda x: x * torch.tensor([2.0], device=x.device),
    "to the host": lambda x: x.cpu(),
}
FREE = {
    "arithmetic": lambda x: x * 2 + x.mean(),
    "slice": lambda x: x[..., ::3],
    "masked fill": lambda x: x.masked_fill(x > 0, 1.0),
    "made there": lambda x: x + torch.arange(SIDE, device=x.device),
    "not blocking": lambda x: torch.zeros(3).to(x.device, non_blocking=True),
}


@pytest.mark.parametrize("name", [*WAITS, *FREE])
def test_waits_are_found_where_they_are(name: str) -> None:
    """Each way of waiting is counted once, with this file as its place; what does not wait is not counted."""
    with Meter() as meter:
        images = torch.rand(SIDE, SIDE, device="cuda")
        meter.reset()
        (WAITS | FREE)[name](images)
    assert len(meter.waits) == (name in WAITS)
    assert all("test_meter.py:" in wait.line for wait in meter.waits)


def test_a_constant_of_the_host_is_found() -> None:
    """Without a wait too: torch hands a number to the kernel."""
    with Meter() as meter:
        torch.rand(SIDE, device="cuda") * torch.tensor(2.0)
    assert [str(constant)[:10] for constant in meter.host_constants] == ["aten.mul.T"]


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.GELU(), nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 3, groups=2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(512, 4))


def loss_of(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    answers = model(images)
    return ((answers.softmax(1)[:, :2] * torch.arange(2.0)).sum(1) ** 2 + answers[:, 0].exp()).mean()


def test_gradients_are_those_of_torch() -> None:
    """The backward pass of the meter runs the same nodes in the same order, for one tensor and for all parameters."""
    model, images = network(), torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    wanted = [images, *model.parameters()]
    expected = torch.autograd.grad(loss_of(model, images), wanted)
    with mock.patch("torch.autograd._engine_run_backward", run_backward):
        found = torch.autograd.grad(loss_of(model, images), wanted)
        loss_of(model, images).backward()
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close([tensor.grad for tensor in wanted], [*expected], rtol=0, atol=0)


def test_gradients_are_metered() -> None:
    """Kernels of the backward pass count, and the graph's memory ends with the node that needs it."""
    with Meter() as meter:
        images = torch.rand(SIDE, device="cuda", requires_grad=True)
        chain = images
        for _ in range(3):
            chain = chain.exp()
        forward = meter.kernels
        (gradient,) = torch.autograd.grad(chain, images, torch.ones_like(chain))
        del chain
    assert meter.kernels == forward + 1 + 3
    assert gradient.shape == images.shape
    assert (
        meter.peak_bytes == 4 * SIDE * 7
    )  # images, three results, the gradient that was given, and two that were computed


def test_the_example_of_the_meter_runs() -> None:
    """What its docstring shows is so."""
    assert doctest.testmod(module).failed == 0
