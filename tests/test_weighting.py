"""Loss weights: the properties that the adaptive formula promises, and what the weights do to losses and advantages."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from iqareward.weighting import (
    AdaptiveWeighter,
    GradientBalance,
    LossWeights,
    gradient_norm,
    mix,
    mixed_advantages,
    mixed_loss,
    optimality_probability,
    weighted_advantages,
)
from tests.gpu import needs_cuda, no_waits
from tests.tolerances import EXACT, FORMULA_FP32

properties = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
steepnesses = st.floats(0.1, 8.0)
DIRECTIONS = ("hard_to_rl", "hard_to_sft")


def difficulties(seed: int, num_rows: int = 32, spread: float = 0.8) -> Tensor:
    """Log-normal distances, as errors of restoration models are."""
    return torch.exp(spread * torch.randn(num_rows, generator=torch.Generator().manual_seed(seed)) - 2.5)


def convex(**options) -> AdaptiveWeighter:
    """A weighter whose `rl` is the share w itself."""
    return AdaptiveWeighter(**{"mode": "convex"} | options)


def calibrated(seed: int = 0, **options) -> AdaptiveWeighter:
    """A convex weighter anchored on 64 difficulties."""
    weighter = convex(**options)
    weighter.calibrate(difficulties(seed, 64))
    return weighter


def calibrated_on(rows: Tensor) -> AdaptiveWeighter:
    """A convex weighter anchored on these rows."""
    weighter = convex()
    weighter.calibrate(rows)
    return weighter


@properties
@given(seed=seeds, steepness=steepnesses)
def test_weight_is_the_documented_formula(seed, steepness):
    """rl is the logistic function of the standardised log-difficulty, written out here in fp64."""
    anchor, rows = difficulties(seed, 64), difficulties(seed + 1)
    weighter = convex(steepness=steepness)
    weighter.calibrate(anchor)
    logs = anchor.double().log()
    expected = 1 / (1 + torch.exp(-steepness * (rows.double().log() - logs.mean()) / logs.std()))
    torch.testing.assert_close(weighter(rows).rl.double(), expected, **FORMULA_FP32)


@properties
@given(seed=seeds, steepness=steepnesses, direction=st.sampled_from(DIRECTIONS))
def test_weight_is_monotone_in_difficulty(seed, steepness, direction):
    """A harder row never gets less RL (or never more, in the other direction)."""
    share = calibrated(steepness=steepness, direction=direction)(difficulties(seed).sort().values).rl
    steps = share.diff()
    assert (steps >= 0).all() if direction == "hard_to_rl" else (steps <= 0).all()


@properties
@given(seed=seeds, low=st.floats(0.0, 0.4), high=st.floats(0.5, 1.0))
def test_weight_stays_in_its_range(seed, low, high):
    """Every RL share lies in the output range, for any size of the difficulty."""
    rows = difficulties(seed) * torch.logspace(-30, 30, 32)
    share = calibrated(output_range=(low, high))(rows).rl
    assert ((share >= low - 1e-6) & (share <= high + 1e-6)).all()


@properties
@given(seed=seeds, steepness=steepnesses)
def test_convex_weights_sum_to_one(seed, steepness):
    """rl + sft = 1 in every row, with a signal or without."""
    has_signal = torch.arange(32) % 3 > 0
    rl, sft = calibrated(steepness=steepness)(difficulties(seed), has_signal=has_signal)
    torch.testing.assert_close(rl + sft, torch.ones(32), **EXACT)


@properties
@given(seed=seeds)
def test_weights_follow_their_rows(seed):
    """Permuting rows permutes weights, bit for bit, with bins too."""
    rows, bins = difficulties(seed), torch.arange(32) % 4
    order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    weighter = convex(num_bins=4)
    weighter.calibrate(rows, bins)
    torch.testing.assert_close(weighter(rows[order], bins=bins[order]).rl, weighter(rows, bins=bins).rl[order], **EXACT)


@properties
@given(seed=seeds, unit=st.floats(1e-2, 1e3))
def test_unit_of_difficulty_does_not_matter(seed, unit):
    """Scaling rows and calibration together (0..255 instead of 0..1) changes no weight."""
    rows, anchor = difficulties(seed).double(), difficulties(seed + 1).double()
    plain, scaled = convex(), convex()
    plain.calibrate(anchor)
    scaled.calibrate(anchor * unit)
    torch.testing.assert_close(scaled(rows * unit).rl, plain(rows).rl, **FORMULA_FP32)


@properties
@given(seed=seeds, cut=st.integers(1, 31))
def test_weights_do_not_depend_on_the_batch(seed, cut):
    """Micro-batches, other rows and updates change nothing but the last bit (vector and scalar kernels)."""
    rows, weighter = difficulties(seed), calibrated()
    whole = weighter(rows).rl
    first = weighter(rows[:cut]).rl
    weighter.update(100 * rows)
    torch.testing.assert_close(torch.cat([first, weighter(rows[cut:]).rl]), whole, **FORMULA_FP32)


@properties
@given(seed=seeds, shrink=st.floats(0.2, 0.98))
def test_sft_takes_over_as_errors_shrink(seed, shrink):
    """A smaller error lowers every weight that is not yet at the end of its range."""
    rows, weighter = difficulties(seed, spread=0.3), calibrated()
    assert (weighter(shrink * rows).rl < weighter(rows).rl).all()


def test_handover_has_the_size_that_was_derived():
    """Mean RL share .50 -> .39 -> .19 -> .02 as log-normal errors with spread .6 shrink x1, .8, .5, .2."""
    rows = difficulties(3, 4096, spread=0.6)
    weighter = convex()
    weighter.calibrate(rows)
    means = torch.stack([weighter(factor * rows).rl.mean() for factor in (1.0, 0.8, 0.5, 0.2)])
    torch.testing.assert_close(means, torch.tensor([0.50, 0.39, 0.19, 0.02]), rtol=0.0, atol=0.015)


@properties
@given(seed=seeds)
def test_controls_are_special_cases(seed):
    """Steepness 0 is 0.5 everywhere, a range of one value is pure RL or SFT, and a large steepness is a hard gate."""
    rows, anchor = difficulties(seed), difficulties(seed + 1, 64)
    expected = {
        (0.0, 0.0, 1.0): torch.full((32,), 0.5),
        (2.0, 1.0, 1.0): torch.ones(32),
        (2.0, 0.0, 0.0): torch.zeros(32),
        (1e9, 0.0, 1.0): (rows.log() > anchor.log().mean()).float(),
    }
    for (steepness, low, high), share in expected.items():
        weighter = convex(steepness=steepness, output_range=(low, high))
        weighter.calibrate(anchor)
        torch.testing.assert_close(weighter(rows).rl, share, **EXACT)


@properties
@given(seed=seeds, steepness=steepnesses)
def test_other_direction_is_the_complement(seed, steepness):
    """hard_to_sft gives 1 - w of hard_to_rl."""
    rows = difficulties(seed)
    there, back = (calibrated(steepness=steepness, direction=direction)(rows) for direction in DIRECTIONS)
    torch.testing.assert_close(back.rl, there.sft, **FORMULA_FP32)


@pytest.mark.parametrize("mode", ["convex", "additive"])
def test_input_without_reward_spread_gets_sft_only(mode):
    """has_signal=False gives rl = 0 and sft = 1 in both modes, NaN difficulty or not."""
    rows = torch.tensor([0.01, 1.0, torch.nan])
    rl, sft = calibrated(mode=mode)(rows, has_signal=torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(rl, torch.zeros(3), **EXACT)
    torch.testing.assert_close(sft, torch.ones(3), **EXACT)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("low", [0.0, 0.1])
def test_unusable_difficulty_gets_the_smallest_share(direction, low):
    """NaN, +-inf and negative difficulties get the low end; zero is a difficulty like any other."""
    rows = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0])
    weighter = calibrated(direction=direction, output_range=(low, 1.0))
    torch.testing.assert_close(weighter(rows).rl, torch.full((4,), low), **EXACT)
    assert weighter(torch.zeros(1)).rl.item() == pytest.approx(low if direction == "hard_to_rl" else 1.0, abs=1e-4)


def test_no_gradient_reaches_the_difficulty():
    """Weights are constants for the optimiser even if the difficulty is not."""
    rows = difficulties(0).requires_grad_()
    rl, sft = calibrated()(rows)
    assert not rl.requires_grad
    assert not sft.requires_grad


@properties
@given(seed=seeds, direction=st.sampled_from(DIRECTIONS), num_bins=st.integers(1, 3))
def test_state_round_trip_is_exact(seed, direction, num_bins):
    """A weighter restored from state_dict, or pickled, continues bit for bit."""
    bins = torch.arange(32) % num_bins
    weighter = convex(direction=direction, num_bins=num_bins)
    weighter.calibrate(difficulties(seed), bins)
    state = weighter.state_dict()
    restored = AdaptiveWeighter(**state["config"])
    restored.load_state_dict(state)
    expected = weighter(difficulties(seed + 1), bins=bins).rl
    for other in (restored, pickle.loads(pickle.dumps(weighter))):
        torch.testing.assert_close(other(difficulties(seed + 1), bins=bins).rl, expected, **EXACT)


def test_uncalibrated_state_round_trip():
    """The state of a weighter that has not begun is loadable, and it still asks for its calibration."""
    restored = AdaptiveWeighter()
    restored.load_state_dict(AdaptiveWeighter().state_dict())
    with pytest.raises(RuntimeError, match="calibrate_on_first=True"):
        restored(difficulties(0))


def test_bins_have_their_own_scale():
    """The same difficulty is hard in a bin of easy rows and easy in a bin of hard ones."""
    weighter = convex(num_bins=2)
    anchor = difficulties(0, 64)
    weighter.calibrate(torch.cat([anchor, 100 * anchor]), torch.arange(128) // 64)
    rl = weighter(anchor.mean().repeat(2), bins=torch.tensor([0, 1], dtype=torch.uint8)).rl
    assert rl[0] > 0.5 > 0.05 > rl[1]


def test_calibrating_again_moves_the_anchor():
    """A second calibration replaces the first one, also after updates."""
    weighter, rows = calibrated(), difficulties(2)
    weighter.update(rows)
    weighter.calibrate(rows)
    torch.testing.assert_close(weighter(rows).rl, calibrated_on(rows)(rows).rl, **EXACT)


def test_batch_sizes_one_and_zero():
    """One row gives one weight; no rows give none."""
    assert calibrated()(torch.tensor([0.1])).rl.shape == (1,)
    assert calibrated()(torch.empty(0)).rl.shape == (0,)


def test_half_precision_is_computed_in_fp32():
    """bf16 difficulties give fp32 weights."""
    assert calibrated()(difficulties(0).bfloat16()).rl.dtype == torch.float32


@pytest.mark.parametrize("first", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("second", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_bins", [1, 2])
def test_state_has_a_dtype_of_its_own(first, second, num_bins):
    """Calibrated in one dtype and used in another, weights and anchor are fp32 and those of fp32 up to rounding."""
    bins = None if num_bins == 1 else torch.arange(32) % 2
    weighter, plain = (convex(num_bins=num_bins) for _ in range(2))
    for one, dtype in ((weighter, first), (plain, torch.float32)):
        one.calibrate(difficulties(0).to(dtype), bins)
    found = weighter(difficulties(2).to(second), bins=bins)
    assert weighter.state_dict()["anchor"].dtype == found.rl.dtype == found.sft.dtype == torch.float32
    torch.testing.assert_close(found.rl, plain(difficulties(2), bins=bins).rl, rtol=0.0, atol=5e-3)  # fp16 rows


def test_difficulties_made_by_numpy():
    """fp64 rows from numpy work with a weighter that was calibrated in fp32."""
    weighter = calibrated()
    rows = torch.from_numpy(difficulties(1).numpy().astype("float64"))
    weighter.update(rows)
    torch.testing.assert_close(weighter(rows).rl, calibrated()(difficulties(1)).rl, **FORMULA_FP32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, 1e-45, 1e38, 1e300])
def test_no_value_spoils_the_anchor(value):
    """Whatever is among the rows, the anchor is finite and later weights are numbers."""
    weighter = convex()
    weighter.calibrate(torch.cat([difficulties(0).double(), torch.tensor([value], dtype=torch.float64)]))
    assert weighter.state_dict()["anchor"].isfinite().all()
    assert weighter(difficulties(1)).rl.isfinite().all()
    assert weighter(torch.tensor([1e9])).rl.item() >= weighter(torch.tensor([1e-5])).rl.item()


def test_equal_difficulties_are_a_usable_anchor():
    """Without any spread the smallest scale counts: rows at the anchor get one half."""
    weighter = calibrated_on(torch.full((8,), 0.1))
    torch.testing.assert_close(weighter(torch.tensor([0.1])).rl, torch.tensor([0.5]), **FORMULA_FP32)
    assert 0.5 < weighter(torch.tensor([0.105])).rl.item() < 1


@pytest.mark.parametrize("bins", [[0, -1], [0, 2]])
def test_bins_out_of_range_are_refused(bins):
    """-1 is not the last bins; lists are taken like tensors."""
    weighter = convex(num_bins=2)
    for use in (weighter.calibrate, weighter):
        if use is not weighter.calibrate:
            weighter.calibrate(difficulties(0, 8), [0, 1] * 4)
        with pytest.raises(ValueError, match=r"\[0, 2\)"):
            use(torch.tensor([0.1, 0.2]), bins=bins)


@pytest.mark.gpu
@needs_cuda
def test_bins_out_of_range_on_a_device_do_not_wrap():
    """Such a row counts as one whose difficulty is NaN, and the device is not waited for."""
    weighter = convex(num_bins=2)
    weighter.calibrate(difficulties(0, 8).cuda(), torch.arange(8).cuda() % 2)
    rows, bins = torch.tensor([0.1, 0.2, 0.3]).cuda(), torch.tensor([0, -1, 2]).cuda()  # these copies wait
    with no_waits():
        weights = weighter(rows, bins=bins)
    assert weights.rl[1:].tolist() == [0.0, 0.0]
    assert weights.rl[0] > 0


def test_weights_survive_another_default_dtype():
    """A trainer's torch.set_default_dtype does not leak into the weights."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        weighter = calibrated(output_range=(0.1, 1.0))
        assert weighter(difficulties(0).float()).rl.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_use_before_calibration_is_an_error():
    """The message names both ways out; calibrate_on_first is one of them."""
    rows = difficulties(0)
    with pytest.raises(RuntimeError, match=r"calibrate\(difficulty\).*calibrate_on_first=True"):
        AdaptiveWeighter()(rows)
    assert convex(calibrate_on_first=True)(rows).rl.mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    "option",
    [
        {"steepness": float("inf")},
        {"steepness": -1.0},
        {"output_range": (0.8, 0.2)},
        {"output_range": (0.0, 1.5)},
        {"direction": "easy"},
        {"mode": "sum"},
        {"num_bins": 0},
    ],
)
def test_options_out_of_range_are_refused(option):
    """The message says which range was expected."""
    with pytest.raises(ValueError, match="AdaptiveWeighter expected"):
        AdaptiveWeighter(**option)


def test_wrong_rows_are_refused():
    """Shapes, missing bins, scores instead of distances and thin calibrations are named."""
    with pytest.raises(ValueError, match=r"tensor \[B\]"):
        calibrated()(torch.rand(4, 1))
    with pytest.raises(ValueError, match="integers"):
        calibrated()(torch.rand(4), bins=torch.zeros(4))
    with pytest.raises(ValueError, match="`bins`"):
        AdaptiveWeighter(num_bins=3).calibrate(torch.rand(9))
    with pytest.raises(ValueError, match="larger = harder"):
        AdaptiveWeighter().calibrate(torch.tensor([-30.0, -25.0]))
    with pytest.raises(ValueError, match="two finite"):
        AdaptiveWeighter(num_bins=2).calibrate(torch.rand(4), torch.tensor([0, 0, 0, 1]))
    with pytest.raises(ValueError, match="options"):
        AdaptiveWeighter().load_state_dict(AdaptiveWeighter(steepness=3.0).state_dict())


@properties
@given(seed=seeds, steepness=steepnesses)
def test_additive_keeps_rl_and_fades_sft_in(seed, steepness):
    """The default gives rl = 1 everywhere, and the SFT weight of convex mode, which grows as errors shrink."""
    rows = difficulties(seed)
    rl, sft = calibrated(steepness=steepness, mode="additive")(rows)
    torch.testing.assert_close(rl, torch.ones(32), **EXACT)
    torch.testing.assert_close(sft, calibrated(steepness=steepness)(rows).sft, **EXACT)
    assert (calibrated(steepness=steepness, mode="additive")(0.5 * rows).sft >= sft).all()
    assert AdaptiveWeighter().mode == "additive"


def test_mix_in_both_modes():
    """Additive keeps RL whole and takes SFT away; rows that are not valid weigh nothing."""
    share = torch.tensor([0.25, 0.75, 0.5])
    valid = torch.tensor([True, True, False])
    rl, sft = mix(share, valid=valid, additive=True)
    torch.testing.assert_close(rl, torch.tensor([1.0, 1.0, 0.0]), **EXACT)
    torch.testing.assert_close(sft, torch.tensor([0.75, 0.25, 0.0]), **EXACT)


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
    parameters, balance = list(layer.parameters()), GradientBalance()
    balance.update(rl_norm=gradient_norm(rl, parameters), sft_norm=gradient_norm(sft, parameters))
    scale = balance.sft_scale
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


def test_weighted_advantages_keep_shape_and_dtype():
    """Each row times its RL weight, over all timesteps, in the dtype of the advantages; other sizes are refused."""
    weights = weights_of(torch.tensor([0.1, 0.3]))
    advantages = torch.tensor([[1.0, -2.0], [3.0, 0.0]], dtype=torch.float64)
    found = weighted_advantages(advantages, weights)
    torch.testing.assert_close(found, advantages * torch.tensor([[0.1], [0.3]]).double(), **EXACT)
    torch.testing.assert_close(weighted_advantages(advantages[:, 1], weights), found[:, 1], **EXACT)
    with pytest.raises(ValueError, match="one weight per row"):
        weighted_advantages(advantages[:1], weights)


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


def test_mixing_refuses_what_are_no_weights_or_losses() -> None:
    """By name, with what was expected."""
    rows = torch.ones(2)
    for wrong in (None, (rows, rows)):
        with pytest.raises(TypeError, match="mixed_loss expected `weights` as LossWeights"):
            mixed_loss(rows, rows, wrong)
        with pytest.raises(TypeError, match="weighted_advantages expected `weights` as LossWeights"):
            weighted_advantages(rows, wrong)
    with pytest.raises(TypeError, match="mixed_loss expected `sft_loss` as a tensor"):
        mixed_loss(rows, None, LossWeights(rows, rows))
