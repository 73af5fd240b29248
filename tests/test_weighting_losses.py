"""What the weights do to losses, advantages and other trainers' inputs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.losses import (
    GradientBalance,
    LossWeights,
    advantage_multipliers,
    balance_gradients,
    drop_broken_gradients,
    gradient_norm,
    mixed_advantages,
    mixed_loss,
    optimality_probability,
)
from tests.tolerances import EXACT, FORMULA_FP32


def weights_of(share: torch.Tensor) -> LossWeights:
    """Convex weights."""
    return LossWeights(share, 1 - share)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(seed=st.integers(0, 2**31 - 1), scale=st.floats(0.0, 5.0), beta=st.floats(0.0, 2.0))
def test_mixed_loss_is_the_documented_sum(seed, scale, beta):
    """The mean of weighted losses plus the KL term, against fp64."""
    rl, sft, kl, share = torch.rand(4, 9, generator=torch.Generator().manual_seed(seed))
    loss = mixed_loss(rl, sft, weights_of(share), kl, beta=beta, sft_scale=scale)
    terms = share.double() * rl + scale * (1 - share.double()) * sft + beta * kl.double()
    torch.testing.assert_close(loss.double(), terms.mean(), **FORMULA_FP32)


def test_gradients_flow_through_losses_only():
    """Each loss receives its weight over B as gradient."""
    rl, sft = torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True)
    share = torch.tensor([0.0, 0.25, 0.5, 1.0])
    mixed_loss(rl, sft, weights_of(share), sft_scale=2.0).backward()
    torch.testing.assert_close(rl.grad, share / 4, **EXACT)
    torch.testing.assert_close(sft.grad, 2 * (1 - share) / 4, **EXACT)


def test_rows_that_weigh_nothing_do_not_reach_the_value():
    """A padded row changes neither the value nor the gradient of the losses, even if its losses are NaN."""
    rl = torch.tensor([1.0, torch.nan], requires_grad=True)
    sft, kl = torch.tensor([3.0, torch.nan]), torch.tensor([5.0, torch.nan])
    weights = LossWeights(torch.tensor([0.5, 0.0]), torch.tensor([0.5, 0.0]))
    loss = mixed_loss(rl, sft, weights, kl, beta=0.1)
    loss.backward()
    torch.testing.assert_close(loss.detach(), torch.tensor(2.5), **FORMULA_FP32)
    torch.testing.assert_close(rl.grad, torch.tensor([0.5, 0.0]), **EXACT)
    assert mixed_loss(rl, sft, LossWeights(torch.zeros(2), torch.zeros(2))).item() == 0


def test_rows_left_out_of_the_forward_pass_do_not_reach_the_weights():
    """With the rows of `taking_part` alone, value and gradient are those of the healthy rows."""
    layer, inputs = torch.nn.Linear(2, 1), torch.tensor([[1.0, 1.0], [torch.nan, 1.0], [2.0, 1.0]])
    weights = LossWeights(torch.tensor([1.0, 0.0, 0.5]), torch.tensor([0.0, 0.0, 0.5]))
    kept = weights.rows(weights.taking_part)
    losses = layer(inputs[weights.taking_part]).squeeze(1)
    mixed_loss(losses, losses.square(), kept, losses.abs(), beta=0.1).backward()
    assert layer.weight.grad.isfinite().all()
    torch.testing.assert_close(kept.rl, torch.tensor([1.0, 0.5]), **EXACT)
    torch.testing.assert_close(weights.rows(slice(1, 3)).sft, torch.tensor([0.0, 0.5]), **EXACT)


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 5)])
def test_a_broken_gradient_does_not_leave_its_image(shape):
    """An image without a score, or with an infinite gradient, gets none; the others keep theirs to the last bit."""
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    images[1] = 0  # sqrt has no derivative there
    for broken in (lambda rows: rows.sqrt(), lambda rows: rows / rows, lambda rows: (rows.log() * 0).exp() * rows):
        whole, alone = images.clone().requires_grad_(), images[:1].clone().requires_grad_()
        broken(drop_broken_gradients(whole)).flatten(1).mean(1).sum().backward()
        broken(alone).flatten(1).mean(1).sum().backward()
        torch.testing.assert_close(whole.grad[:1], alone.grad, **EXACT)
        assert (whole.grad[1] == 0).all()
    single = torch.tensor([[[0.0]], [[1.0]], [[1.0]]], requires_grad=True)  # [3, H, W] is one image
    drop_broken_gradients(single).sqrt().sum().backward()
    assert (single.grad == 0).all()
    assert not drop_broken_gradients(images).requires_grad


def test_a_broken_loss_that_counts_is_not_hidden():
    """NaN in a row with weight reaches the caller."""
    assert mixed_loss(torch.tensor([torch.nan]), torch.ones(1), weights_of(torch.ones(1))).isnan()


def test_shapes_that_broadcast_are_refused():
    """[B] against [B, 1] would silently become [B, B]."""
    share = torch.rand(3)
    with pytest.raises(ValueError, match="`sft_loss`"):
        mixed_loss(torch.rand(3), torch.rand(3, 1), weights_of(share))
    with pytest.raises(ValueError, match="`kl`"):
        mixed_loss(torch.rand(3), torch.rand(3), weights_of(share), beta=0.1)


def test_balance_makes_sft_pull_as_hard_as_rl():
    """After one measurement the scaled SFT gradient has the norm of the RL gradient, and the graph is still usable."""
    layer = torch.nn.Linear(4, 2)
    inputs = torch.rand(8, 4, generator=torch.Generator().manual_seed(0))
    rl, sft = layer(inputs).mean(), 10 * layer(inputs).square().mean()
    scale = balance_gradients(GradientBalance(), rl, sft, list(layer.parameters()))
    parameters = list(layer.parameters())
    torch.testing.assert_close(gradient_norm(scale * sft, parameters), gradient_norm(rl, parameters), **FORMULA_FP32)
    (rl + scale * sft).backward()


def test_balance_is_smooth_clipped_and_survives_broken_steps():
    """An exponential average of norms; NaN and zero norms never reach the loss; the state round trip is exact."""
    balance = GradientBalance(ema=0.5, high=10.0)
    assert balance.sft_scale == 1.0
    balance.update(rl_norm=torch.tensor(torch.nan), sft_norm=torch.tensor(1.0))
    balance.update(rl_norm=torch.tensor(2.0), sft_norm=torch.tensor(1.0))
    balance.update(rl_norm=torch.tensor(4.0), sft_norm=torch.tensor(torch.inf))
    torch.testing.assert_close(balance.sft_scale, torch.tensor(3.0), **EXACT)
    restored = GradientBalance(ema=0.5, high=10.0)
    restored.load_state_dict(balance.state_dict())
    torch.testing.assert_close(restored.sft_scale, balance.sft_scale, **EXACT)
    for _ in range(40):
        balance.update(rl_norm=torch.tensor(1.0), sft_norm=torch.tensor(0.0))
    assert balance.sft_scale == 10.0


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300, 0.0])
def test_balance_never_takes_in_what_is_not_a_norm(value):
    """As the first measurement and later: the state stays finite, and the scale is 1 until both were measured."""
    balance, bad = GradientBalance(), torch.tensor(value, dtype=torch.float64)
    balance.update(rl_norm=bad, sft_norm=torch.tensor(2.0))
    assert float(balance.sft_scale) == 1.0
    assert all(norm.isfinite() for norm in balance.state_dict().values())
    balance.update(rl_norm=torch.tensor(6.0), sft_norm=torch.tensor(2.0))
    torch.testing.assert_close(balance.sft_scale, torch.tensor(3.0), **FORMULA_FP32)
    balance.update(rl_norm=bad, sft_norm=bad)
    assert all(norm.isfinite() for norm in balance.state_dict().values())
    torch.testing.assert_close(balance.sft_scale, torch.tensor(3.0), **FORMULA_FP32)


def test_multipliers_keep_or_rescale_the_share():
    """mean_one keeps the proportions; a batch without RL stays without."""
    weights = weights_of(torch.tensor([0.1, 0.3]))
    torch.testing.assert_close(advantage_multipliers(weights), weights.rl, **EXACT)
    torch.testing.assert_close(advantage_multipliers(weights, mean_one=True), torch.tensor([0.5, 1.5]), **FORMULA_FP32)
    assert advantage_multipliers(weights_of(torch.zeros(2)), mean_one=True).tolist() == [0.0, 0.0]


def test_mixed_advantages_are_the_weighted_sum():
    """Pure shares give one of the two; NaN of the other does not leak."""
    quality, fidelity = torch.tensor([1.0, torch.nan, 2.0]), torch.tensor([torch.nan, -3.0, 4.0])
    mixed = mixed_advantages(quality, fidelity, weights_of(torch.tensor([1.0, 0.0, 0.5])))
    torch.testing.assert_close(mixed, torch.tensor([1.0, -3.0, 3.0]), **EXACT)
    assert not mixed_advantages(quality.requires_grad_(), fidelity, weights_of(torch.ones(3))).requires_grad


def test_optimality_is_the_published_r_and_neutral_without_rl():
    """clip(adv / clip / 2 + 0.5, 0, 1) at full RL, 0.5 at none, and never outside [0, 1]."""
    advantages = torch.linspace(-9, 9, 19)
    published = (advantages / 5 / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(optimality_probability(advantages), published, **FORMULA_FP32)
    none = optimality_probability(advantages, weights_of(torch.zeros(19)))
    torch.testing.assert_close(none, torch.full((19,), 0.5), **EXACT)
    assert optimality_probability(torch.tensor([torch.nan, torch.inf, -torch.inf])).tolist() == [0.5, 0.5, 0.5]
