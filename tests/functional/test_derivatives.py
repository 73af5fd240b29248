"""Rounded and clamped values have one derivative, whichever of torch's ways asks for it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from iqareward.diffusion import clamp_straight_through
from iqareward.functional import ssim
from iqareward.functional.resize import pillow_resize

RNG = torch.Generator().manual_seed(0)
IMAGES = torch.rand(3, 3, 12, 14, generator=RNG, dtype=torch.float64).float() * 0.8 + 0.1
WEIGHTS = torch.rand(3, 12, 14, generator=RNG)
TANGENT = torch.randn(IMAGES.shape, generator=RNG)
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


def _clamped(image: Tensor) -> Tensor:
    return (clamp_straight_through(3 * image - 1) ** 3 * WEIGHTS).sum()


def _resized(image: Tensor) -> Tensor:
    return (pillow_resize(image[None], (5, 9)) ** 3 * WEIGHTS[:, :5, :9]).sum()


def _luma8(image: Tensor) -> Tensor:
    return ssim(image[None], WEIGHTS[None], color="luma8")[0]


FUNCTIONS = pytest.mark.parametrize("function", [_clamped, _resized, _luma8])


def _by_backward(function: Callable[[Tensor], Tensor]) -> Tensor:
    images = IMAGES.clone().requires_grad_()
    torch.stack([function(image) for image in images]).sum().backward()
    assert images.grad is not None
    return images.grad


@FUNCTIONS
def test_function_transforms(function: Callable[[Tensor], Tensor]) -> None:
    """`torch.func.grad`, alone, under `vmap` and around it, gives what `backward` gives."""
    expected = _by_backward(function)
    assert (expected != 0).float().mean() > 0.5
    func = torch.func
    torch.testing.assert_close(torch.stack([func.grad(function)(image) for image in IMAGES]), expected, **CLOSE)
    torch.testing.assert_close(func.vmap(func.grad(function))(IMAGES), expected, **CLOSE)
    torch.testing.assert_close(func.grad(lambda images: func.vmap(function)(images).sum())(IMAGES), expected, **CLOSE)


@FUNCTIONS
@pytest.mark.parametrize("enabled", [True, False])
def test_forward_mode(function: Callable[[Tensor], Tensor], enabled: bool) -> None:
    """The tangent is the product with the gradient, also where `no_grad` holds."""
    expected = (_by_backward(function) * TANGENT)[0].sum()
    value = function(IMAGES[0])
    with torch.set_grad_enabled(enabled):
        found, tangent = torch.func.jvp(function, (IMAGES[0],), (TANGENT[0],))
    torch.testing.assert_close(tangent, expected, **CLOSE)
    torch.testing.assert_close(found, value, rtol=0.0, atol=0.0)


@FUNCTIONS
def test_values_do_not_depend_on_gradients(function: Callable[[Tensor], Tensor]) -> None:
    """With and without a gradient the values are the same to the bit."""
    with torch.no_grad():
        expected = function(IMAGES[0])
    found = function(IMAGES[0].clone().requires_grad_())
    torch.testing.assert_close(found.detach(), expected, rtol=0.0, atol=0.0)


def test_second_derivative() -> None:
    """The gradient of the gradient of a cube is 6 times its clamped value."""
    pixels = torch.tensor([1.5, 0.2], requires_grad=True)
    (first,) = torch.autograd.grad((clamp_straight_through(pixels) ** 3).sum(), pixels, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), pixels)
    torch.testing.assert_close(second, torch.tensor([6.0, 1.2]))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend: str) -> None:
    """The compiler traces it in one graph, with the same gradient."""
    pixels = torch.tensor([1.5, 0.2], requires_grad=True)
    torch._dynamo.reset()
    (torch.compile(clamp_straight_through, backend=backend, fullgraph=True)(pixels) ** 2).sum().backward()
    torch.testing.assert_close(pixels.grad, torch.tensor([2.0, 0.4]))
