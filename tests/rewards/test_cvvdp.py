"""ColorVideoVDP as a reward: the figures and gradients of its authors' package."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import iqareward
from iqareward import to_images
from iqareward.rewards.cvvdp import DISPLAYS, CVVDPReward
from iqareward.testing import check_reward
from tests.rewards.pictures import noisy, textures
from tests.tolerances import EXACT


def test_published_parameters_give_their_figures(fixtures_dir: Path) -> None:
    """Three pairs have the scores that cvvdp 0.5.7 has, in a batch and alone, for a display of its list."""
    folder, names = fixtures_dir / "calibration", ("I03", "I06", "I08")
    images, references = (
        torch.cat([to_images(Image.open(next((folder / kind).glob(f"{name}*")))) for name in names])
        for kind in ("dist", "ref")
    )
    reward = iqareward.load("cvvdp", device="cpu")
    scores = reward(images, references=references)
    torch.testing.assert_close(scores, torch.tensor([5.401, 8.734, 8.320]), rtol=0, atol=6e-4)
    alone = reward(images[1:2], references=references[1:2])
    torch.testing.assert_close(alone, scores[1:2], rtol=0, atol=1e-5)


@pytest.mark.parametrize("display", DISPLAYS)
def test_package(display: str) -> None:
    """A score is the cvvdp package's prediction for the pair, at sides that are even, odd, and both."""
    pycvvdp = pytest.importorskip("pycvvdp", reason="cvvdp is not installed")
    metric = pycvvdp.cvvdp(display_name=display, device=torch.device("cpu"), quiet=True)
    reward = CVVDPReward(display, device="cpu")
    for height, width in ((16, 17), (33, 50), (64, 96), (131, 70)):
        references = textures(1, 131)[..., :height, :width]
        images = noisy(references)
        expected = metric.predict(images, references, dim_order="BCHW")[0]
        torch.testing.assert_close(reward(images, references=references)[0], expected, rtol=0, atol=2e-5)


def test_gradient_is_the_packages() -> None:
    """The gradient to the pixels is that of the package."""
    pycvvdp = pytest.importorskip("pycvvdp", reason="cvvdp is not installed")
    metric = pycvvdp.cvvdp(display_name="standard_4k", device=torch.device("cpu"), quiet=True)
    references = 0.1 + 0.8 * textures(1, 50)
    images = (0.8 * references + 0.1).requires_grad_()
    (expected,) = torch.autograd.grad(metric.predict(images, references, dim_order="BCHW")[0], images)
    scores = CVVDPReward(device="cpu", differentiable=True)(images, references=references)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    gap = torch.linalg.vector_norm(gradient - expected) / torch.linalg.vector_norm(expected)
    assert gap < 1e-4


@pytest.mark.parametrize("differentiable", [False, True])
def test_contract(differentiable: bool) -> None:
    """Order, sizes, bad pixels, threads, pickling and direction are those of every reward."""
    references = textures(3, 40)
    reward = CVVDPReward(device="cpu", differentiable=differentiable)
    check_reward(reward, noisy(references), references, degraded=noisy(references, 0.2))


def test_gradient_is_that_of_finite_differences() -> None:
    """Along the gradient and along noise the score changes as the gradient says, in float32."""
    references = 0.1 + 0.8 * textures(1, 64)
    images = (0.9 * references + 0.1 * textures(1, 64).flip(-1)).requires_grad_()
    reward = CVVDPReward(device="cpu", differentiable=True)
    (gradient,) = torch.autograd.grad(reward(images, references=references).sum(), images)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for direction in (gradient, noise + 30 * gradient / gradient.norm()):
        step = 0.05 * direction / direction.norm()
        with torch.no_grad():
            ahead, behind = (reward(images + sign * step, references=references) for sign in (1, -1))
        slope = (gradient * step).sum()
        torch.testing.assert_close((ahead - behind)[0] / 2, slope, rtol=0.03, atol=1e-5)


def test_gradients_are_finite_for_identical_and_flat_images() -> None:
    """Equal, black and flat images have finite gradients, so that a loss of the batch can be stepped."""
    references = torch.cat([textures(2, 32), torch.zeros(1, 3, 32, 32)])
    images = references.clone()
    images[1] = 0.5
    images.requires_grad_()
    scores = CVVDPReward(device="cpu", differentiable=True)(images, references=references)
    scores.sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    torch.testing.assert_close(scores[[0, 2]].detach(), torch.full((2,), 10.0), **EXACT)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_what_it_does_not_see_is_not_scored() -> None:
    """A flat image of another colour than its flat reference would be perfect, so it is not scored."""
    black, grey = torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    reward = CVVDPReward(device="cpu")
    assert reward(grey, references=black).isnan()
    assert reward(grey, references=grey) == 10
    small = torch.rand(1, 3, 15, 40, generator=torch.Generator().manual_seed(0))
    assert reward(small, references=small.flip(-1)).isnan()


def test_displays() -> None:
    """The display matters: the same error is harder to see where pixels are smaller; unknown ones are refused."""
    references = textures(1, 64)
    images = noisy(references)

    def score(display: str) -> Tensor:
        return CVVDPReward(display, device="cpu")(images, references=references)

    assert score("standard_fhd") < score("iphone_14_pro")
    with pytest.raises(ValueError, match=r"`display` to be one of standard_4k, .*, got 'cinema'"):
        CVVDPReward("cinema")
    assert iqareward.load("cvvdp(display=standard_phone)").name == "cvvdp(display=standard_phone)"
