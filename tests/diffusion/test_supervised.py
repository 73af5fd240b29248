"""SFT brings the loss down, can be repeated exactly, and leaves a bare module."""

import torch
from accelerate import Accelerator

from iqareward.diffusion import supervised
from tests.diffusion.tiny import TinyPairs, pixel_policy, unet

EXACT = {"rtol": 0.0, "atol": 0.0}


def train(policy, updates=40, **options):
    """Losses of a short run."""
    defaults = {"batch_size": 8, "learning_rate": 5e-3, "accelerator": Accelerator(cpu=True), "show_progress": False}
    return supervised(policy, TinyPairs(16), num_updates=updates, **(defaults | options))


def test_loss_falls():
    """Over 40 updates of a tiny model that predicts the clean image, to half at least."""
    policy = pixel_policy("sample")
    policy.model = unet(levels=2)  # with one level it learns too little in so short a time
    losses = torch.tensor(train(policy))
    assert losses[-8:].mean() < losses[:8].mean() / 2


def test_runs_can_be_repeated():
    """The same seed gives the same losses and weights, another one does not."""
    first, second, other = pixel_policy(), pixel_policy(), pixel_policy()
    assert train(first, 3) == train(second, 3)
    assert train(other, 3, seed=1) != train(pixel_policy(), 3)
    for one, two in zip(first.model.parameters(), second.model.parameters(), strict=True):
        torch.testing.assert_close(one, two, **EXACT)


def test_average_of_weights_stays_nearer_to_the_start():
    """With a running average the model moves less than without."""
    start = torch.cat([weight.detach().flatten() for weight in pixel_policy().model.parameters()])

    def moved(**options):
        policy = pixel_policy()
        train(policy, 5, **options)
        assert type(policy.model).__name__ == "UNet2DModel"
        return (torch.cat([w.detach().flatten() for w in policy.model.parameters()]) - start).norm()

    assert 0 < moved(ema_decay=0.99) < moved()


def test_no_update_changes_nothing():
    """Zero updates are allowed."""
    assert train(pixel_policy(), 0) == []
