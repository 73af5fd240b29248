"""The small network scores any size, alone or in a batch, with finite gradients; its weights order damage."""

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

import iqareward
from iqareward import check_reward
from iqareward.rewards import QuickReward
from tests.rewards.pictures import textures
from tests.rewards.quick_weights import quick_weights
from tests.tolerances import NETWORK_BATCH


@pytest.mark.parametrize("differentiable", [False, True])
def test_contract(differentiable, tmp_path):
    """It keeps the contract of all rewards."""
    check_reward(QuickReward(quick_weights(tmp_path), device="cpu", differentiable=differentiable), textures(3, 64))


def test_any_size_and_batch(tmp_path):
    """Sizes mix freely, a score is the same in any batch, and an image below the smallest side has none."""
    reward = QuickReward(quick_weights(tmp_path), device="cpu")
    images = [textures(1, 128)[0][:, :height, :width] for height, width in ((32, 33), (47, 128), (128, 100), (31, 64))]
    together = reward(images)
    alone = torch.cat([reward([image]) for image in images[:3]])
    torch.testing.assert_close(together[:3], alone, **NETWORK_BATCH)
    assert together[3].isnan()
    assert ((together[:3] > 0) & (together[:3] < 1)).all()


def test_gradient_is_finite(tmp_path):
    """On textures and on black and white images."""
    reward = QuickReward(quick_weights(tmp_path), device="cpu", differentiable=True)
    images = torch.cat([textures(2, 64), torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)]).requires_grad_()
    (gradient,) = torch.autograd.grad(reward(images).sum(), images)
    assert gradient.isfinite().all()
    assert gradient[:2].abs().amax((1, 2, 3)).min() > 0


def test_weights_that_are_not_of_this_network(tmp_path):
    """A file of another network is refused with what was expected."""
    torch.save({"stem.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="distill"):
        QuickReward(tmp_path / "other.pth", device="cpu")(torch.rand(1, 3, 32, 32))


def test_shipped_weights_keep_the_contract(photographs, degraded_photographs):
    """`load("quick")` needs no network, and prefers photographs to degraded ones."""
    for differentiable in (False, True):
        reward = iqareward.load("quick", device="cpu", differentiable=differentiable)
        check_reward(reward, photographs, degraded=degraded_photographs)


@pytest.mark.parametrize("kind", ["noise", "blur"])
def test_shipped_weights_order_levels(kind, photographs):
    """On every photograph the score falls with each level, from the clean image on."""
    noise = torch.randn(photographs.shape, generator=torch.Generator().manual_seed(0))
    if kind == "noise":
        levels = [(photographs + level / 255 * noise).clamp(0, 1) for level in (0, 5, 15, 40)]
    else:
        levels = [_coarse(photographs, factor) for factor in (1, 4, 8)]
    scores = torch.stack([iqareward.load("quick", device="cpu")(images) for images in levels])
    assert (scores.diff(dim=0) < 0).all()


@pytest.mark.parametrize("factor", [1, 2, 4])
def test_light_noise_lowers_the_score(factor, photographs):
    """Noise of 3/255 does not pass for detail, on sharp photographs and on soft ones."""
    images = _coarse(photographs, factor)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    reward = iqareward.load("quick", device="cpu")
    assert (reward((images + 3 / 255 * noise).clamp(0, 1)) < reward(images)).all()


def _coarse(images, factor):
    """Made smaller and larger again."""
    small = avg_pool2d(images, factor)
    return interpolate(small, images.shape[2:], mode="bicubic").clamp(0, 1) if factor > 1 else images
