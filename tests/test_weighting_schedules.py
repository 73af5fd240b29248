"""Published weightings: their formulas written out, and one protocol for all of them."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.adapters.flow_factory import adaptive_aggregation
from iqareward.adapters.trl import TRLReward, adaptive_trainer
from iqareward.schedules import (
    GradientNoise,
    NoiseAware,
    Schedule,
    TargetTracking,
    constant,
    cosine,
    gate,
    gradient_noise,
    logistic_success,
    soft_gate,
    softmax_batch,
)
from iqareward.weighting import AdaptiveWeighter
from tests.tolerances import EXACT, FORMULA_FP32

CHORD = {"peak": 0.9, "valley": 0.05, "warmup_steps": 4, "decay_steps": 8}
WEIGHTERS = {
    "adaptive": AdaptiveWeighter(calibrate_on_first=True),
    "constant": Schedule(partial(constant, share=0.25)),
    "cosine": Schedule(partial(cosine, **CHORD)),
    "gate": Schedule(gate),
    "soft_gate": Schedule(soft_gate),
    "logistic_success": Schedule(partial(logistic_success, sft=0.5)),
    "softmax_batch": Schedule(partial(softmax_batch, sft=0.5)),
    "target_tracking": TargetTracking(centre=-1.0),
    "noise_aware": NoiseAware(),
}
CONVEX = ("constant", "cosine", "gate", "target_tracking", "noise_aware")
properties = settings(deadline=None, max_examples=25, derandomize=True)


def rows(num: int = 16) -> torch.Tensor:
    """Values in (0, 1), difficulties and pass rates alike."""
    return torch.rand(num, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01


@pytest.mark.parametrize("name", WEIGHTERS)
def test_all_share_one_protocol(name):
    """Same call, finite weights >= 0, no RL without signal, nothing for invalid rows, exact state, picklable."""
    weighter = copy.deepcopy(WEIGHTERS[name])
    active, valid = torch.arange(16) % 2 > 0, torch.arange(16) % 3 > 0
    difficulty = rows().requires_grad_()
    for _ in range(6):
        rl, sft = weighter(difficulty, bucket=torch.zeros(16, dtype=torch.int64), active=active, valid=valid)
        assert rl.shape == sft.shape == (16,)
        assert rl.dtype == sft.dtype == torch.float32
        assert not rl.requires_grad
        assert not sft.requires_grad
        assert ((rl >= 0) & (sft >= 0) & rl.isfinite() & sft.isfinite()).all()
        assert (rl[~active] == 0).all()
        assert (rl[~valid] == 0).all()
        assert (sft[~valid] == 0).all()
        if name in CONVEX:
            torch.testing.assert_close((rl + sft)[valid], torch.ones(16)[valid], **FORMULA_FP32)
        weighter.update(difficulty)
    restored = copy.deepcopy(WEIGHTERS[name])
    restored.load_state_dict(weighter.state_dict())
    for other in (restored, pickle.loads(pickle.dumps(weighter))):
        torch.testing.assert_close(other(rows()).rl, weighter(rows()).rl, **EXACT)


@pytest.mark.parametrize("name", WEIGHTERS)
def test_rows_without_a_value_are_never_nan(name):
    """A NaN signal gives finite weights, and SFT where the formula depends on it."""
    weighter = copy.deepcopy(WEIGHTERS[name])
    weighter(rows())
    rl, sft = weighter(torch.tensor([torch.nan, 0.5, torch.nan]))
    assert rl.isfinite().all()
    assert sft.isfinite().all()
    if name not in ("adaptive", "constant", "cosine", "noise_aware"):
        assert rl[0] == 0


@pytest.mark.parametrize("weighter", [Schedule(gate), Schedule(soft_gate, pass_distance=0.1), NoiseAware()])
def test_adapters_refuse_what_does_not_go_by_difficulty(weighter):
    """They give weightings a distance, which a gate would take for a pass rate."""
    fidelity = TRLReward("gmsd", "restored", references="clean")
    for adapter in (
        lambda: adaptive_aggregation(weighter, lambda samples: rows()),
        lambda: adaptive_trainer(object, weighter, fidelity),
    ):
        with pytest.raises(ValueError, match="`signal` is 'difficulty'"):
            adapter()


def test_cosine_follows_chord():
    """Up to the peak, down a half cosine to the valley, and there it stays."""
    weighter = Schedule(partial(cosine, **CHORD))
    for step in range(20):
        expected = 0.9 * step / 4
        if step >= 4:
            expected = 0.05 + 0.85 * (1 + math.cos(math.pi * min(1.0, (step - 4) / 8))) / 2
        torch.testing.assert_close(weighter(torch.zeros(1)).sft, torch.tensor([expected]), **FORMULA_FP32)
        weighter.update(torch.zeros(1))


def test_gates_in_both_directions():
    """HPT gives solved inputs RL; the reverse gives them SFT; the soft table is read by eighths."""
    solved = torch.arange(9) / 8
    assert gate(solved, threshold=0.25).rl.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert gate(solved, threshold=0.25, direction="hard_to_rl").rl.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    soft = soft_gate(solved)
    assert soft.rl.tolist() == [0, 0, 0.125, 0.25, 0.5, 1, 1, 1, 1]
    assert soft.sft.tolist() == [1, 1, 0.5, 0.25, 0.125, 0, 0, 0, 0]
    assert soft_gate(solved, direction="hard_to_rl").rl.tolist() == soft.rl.flip(0).tolist()


@pytest.mark.parametrize("formula", [gate, soft_gate, logistic_success])
@pytest.mark.parametrize("value", [-0.1, 1.5, torch.inf])
def test_distances_are_no_pass_rates(formula, value):
    """A pass rate outside [0, 1] is an error on the CPU; NaN and rounding are none."""
    with pytest.raises(ValueError, match=rf"{formula.__name__} expected `pass_rate` in \[0, 1\].*pass_rate\("):
        Schedule(formula)(torch.tensor([0.5, value]))
    formula(torch.tensor([torch.nan, 0.0, 1 + 1e-6]))
    weights = formula(torch.empty(2, device="meta"))  # stands for any device that would have to be waited for
    assert weights.rl.shape == (2,)


def test_logistic_success_mirrors_for_negative_advantages():
    """GRPO-LEAD's factor, with 1 - P where the advantage is negative."""
    solved, advantages = torch.tensor([0.1, 0.1, 0.9]), torch.tensor([1.0, -1.0, -0.5])
    expected = 0.4 + 1.1 / (1 + torch.exp(10 * (torch.tensor([0.1, 0.9, 0.1]) - 0.75)))
    torch.testing.assert_close(logistic_success(solved, advantages=advantages).rl, expected, **FORMULA_FP32)


@properties
@given(seed=st.integers(0, 2**31 - 1), temperature=st.floats(0.5, 5.0))
def test_softmax_has_mean_one_over_what_counts(seed, temperature):
    """Weights have mean 1 over the counted rows, follow d^(1/T), and hopeless rows change nothing."""
    difficulty = torch.exp(torch.randn(12, generator=torch.Generator().manual_seed(seed)))
    active = torch.arange(12) % 4 > 0
    rl = softmax_batch(difficulty, temperature=temperature, active=active).rl
    powers = torch.where(active, difficulty.double() ** (1 / temperature), 0.0)
    torch.testing.assert_close(rl.double(), 9 * powers / powers.sum(), **FORMULA_FP32)


def test_target_tracking_holds_its_share():
    """Whatever the level of difficulty, the mean share settles at the target; an empty step moves nothing."""
    weighter = TargetTracking(centre=0.0, target=0.3, eta=0.1)
    for _ in range(400):
        weighter.update(0.01 * rows(256))
    assert weighter(0.01 * rows(256)).rl.mean().item() == pytest.approx(0.3, abs=0.01)
    before = weighter.state_dict()["centre"]
    weighter.update(torch.full((4,), torch.nan))
    assert weighter.state_dict()["centre"] == before


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, -1.0, 0.0, 1e38, 1e300])
def test_no_value_spoils_a_controller(value):
    """Centre, share and noise stay finite fp32, whatever comes first or later, in fp32 or in fp64."""
    for dtype in (torch.float32, torch.float64):
        bad = torch.tensor([value, value], dtype=dtype)
        tracking, noise = TargetTracking(centre=-1.0), NoiseAware()
        for _ in range(2):
            tracking.update(bad)
            tracking.update(torch.cat([bad, rows().to(dtype)]))
            noise.observe(GradientNoise(bad[0], bad[0], bad[0]))
            noise.observe(GradientNoise(*torch.tensor([3.0, 1.0, 2.0], dtype=dtype)))
        for state in (*tracking.state_dict().values(), *noise.state_dict().values()):
            assert state.dtype == torch.float32
            assert state.isfinite().all()
        assert 0 <= noise.share <= 1
        assert tracking(rows()).rl.isfinite().all()


def test_variances_near_the_end_of_their_range_give_their_share():
    """Three equal ones give a third each, although their sum overflows."""
    weighter = NoiseAware(max_step=1.0)
    weighter.observe(GradientNoise(*torch.full((3,), 3e38)))
    torch.testing.assert_close(weighter(torch.zeros(1)).sft, torch.tensor([1 / 3]), **FORMULA_FP32)


def test_gradient_noise_is_unbiased():
    """Over many draws the estimates average to the true variances and squared distance."""
    generator = torch.Generator().manual_seed(0)
    estimates = []
    for _ in range(2000):
        rl = torch.tensor([1.0, 0.0, 0.0]) + 0.5 * torch.randn(4, 3, generator=generator)
        sft = torch.tensor([0.0, 3.0, 0.0]) + 0.2 * torch.randn(4, 3, generator=generator)
        estimates.append(torch.stack(list(gradient_noise(rl, sft))))
    torch.testing.assert_close(torch.stack(estimates).mean(0), torch.tensor([0.75, 0.12, 10.0]), rtol=0.03, atol=0.0)
    with pytest.raises(ValueError, match="n, k >= 2"):
        gradient_noise(torch.rand(1, 3), torch.rand(4, 3))


def test_noise_share_minimises_the_error_of_the_mixture():
    """The share it settles at beats its neighbours in Monte Carlo mean squared error against the RL gradient."""
    weighter = NoiseAware(ema=0.0, max_step=1.0)
    weighter.observe(GradientNoise(torch.tensor(3.0), torch.tensor(0.5), torch.tensor(1.0)))
    share = weighter(torch.zeros(1)).sft.item()
    assert share == pytest.approx(3 / 4.5)

    def error(mu: float) -> float:
        return (1 - mu) ** 2 * 3.0 + mu**2 * (0.5 + 1.0)

    assert error(share) < min(error(share - 0.05), error(share + 0.05))


def test_noise_share_moves_in_capped_steps_and_skips_broken_measurements():
    """One observation moves the share by at most max_step; NaN moves nothing, not even as the first."""
    weighter = NoiseAware(share=0.5, max_step=0.1)
    bad = GradientNoise(torch.tensor(torch.nan), torch.tensor(1.0), torch.tensor(1.0))
    good = GradientNoise(torch.tensor(1e6), torch.tensor(1.0), torch.tensor(1.0))
    weighter.observe(bad)
    assert float(weighter.share) == 0.5
    weighter.observe(good)
    weighter.observe(bad)
    assert float(weighter.share) == pytest.approx(0.6)
