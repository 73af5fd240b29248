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
    balance_gradients,
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
kappas = st.floats(0.1, 8.0)
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
@given(seed=seeds, kappa=kappas, rho=st.floats(0.0, 1.0))
def test_weight_is_the_documented_formula(seed, kappa, rho):
    """rl is the logistic function of the standardised log-difficulty, written out here in fp64."""
    anchor, rows = difficulties(seed, 64), difficulties(seed + 1)
    weighter = convex(kappa=kappa, rho=rho)
    weighter.calibrate(anchor)
    logs = anchor.double().log()
    expected = 1 / (1 + torch.exp(-kappa * (rows.double().log() - logs.mean()) / logs.std()))
    torch.testing.assert_close(weighter(rows).rl.double(), expected, **FORMULA_FP32)


@properties
@given(seed=seeds, kappa=kappas, direction=st.sampled_from(DIRECTIONS))
def test_weight_is_monotone_in_difficulty(seed, kappa, direction):
    """A harder row never gets less RL (or never more, in the other direction)."""
    share = calibrated(kappa=kappa, direction=direction)(difficulties(seed).sort().values).rl
    steps = share.diff()
    assert (steps >= 0).all() if direction == "hard_to_rl" else (steps <= 0).all()


@properties
@given(seed=seeds, low=st.floats(0.0, 0.4), high=st.floats(0.5, 1.0))
def test_weight_stays_in_its_range(seed, low, high):
    """Every RL share lies in [w_min, w_max], for any size of the difficulty."""
    rows = difficulties(seed) * torch.logspace(-30, 30, 32)
    share = calibrated(w_min=low, w_max=high)(rows).rl
    assert ((share >= low - 1e-6) & (share <= high + 1e-6)).all()


@properties
@given(seed=seeds, kappa=kappas)
def test_convex_weights_sum_to_one(seed, kappa):
    """rl + sft = 1 in every row, active or not."""
    active = torch.arange(32) % 3 > 0
    rl, sft = calibrated(kappa=kappa)(difficulties(seed), active=active)
    torch.testing.assert_close(rl + sft, torch.ones(32), **EXACT)


@properties
@given(seed=seeds)
def test_weights_follow_their_rows(seed):
    """Permuting rows permutes weights, bit for bit, with buckets too."""
    rows, bucket = difficulties(seed), torch.arange(32) % 4
    order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    weighter = convex(num_buckets=4)
    weighter.calibrate(rows, bucket)
    torch.testing.assert_close(
        weighter(rows[order], bucket=bucket[order]).rl, weighter(rows, bucket=bucket).rl[order], **EXACT
    )


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
def test_weights_do_not_depend_on_the_batch_at_rho_one(seed, cut):
    """Micro-batches, other rows and running statistics change nothing but the last bit (vector and scalar kernels)."""
    rows, weighter = difficulties(seed), calibrated()
    whole = weighter(rows).rl
    first = weighter(rows[:cut]).rl
    weighter.update(100 * rows)
    torch.testing.assert_close(torch.cat([first, weighter(rows[cut:]).rl]), whole, **FORMULA_FP32)


@properties
@given(seed=seeds, shrink=st.floats(0.2, 0.98))
def test_sft_takes_over_as_errors_shrink(seed, shrink):
    """At rho = 1 a smaller error lowers every weight that is not yet at the end of its range."""
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
    """kappa = 0 is 0.5 everywhere, w_min = w_max pure RL or SFT, a large kappa a hard gate at the anchor's mean."""
    rows, anchor = difficulties(seed), difficulties(seed + 1, 64)
    expected = {
        (0.0, 0.0, 1.0): torch.full((32,), 0.5),
        (2.0, 1.0, 1.0): torch.ones(32),
        (2.0, 0.0, 0.0): torch.zeros(32),
        (1e9, 0.0, 1.0): (rows.log() > anchor.log().mean()).float(),
    }
    for (kappa, low, high), share in expected.items():
        weighter = convex(kappa=kappa, w_min=low, w_max=high)
        weighter.calibrate(anchor)
        torch.testing.assert_close(weighter(rows).rl, share, **EXACT)


@properties
@given(seed=seeds, kappa=kappas)
def test_other_direction_is_the_complement(seed, kappa):
    """hard_to_sft gives 1 - w of hard_to_rl."""
    rows = difficulties(seed)
    there, back = (calibrated(kappa=kappa, direction=direction)(rows) for direction in DIRECTIONS)
    torch.testing.assert_close(back.rl, there.sft, **FORMULA_FP32)


@pytest.mark.parametrize("mode", ["convex", "additive"])
def test_input_without_reward_spread_gets_sft_only(mode):
    """active=False gives rl = 0 and sft = 1 in both modes, NaN difficulty or not."""
    rows = torch.tensor([0.01, 1.0, torch.nan])
    rl, sft = calibrated(mode=mode)(rows, active=torch.zeros(3, dtype=torch.bool))
    torch.testing.assert_close(rl, torch.zeros(3), **EXACT)
    torch.testing.assert_close(sft, torch.ones(3), **EXACT)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("low", [0.0, 0.1])
def test_unusable_difficulty_gets_the_smallest_share(direction, low):
    """NaN, +-inf and negative difficulties get w_min; zero is a difficulty like any other."""
    rows = torch.tensor([torch.nan, torch.inf, -torch.inf, -1.0])
    weighter = calibrated(direction=direction, w_min=low)
    torch.testing.assert_close(weighter(rows).rl, torch.full((4,), low), **EXACT)
    assert weighter(torch.zeros(1)).rl.item() == pytest.approx(low if direction == "hard_to_rl" else 1.0, abs=1e-4)


def test_no_gradient_reaches_the_difficulty():
    """Weights are constants for the optimiser even if the difficulty is not."""
    rows = difficulties(0).requires_grad_()
    rl, sft = calibrated()(rows)
    assert not rl.requires_grad
    assert not sft.requires_grad


@properties
@given(seed=seeds, rho=st.floats(0.0, 1.0), num_updates=st.integers(0, 3))
def test_state_round_trip_is_exact(seed, rho, num_updates):
    """A weighter restored from state_dict, or pickled, continues bit for bit."""
    weighter = calibrated(rho=rho)
    for step in range(num_updates):
        weighter.update(difficulties(seed + step) * 0.5)
    state = weighter.state_dict()
    restored = AdaptiveWeighter(**state["config"])
    restored.load_state_dict(state)
    copies = [weighter, restored, pickle.loads(pickle.dumps(weighter))]
    for copy in copies:
        copy.update(difficulties(seed + 9))
    reference, *others = [copy(difficulties(seed)).rl for copy in copies]
    for other in others:
        torch.testing.assert_close(other, reference, **EXACT)


def test_state_does_not_change_under_the_one_who_took_it():
    """Updates after state_dict() leave the taken state alone."""
    weighter = calibrated(rho=0.5)
    state = weighter.state_dict()
    before = state["statistics"].clone()
    weighter.update(difficulties(5))
    torch.testing.assert_close(state["statistics"], before, **EXACT)


def test_uncalibrated_state_round_trip():
    """The state of a weighter that has not begun is loadable, and it still asks for its calibration."""
    restored = AdaptiveWeighter()
    restored.load_state_dict(AdaptiveWeighter().state_dict())
    with pytest.raises(RuntimeError, match="calibrate_on_first=True"):
        restored(difficulties(0))


@properties
@given(seed=seeds)
def test_weights_do_not_depend_on_the_update_of_their_step(seed):
    """Weights before the update are those of the previous state; only later ones change."""
    rows, weighter, silent = difficulties(seed), calibrated(rho=0.0), calibrated(rho=0.0)
    weighter(rows)
    torch.testing.assert_close(weighter(rows).rl, silent(rows).rl, **EXACT)
    weighter.update(3 * rows)
    assert (weighter(rows).rl != silent(rows).rl).all()


def test_running_anchor_keeps_half_on_a_stationary_stream():
    """At rho = 0 the mean weight stays near one half when the difficulty does not change, also in batches of 4."""
    weighter = calibrated(rho=0.0, ema=0.98)
    means = []
    for step in range(300):
        rows = difficulties(1000 + step, 4)
        means.append(weighter(rows).rl.mean())
        weighter.update(rows)
    assert torch.stack(means[100:]).mean().item() == pytest.approx(0.5, abs=0.05)


def test_running_variance_is_right_for_batches_of_one():
    """The running spread of a stream of single rows approaches that of the stream."""
    weighter = calibrated(rho=0.0, ema=0.995)
    for row in difficulties(7, 4000):
        weighter.update(row[None])
    statistics = weighter.state_dict()["statistics"]
    assert statistics[3].sqrt().item() == pytest.approx(0.8, rel=0.1)


def test_buckets_have_their_own_scale():
    """The same difficulty is hard in a bucket of easy rows and easy in a bucket of hard ones."""
    weighter = convex(num_buckets=2)
    anchor = difficulties(0, 64)
    weighter.calibrate(torch.cat([anchor, 100 * anchor]), torch.arange(128) // 64)
    rl = weighter(anchor.mean().repeat(2), bucket=torch.tensor([0, 1], dtype=torch.uint8)).rl
    assert rl[0] > 0.5 > 0.05 > rl[1]


def test_update_leaves_empty_buckets_and_unusable_rows_alone():
    """A bucket without a usable row keeps its statistics."""
    weighter = AdaptiveWeighter(num_buckets=2, rho=0.0)
    weighter.calibrate(difficulties(0, 8), torch.arange(8) % 2)
    before = weighter.state_dict()["statistics"]
    weighter.update(torch.tensor([0.5, torch.nan, -1.0]), torch.tensor([0, 1, 1]))
    after = weighter.state_dict()["statistics"]
    torch.testing.assert_close(after[:, 1], before[:, 1], **EXACT)
    assert after[2, 0] > before[2, 0]


def test_history_tells_what_happened():
    """One entry per update: geometric mean difficulty and mean share of the rows that have one; the last 4096."""
    weighter = calibrated()
    rows = torch.tensor([0.1, 0.4, torch.nan])
    share = weighter(rows[:2]).rl
    weighter.update(rows)
    history = weighter.history
    assert history["difficulty"] == pytest.approx([0.2], rel=1e-4)
    assert history["rl_share"] == pytest.approx([share.mean().item()], rel=1e-5)
    for _ in range(5000):
        weighter.update(rows)
    assert len(weighter.history["difficulty"]) == 4096
    weighter.calibrate(difficulties(1))
    assert weighter.history == {"difficulty": [], "rl_share": []}


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
@pytest.mark.parametrize("num_buckets", [1, 2])
def test_state_has_a_dtype_of_its_own(first, second, num_buckets):
    """Calibrated in one dtype and used in another, weights and statistics are fp32 and those of fp32 up to rounding."""
    bucket = None if num_buckets == 1 else torch.arange(32) % 2
    weighter, plain = (convex(num_buckets=num_buckets, rho=0.5) for _ in range(2))
    for one, kinds in ((weighter, (first, second)), (plain, (torch.float32, torch.float32))):
        one.calibrate(difficulties(0).to(kinds[0]), bucket)
        one.update(difficulties(1).to(kinds[1]), bucket)
    found = weighter(difficulties(2).to(second), bucket=bucket)
    assert weighter.state_dict()["statistics"].dtype == found.rl.dtype == found.sft.dtype == torch.float32
    torch.testing.assert_close(found.rl, plain(difficulties(2), bucket=bucket).rl, rtol=0.0, atol=5e-3)  # fp16 rows


def test_difficulties_made_by_numpy():
    """fp64 rows from numpy work with a weighter that was calibrated in fp32."""
    weighter = calibrated()
    rows = torch.from_numpy(difficulties(1).numpy().astype("float64"))
    weighter.update(rows)
    torch.testing.assert_close(weighter(rows).rl, calibrated()(difficulties(1)).rl, **FORMULA_FP32)


@pytest.mark.parametrize("rho", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("ema", [0.0, 0.98])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 1e-45, 1e38, 1e300])
def test_no_value_spoils_the_statistics(rho, ema, value):
    """Whatever is among the rows, or alone, statistics stay finite and later weights are numbers."""
    weighter = calibrated(rho=rho, ema=ema)
    for rows in (torch.tensor([0.1, value], dtype=torch.float64), torch.tensor([value] * 3, dtype=torch.float64)):
        weighter.update(rows)
        statistics = weighter.state_dict()["statistics"]
        assert statistics.isfinite().all()
        assert (statistics[[1, 3]] >= 0).all()
    assert weighter(difficulties(1)).rl.isfinite().all()
    assert weighter(torch.tensor([1e9])).rl.item() >= weighter(torch.tensor([1e-5])).rl.item()


@pytest.mark.parametrize("bucket", [[0, -1], [0, 2]])
def test_buckets_out_of_range_are_refused(bucket):
    """-1 is not the last bucket; lists are taken like tensors."""
    weighter = convex(num_buckets=2)
    for use in (weighter.calibrate, weighter.update, weighter):
        if use is not weighter.calibrate:
            weighter.calibrate(difficulties(0, 8), [0, 1] * 4)
        with pytest.raises(ValueError, match=r"\[0, 2\)"):
            use(torch.tensor([0.1, 0.2]), bucket=bucket)


@pytest.mark.gpu
@needs_cuda
def test_buckets_out_of_range_on_a_device_do_not_wrap():
    """Such a row counts as one whose difficulty is NaN, and the device is not waited for."""
    weighter = convex(num_buckets=2, rho=0.0)
    weighter.calibrate(difficulties(0, 8).cuda(), torch.arange(8).cuda() % 2)
    rows, bucket = torch.tensor([0.1, 0.2, 0.3]).cuda(), torch.tensor([0, -1, 2]).cuda()
    with no_waits():
        weights = weighter(rows, bucket=bucket)
        weighter.update(rows, bucket)
    assert weights.rl[1:].tolist() == [0.0, 0.0]
    assert weights.rl[0] > 0
    plain = convex(num_buckets=2, rho=0.0)
    plain.calibrate(difficulties(0, 8), torch.arange(8) % 2)
    plain.update(torch.tensor([0.1]), torch.tensor([0]))
    torch.testing.assert_close(
        weighter.state_dict()["statistics"].cpu(), plain.state_dict()["statistics"], **FORMULA_FP32
    )


def test_weights_survive_another_default_dtype():
    """A trainer's torch.set_default_dtype does not leak into the weights."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        weighter = calibrated(w_min=0.1)
        weighter.update(difficulties(1))
        assert weighter(difficulties(0).float()).rl.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_use_before_calibration_is_an_error():
    """The message names both ways out; calibrate_on_first and rho = 0 are such ways."""
    rows = difficulties(0)
    for use in (AdaptiveWeighter().update, AdaptiveWeighter()):
        with pytest.raises(RuntimeError, match=r"calibrate\(difficulty\).*calibrate_on_first=True"):
            use(rows)
    for weighter in (convex(calibrate_on_first=True), convex(rho=0.0)):
        assert weighter(rows).rl.mean().item() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    "option",
    [
        {"kappa": float("inf")},
        {"kappa": -1.0},
        {"rho": 1.5},
        {"w_min": 0.8, "w_max": 0.2},
        {"direction": "easy"},
        {"mode": "sum"},
        {"floor": 0.0},
        {"ema": 1.0},
        {"num_buckets": 0},
    ],
)
def test_options_out_of_range_are_refused(option):
    """The message says which range was expected."""
    with pytest.raises(ValueError, match="AdaptiveWeighter expected"):
        AdaptiveWeighter(**option)


def test_wrong_rows_are_refused():
    """Shapes, missing buckets, scores instead of distances and thin calibrations are named."""
    with pytest.raises(ValueError, match=r"tensor \[B\]"):
        calibrated()(torch.rand(4, 1))
    with pytest.raises(ValueError, match="integers"):
        calibrated()(torch.rand(4), bucket=torch.zeros(4))
    with pytest.raises(ValueError, match="`bucket`"):
        AdaptiveWeighter(num_buckets=3).calibrate(torch.rand(9))
    with pytest.raises(ValueError, match="larger = harder"):
        AdaptiveWeighter().calibrate(torch.tensor([-30.0, -25.0]))
    with pytest.raises(ValueError, match="two finite"):
        AdaptiveWeighter(num_buckets=2).calibrate(torch.rand(4), torch.tensor([0, 0, 0, 1]))
    with pytest.raises(ValueError, match="options"):
        AdaptiveWeighter().load_state_dict(AdaptiveWeighter(kappa=3.0).state_dict())


@properties
@given(seed=seeds, kappa=kappas)
def test_additive_keeps_rl_and_fades_sft_in(seed, kappa):
    """The default gives rl = 1 everywhere, and the SFT weight of convex mode, which grows as errors shrink."""
    rows = difficulties(seed)
    rl, sft = calibrated(kappa=kappa, mode="additive")(rows)
    torch.testing.assert_close(rl, torch.ones(32), **EXACT)
    torch.testing.assert_close(sft, calibrated(kappa=kappa)(rows).sft, **EXACT)
    assert (calibrated(kappa=kappa, mode="additive")(0.5 * rows).sft >= sft).all()
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
