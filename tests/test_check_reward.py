"""The public check passes good rewards and names what is wrong with bad ones."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from iqareward import FullReference, NoReference, check_reward
from iqareward.testing import RewardContractError


def contrast(images: Tensor) -> Tensor:
    return images.var(dim=(1, 2, 3))


def error(images: Tensor, references: Tensor) -> Tensor:
    return (images - references).square().mean(dim=(1, 2, 3))


IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.05
FLAT = IMAGES * 0.5 + 0.25


@pytest.mark.parametrize("differentiable", [False, True])
def test_good_rewards_pass(differentiable: bool) -> None:
    """A correct reward passes every check that applies, and the report reads as a list."""
    report = check_reward(
        NoReference(contrast, higher_is_better=True, differentiable=differentiable), IMAGES, degraded=FLAT
    )
    assert not report.failed
    assert [title for title, _ in report.skipped] == ["refuses missing references"]
    assert str(report).count("  ok  ") == len(report.passed) == 16
    reward = FullReference(error, higher_is_better=False, bounds=(-1.0, 0.0), differentiable=differentiable)
    assert not check_reward(reward, IMAGES, FLAT, degraded=1 - IMAGES).failed


class Plain:
    """A reward with one fault, given by a function from images to scores."""

    name, needs_references, needs_prompts, differentiable, bounds = "plain", False, False, False, (None, None)

    def __init__(self, score: Callable[[Tensor], Tensor]) -> None:
        self.score = score

    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        rows = [torch.as_tensor(image) for image in images]
        if not rows:
            return torch.zeros(0)
        if len({row.shape for row in rows}) > 1:
            return torch.cat([self([row]) for row in rows])
        return self.score(torch.stack(rows))


def batch_mean(images: Tensor) -> Tensor:
    return contrast(images.float().detach()) - images.float().detach().mean()


def scalar(images: Tensor) -> Tensor:
    return contrast(images.float().detach()).squeeze()


def half(images: Tensor) -> Tensor:
    return contrast(images.detach()).float()  # in whatever dtype comes in


def zero_for_broken(images: Tensor) -> Tensor:
    return contrast(images.float().detach()).nan_to_num(0.0)


def everyone_pays(images: Tensor) -> Tensor:
    return contrast(images.float().detach()) + images.float().detach().sum() * 0


def leaks_graph(images: Tensor) -> Tensor:
    return contrast(images.float())


def random_each_time(images: Tensor) -> Tensor:
    return contrast(images.float().detach()) + torch.rand(len(images))


def upside_down(images: Tensor) -> Tensor:
    return -contrast(images.float().detach())


def raises_always(images: Tensor) -> Tensor:
    raise RuntimeError("CUDA out of memory")


@pytest.mark.parametrize(
    ("score", "complaint"),
    [
        (batch_mean, "when images are scored one at a time"),
        (scalar, r"must give shape \[1\], got \[\]"),
        (half, r"the same pixels come as torch\.bfloat16"),
        (zero_for_broken, "an image with a nan pixel must score NaN"),
        (everyone_pays, "when another image has a nan pixel"),
        (leaks_graph, "promises no graph"),
        (random_each_time, "from call to call"),
        (upside_down, "is the sign right"),
        (raises_always, "RuntimeError: CUDA out of memory"),
    ],
)
def test_faults_are_named(score: Callable[[Tensor], Tensor], complaint: str) -> None:
    """Each kind of fault appears in the error in words that tell the author what to mend."""
    with pytest.raises(RewardContractError, match=complaint):
        check_reward(Plain(score), IMAGES, degraded=FLAT)


def test_in_place_clamping_is_found() -> None:
    """A reward that writes into the caller's images is caught."""
    with pytest.raises(RewardContractError, match="it wrote into `images`"):
        check_reward(InPlace(), IMAGES)


class InPlace(Plain):
    def __init__(self) -> None:
        super().__init__(contrast)

    def __call__(self, images, references=None, prompts=None, **ignored) -> Tensor:
        if isinstance(images, Tensor):
            images.detach().clamp_(0, 1)
        return super().__call__(images)


def test_modules_and_unpicklable_rewards_are_refused() -> None:
    """An nn.Module and a lambda break two trainers each; both are named."""
    with pytest.raises(RewardContractError, match=r"must not be an nn\.Module"):
        check_reward(Module(), IMAGES)  # type: ignore[arg-type]
    with pytest.raises(RewardContractError, match=r"FAIL  survives pickling: .*lambda"):
        check_reward(NoReference(lambda images: contrast(images), higher_is_better=True, name="l"), IMAGES)


class Module(nn.Module):
    name, needs_references, needs_prompts, differentiable, bounds = "module", False, False, False, (None, None)

    def forward(self, images, references=None, prompts=None, **ignored) -> Tensor:
        return contrast(torch.stack(list(images)))


def test_arguments() -> None:
    """Images unfit for the check are refused before anything is scored."""
    reward = NoReference(contrast, higher_is_better=True)
    with pytest.raises(ValueError, match="B >= 3"):
        check_reward(reward, IMAGES[:2])
    with pytest.raises(ValueError, match="degraded"):
        check_reward(reward, IMAGES, degraded=FLAT[:3])
