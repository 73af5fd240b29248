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
    Schedule,
    constant,
    cosine,
    gate,
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
}
CONVEX = ("constant", "cosine", "gate")
properties = settings(deadline=None, max_examples=25, derandomize=True)


def rows(num: int = 16) -> torch.Tensor:
    """Values in (0, 1), difficulties and pass rates alike."""
    return torch.rand(num, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.01


@pytest.mark.parametrize("name", WEIGHTERS)
def test_all_share_one_protocol(name):
    """Same call, finite weights >= 0, no RL without signal, nothing for invalid rows, exact state, picklable."""
    weighter = copy.deepcopy(WEIGHTERS[name])
    has_signal, valid = torch.arange(16) % 2 > 0, torch.arange(16) % 3 > 0
    signal = {weighter.signal: rows().requires_grad_()}
    for _ in range(6):
        rl, sft = weighter(**signal, bins=torch.zeros(16, dtype=torch.int64), has_signal=has_signal, valid=valid)
        assert rl.shape == sft.shape == (16,)
        assert rl.dtype == sft.dtype == torch.float32
        assert not rl.requires_grad
        assert not sft.requires_grad
        assert ((rl >= 0) & (sft >= 0) & rl.isfinite() & sft.isfinite()).all()
        assert (rl[~has_signal] == 0).all()
        assert (rl[~valid] == 0).all()
        assert (sft[~valid] == 0).all()
        if name in CONVEX:
            torch.testing.assert_close((rl + sft)[valid], torch.ones(16)[valid], **FORMULA_FP32)
        weighter.update(**signal)
    restored = copy.deepcopy(WEIGHTERS[name])
    restored.load_state_dict(weighter.state_dict())
    for other in (restored, pickle.loads(pickle.dumps(weighter))):
        torch.testing.assert_close(other(**signal).rl, weighter(**signal).rl, **EXACT)


@pytest.mark.parametrize("name", WEIGHTERS)
def test_rows_without_a_value_are_never_nan(name):
    """A NaN signal gives finite weights, and SFT where the formula depends on it."""
    weighter = copy.deepcopy(WEIGHTERS[name])
    weighter(**{weighter.signal: rows()})
    rl, sft = weighter(**{weighter.signal: torch.tensor([torch.nan, 0.5, torch.nan])})
    assert rl.isfinite().all()
    assert sft.isfinite().all()
    if name not in ("adaptive", "constant", "cosine"):
        assert rl[0] == 0


@pytest.mark.parametrize("weighter", [Schedule(gate), Schedule(soft_gate, pass_distance=0.1)])
def test_adapters_refuse_what_does_not_go_by_difficulty(weighter):
    """They give weightings a distance, which a gate would take for a pass rate."""
    fidelity = TRLReward("gmsd", "restored", references="clean")
    for adapter in (
        lambda: adaptive_aggregation(weighter, lambda samples: rows()),
        lambda: adaptive_trainer(object, weighter, fidelity),
    ):
        with pytest.raises(ValueError, match="`signal` is 'difficulty'"):
            adapter()


def test_the_wrong_signal_is_refused():
    """A difficulty is never taken for a pass rate, nor the other way round, by name or by position."""
    with pytest.raises(TypeError, match=r"`pass_rate=`.*got \['difficulty'\]"):
        Schedule(gate)(rows())
    with pytest.raises(TypeError, match=r"`difficulty=`.*got \['pass_rate'\]"):
        Schedule(softmax_batch)(pass_rate=rows())
    with pytest.raises(TypeError, match="`pass_rate=`"):
        Schedule(gate)(rows(), pass_rate=rows())
    with pytest.raises(TypeError, match="positional"):
        gate(rows())
    with pytest.raises(TypeError, match="pass_rate"):
        AdaptiveWeighter(calibrate_on_first=True)(pass_rate=rows())


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
    assert gate(pass_rate=solved, threshold=0.25).rl.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert gate(pass_rate=solved, threshold=0.25, direction="hard_to_rl").rl.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    soft = soft_gate(pass_rate=solved)
    assert soft.rl.tolist() == [0, 0, 0.125, 0.25, 0.5, 1, 1, 1, 1]
    assert soft.sft.tolist() == [1, 1, 0.5, 0.25, 0.125, 0, 0, 0, 0]
    assert soft_gate(pass_rate=solved, direction="hard_to_rl").rl.tolist() == soft.rl.flip(0).tolist()


@pytest.mark.parametrize("formula", [gate, soft_gate, logistic_success])
@pytest.mark.parametrize("value", [-0.1, 1.5, torch.inf])
def test_distances_are_no_pass_rates(formula, value):
    """A pass rate outside [0, 1] is an error on the CPU; NaN and rounding are none."""
    with pytest.raises(ValueError, match=rf"{formula.__name__} expected `pass_rate` in \[0, 1\].*pass_rate\("):
        Schedule(formula)(pass_rate=torch.tensor([0.5, value]))
    formula(pass_rate=torch.tensor([torch.nan, 0.0, 1 + 1e-6]))
    weights = formula(pass_rate=torch.empty(2, device="meta"))  # stands for any device that would have to be waited for
    assert weights.rl.shape == (2,)


def test_logistic_success_is_the_published_factor():
    """GRPO-LEAD's factor for rollouts with a positive advantage."""
    expected = 0.4 + 1.1 / (1 + torch.exp(10 * (torch.tensor([0.1, 0.9]) - 0.75)))
    torch.testing.assert_close(logistic_success(pass_rate=torch.tensor([0.1, 0.9])).rl, expected, **FORMULA_FP32)


@properties
@given(seed=st.integers(0, 2**31 - 1), temperature=st.floats(0.5, 5.0))
def test_softmax_has_mean_one_over_what_counts(seed, temperature):
    """Weights have mean 1 over the counted rows, follow d^(1/T), and hopeless rows change nothing."""
    difficulty = torch.exp(torch.randn(12, generator=torch.Generator().manual_seed(seed)))
    has_signal = torch.arange(12) % 4 > 0
    rl = Schedule(partial(softmax_batch, temperature=temperature))(difficulty, has_signal=has_signal).rl
    powers = torch.where(has_signal, difficulty.double() ** (1 / temperature), 0.0)
    torch.testing.assert_close(rl.double(), 9 * powers / powers.sum(), **FORMULA_FP32)
