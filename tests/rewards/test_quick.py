"""The small network scores any size, alone or in a batch, with finite gradients."""

import pytest
import torch

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
