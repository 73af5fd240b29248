"""Gradients of every full-reference metric: right where they exist, finite everywhere."""

import pytest
import torch
from torch import Tensor

from tests.functional.pairs import METRIC, METRICS, textured

PAIRS = {
    "identical": lambda a, b: (b, b),
    "flat": lambda a, b: (torch.full_like(a, 0.3), torch.full_like(b, 0.7)),
    "flat identical": lambda a, b: (torch.full_like(a, 0.5), torch.full_like(b, 0.5)),
    "black": lambda a, b: (torch.zeros_like(a), torch.zeros_like(b)),
    "black image": lambda a, b: (torch.zeros_like(a), b),
    "black reference": lambda a, b: (a, torch.zeros_like(b)),
    "inverted": lambda a, b: (1 - b, b),
    "half flat": lambda a, b: (torch.cat((a[..., :80], torch.full_like(a[..., 80:], 0.5)), -1), b),
    "ordinary": lambda a, b: (a, b),
}


@METRIC
@pytest.mark.parametrize("case", PAIRS)
def test_gradients_are_finite(name: str, case: str) -> None:
    """The gradient is finite where square roots, fractional powers and ratios have their traps."""
    metric = METRICS[name][0]
    images, references = PAIRS[case](*(side.float() for side in textured(7, 2)))
    images, references = images.clone().requires_grad_(), references.clone().requires_grad_()
    gradients = torch.autograd.grad(metric(images, references).sum(), (images, references))
    assert all(gradient.isfinite().all() for gradient in gradients)
    if case == "ordinary":
        assert all((gradient != 0).any() for gradient in gradients)


@METRIC
def test_gradients_of_photographs_are_finite(name: str, photographs: Tensor, degraded_photographs: Tensor) -> None:
    """Ordinary photographs, with their clipped and flat areas, give finite gradients that point uphill."""
    metric, _, _, higher = METRICS[name]
    images = degraded_photographs.clone().requires_grad_()
    scores = metric(images, photographs)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.isfinite().all()
    step = 1e-3 * gradient / gradient.flatten(1).norm(dim=1)[:, None, None, None]
    moved = metric(degraded_photographs.double() + (step if higher else -step).double(), photographs.double())
    assert ((moved > scores.double()) == higher).all()


@METRIC
def test_gradcheck(name: str) -> None:
    """The analytic gradient equals the numerical one in fp64, along a random direction of pixel space."""
    metric = METRICS[name][0]
    images, references = textured(8, 2, 162, 161)
    rng = torch.Generator().manual_seed(9)
    direction = torch.randn(images.shape, generator=rng, dtype=torch.float64)

    def along(step: Tensor) -> Tensor:
        return metric(images + step * direction, references - 0.5 * step * direction)

    step = torch.full((1,), 0.01, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(along, (step,), eps=1e-7, atol=1e-5, rtol=1e-4)
