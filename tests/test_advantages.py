"""Advantages: TRL's own lines, DDPO's history, and no signal out of nothing."""

import ast
import inspect
import pickle
import textwrap
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.advantages import (
    RewardMemory,
    combine_advantages,
    group_advantages,
    rank_advantages,
)
from tests.tolerances import EXACT, FORMULA_FP32, OTHER_PACKAGE

properties = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def rewards_with_gaps(seed: int, num_groups: int = 6, size: int = 4, columns: int = 1):
    """fp64 rewards in consecutive groups of one size, some not scored, and their ids."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(num_groups * size, columns, generator=generator, dtype=torch.float64)
    rewards[torch.rand(rewards.shape, generator=generator) < 0.15] = torch.nan
    return rewards, torch.arange(num_groups).repeat_interleave(size)


@cache
def trl_statements():
    """TRL's own trainer between its rewards and its final advantages, as a code object, and the names it may use."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    source = inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions)
    body = ast.parse(textwrap.dedent(source)).body[0].body

    def assigns(node: ast.stmt, name: str) -> bool:
        return isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name

    first = next(i for i, node in enumerate(body) if assigns(node, "unscorable_mask"))
    last = next(i for i, node in enumerate(body) if i > first and assigns(node, "advantages"))
    return compile(ast.Module(body[first : last + 1], []), "trl", "exec"), vars(grpo_trainer)


def trl_advantages(rewards, weights, num_generations, **options):
    """Run those statements on these rewards."""
    code, module_names = trl_statements()
    trainer = SimpleNamespace(reward_weights=torch.tensor(weights), reward_funcs=[None] * len(weights), **options)
    names = {**module_names, "self": trainer, "device": "cpu", "num_generations": num_generations}
    names["rewards_per_func"] = rewards
    exec(code, names)
    return names["advantages"]


@pytest.mark.slow  # importing TRL
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("seed", range(5))
def test_group_advantages_are_those_of_trl(scale, seed):
    """All three scales equal the statements of the installed TRL trainer, rows without a score included."""
    rewards, groups = rewards_with_gaps(seed)
    expected = trl_advantages(rewards, [1.0], 4, scale_rewards=scale, multi_objective_aggregation="sum_then_normalize")
    torch.testing.assert_close(group_advantages(rewards[:, 0], groups, scale=scale).values, expected, **OTHER_PACKAGE)


@pytest.mark.slow  # importing TRL
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("order", ["normalize_then_sum", "sum_then_normalize"])
@pytest.mark.parametrize("seed", range(5))
def test_combined_advantages_are_those_of_trl(order, seed):
    """Both orders equal the statements of the installed TRL trainer, with three rewards and missing scores.

    A plain sum only if a row has all scores or none: TRL counts a missing one as 0.
    """
    rewards, groups = rewards_with_gaps(seed, columns=3)
    if order == "sum_then_normalize":
        rewards[rewards.isnan().any(1)] = torch.nan
    weights = [0.5, 2.0, 1.0]
    expected = trl_advantages(rewards, weights, 4, scale_rewards="group", multi_objective_aggregation=order)
    result = combine_advantages(rewards, groups, weights=weights, order=order, scale="group")
    torch.testing.assert_close(result.values[result.has_signal], expected[result.has_signal], **OTHER_PACKAGE)


@properties
@given(seed=seeds, name=st.sampled_from(["group", "batch", "none", "rank"]))
def test_advantages_follow_their_rows_and_sum_to_zero(seed, name):
    """Every kind is permutation-equivariant and has mean 0 over each group's scored rollouts."""
    rewards, groups = rewards_with_gaps(seed)

    def kind(values, ids):
        return rank_advantages(values, ids) if name == "rank" else group_advantages(values, ids, scale=name)

    values, has_signal = kind(rewards[:, 0], groups)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
    permuted = kind(rewards[order, 0], groups[order])
    torch.testing.assert_close(permuted.values, values[order], **FORMULA_FP32)
    assert (permuted.has_signal == has_signal[order]).all()
    sums = torch.zeros(6, dtype=torch.float64).index_add_(0, groups, values)
    torch.testing.assert_close(sums, torch.zeros_like(sums), **FORMULA_FP32)
    assert (values[rewards[:, 0].isnan()] == 0).all()


@pytest.mark.parametrize("kind", [group_advantages, rank_advantages])
def test_group_without_spread_has_no_signal(kind):
    """Equal rewards, one scored rollout, and spreads below the floor give exactly 0 and has_signal=False."""
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.7, torch.nan, torch.nan, 5.0, 5.001, 4.999, 0.0, 1.0, 2.0])
    groups = torch.arange(4).repeat_interleave(3)
    values, has_signal = kind(rewards, groups, std_floor=0.01)
    assert has_signal.tolist() == [False] * 9 + [True] * 3
    torch.testing.assert_close(values[:9], torch.zeros(9), **EXACT)
    assert kind(rewards, groups).has_signal.tolist() == [False] * 6 + [True] * 6


def test_group_scale_amplifies_noise_and_batch_scale_does_not():
    """A thousandth of the spread becomes the same advantage with "group", and a thousandth of it with "batch"."""
    rewards = torch.tensor([0.0, 1.0, 0.0, 1e-3])
    groups = torch.tensor([0, 0, 1, 1])
    by_group, by_batch = (group_advantages(rewards, groups, scale=scale).values for scale in ("group", "batch"))
    assert by_group[3] > 0.8 * by_group[1]
    assert by_batch[3] == pytest.approx(1e-3 * by_batch[1].item(), rel=1e-3)


def test_ranks_share_ties_and_ignore_size():
    """Ties get their mean rank, other groups and missing scores change nothing, and outliers do not matter."""
    rewards = torch.tensor([3.0, 9.0, 1.0, torch.nan, 1.0, 3.0, 1e9, 5.0])
    groups = torch.tensor([0, 1, 0, 0, 0, 0, 1, 1])
    expected = torch.tensor([2 / 3, 0.0, -2 / 3, 0.0, -2 / 3, 2 / 3, 1.0, -1.0])
    torch.testing.assert_close(rank_advantages(rewards, groups).values, expected, **FORMULA_FP32)


def test_normalising_first_makes_weights_free_of_scale():
    """Multiplying one reward by 100 changes nothing with GDPO, and everything in the plain sum."""
    rewards, groups = rewards_with_gaps(0, columns=2)
    larger = rewards * torch.tensor([1.0, 100.0], dtype=torch.float64)
    for order, same in (("normalize_then_sum", True), ("sum_then_normalize", False)):
        plain, scaled = (combine_advantages(r, groups, weights=[1.0, 1.0], order=order) for r in (rewards, larger))
        assert torch.allclose(plain.values, scaled.values, atol=0.02) == same


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("order", ["normalize_then_sum", "sum_then_normalize"])
def test_a_missing_score_never_wins(order, scale):
    """Rewards that are never above 0: the rollout that lacks one is not better than those that have it."""
    rewards = torch.tensor([[5.0, -40.0], [5.0, torch.nan], [5.0, -40.0], [5.0, -41.0]])
    groups = torch.zeros(4, dtype=torch.int64)
    values, has_signal = combine_advantages(rewards, groups, weights=[1.0, 1.0], order=order, scale=scale)
    assert has_signal.tolist() == [True, False, True, True]
    assert values[1] == 0
    alone = combine_advantages(rewards[[0, 2, 3]], groups[:3], weights=[1.0, 1.0], order=order, scale=scale).values
    if order == "sum_then_normalize":
        torch.testing.assert_close(values[[0, 2, 3]], alone, **FORMULA_FP32)
    assert values[0] > 0 > values[3]


def test_a_sum_is_compared_within_the_rewards_of_its_input():
    """A reward that scored no rollout of an input is left out there; one with weight 0 is not looked at."""
    nan = torch.nan
    rewards = torch.tensor([[1.0, nan, nan], [3.0, nan, 0.0], [1.0, -40.0, nan], [3.0, nan, nan], [3.0, -41.0, nan]])
    groups = torch.tensor([0, 0, 1, 1, 1])
    options = {"weights": [1.0, 1.0, 0.0], "order": "sum_then_normalize", "scale": "none"}
    values, has_signal = combine_advantages(rewards, groups, **options)
    torch.testing.assert_close(values, torch.tensor([-1.0, 1.0, -0.5, 0.0, 0.5]), **FORMULA_FP32)
    assert has_signal.tolist() == [True, True, True, False, True]


def test_both_functions_scale_alike_by_default():
    """One reward combined by its sum is that reward's advantage."""
    rewards, groups = rewards_with_gaps(0)
    combined = combine_advantages(rewards, groups, weights=[1.0], order="sum_then_normalize")
    torch.testing.assert_close(combined.values, group_advantages(rewards[:, 0], groups).values, **EXACT)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, 3e38, -3e38, 1e300])
def test_advantages_are_finite_whatever_the_rewards_are(value):
    """Infinite rewards are not scored; finite ones whose spread overflows say nothing; the memory forgets both."""
    groups, ids = torch.tensor([0, 0, 1, 1]), torch.arange(2)
    rewards = torch.tensor([value, -value, 1.0, 2.0], dtype=torch.float64).float()
    for kind in (group_advantages, rank_advantages):
        assert kind(rewards, groups).values.isfinite().all()
    for order in ("normalize_then_sum", "sum_then_normalize"):
        assert combine_advantages(rewards[:, None], groups, weights=[1.0], order=order).values.isfinite().all()
    memory = RewardMemory(2, length=2)
    memory.update(torch.tensor([value, 1.0], dtype=torch.float64), ids)
    assert not memory.state_dict()["rewards"].isinf().any()
    for _ in range(3):
        memory.update(torch.tensor([1.0, 2.0]), ids)
        assert memory.advantages(torch.tensor([1.0, 2.0]), ids).values.isfinite().all()


def test_options_are_checked():
    """Unknown names and a wrong number of weights are named."""
    rewards, groups = torch.rand(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(ValueError, match="'global'"):
        group_advantages(rewards, groups, scale="global")
    with pytest.raises(ValueError, match=r"\[B, 2\]"):
        combine_advantages(rewards[:, None], groups, weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="'mean'"):
        combine_advantages(rewards[:, None], groups, weights=[1.0], order="mean")
    with pytest.raises(ValueError, match="not 0"):
        combine_advantages(rewards[:, None], groups, weights=[0.0])
    for weight in (float("nan"), float("inf"), -1e39):
        with pytest.raises(ValueError, match="finite in float32"):
            combine_advantages(torch.rand(4, 2), groups, weights=[weight, 1.0])


def test_memory_measures_against_the_history_of_the_input():
    """After `length` rewards the last ones of that input are the yardstick; DDPO's formula, written out."""
    generator = torch.Generator().manual_seed(0)
    memory, history = RewardMemory(5, length=4), {0: [], 3: []}
    for _ in range(6):
        rewards, inputs = torch.randn(4, generator=generator), torch.tensor([0, 3, 0, 3])
        memory.update(rewards, inputs)
        for reward, index in zip(rewards.tolist(), inputs.tolist(), strict=True):
            history[index].append(reward)
    past = [torch.tensor(history[index][-4:], dtype=torch.float64) for index in inputs.tolist()]
    expected = [
        (reward.double() - own.mean()) / (own.std(correction=0) + 1e-6)
        for reward, own in zip(rewards, past, strict=True)
    ]
    torch.testing.assert_close(
        memory.advantages(rewards, inputs).values.double(), torch.stack(expected), **FORMULA_FP32
    )


def test_memory_falls_back_to_the_batch_until_filled():
    """With too short a history the batch's mean and population std count."""
    memory, rewards = RewardMemory(5, length=16), torch.tensor([1.0, 2.0, 3.0, torch.nan])
    inputs = torch.tensor([0, 1, 2, 3])
    memory.update(rewards, inputs)
    expected = torch.tensor([-1.0, 0.0, 1.0, 0.0]) / ((2 / 3) ** 0.5 + 1e-6)
    torch.testing.assert_close(memory.advantages(rewards, inputs).values, expected, **FORMULA_FP32)


def test_memory_clips_and_knows_when_there_is_no_signal():
    """Outliers stop at the clip; a history of equal rewards has no signal; NaN is not remembered."""
    memory, input_0 = RewardMemory(1, length=3), torch.zeros(1, dtype=torch.int64)
    for _ in range(3):
        memory.update(torch.tensor([0.1, torch.nan]), torch.zeros(2, dtype=torch.int64))
    result = memory.advantages(torch.tensor([0.1]), input_0)
    assert result.has_signal.tolist() == [False]
    memory.update(torch.tensor([0.2]), input_0)
    assert memory.advantages(torch.tensor([99.0]), input_0).values.item() == 5.0


def test_memory_keeps_the_last_of_more_rollouts_than_slots():
    """Eight rollouts of one input leave the last `length` of them."""
    memory = RewardMemory(2, length=3)
    memory.update(torch.arange(8.0), torch.ones(8, dtype=torch.int64))
    assert sorted(memory.state_dict()["rewards"][1].tolist()) == [5.0, 6.0, 7.0]


def test_memory_state_round_trip_is_exact():
    """A restored or pickled memory continues bit for bit; a foreign one is refused."""
    memory = RewardMemory(3, length=2)
    memory.update(torch.rand(6, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3)
    restored = RewardMemory(3, length=2)
    restored.load_state_dict(memory.state_dict())
    rewards, inputs = torch.tensor([0.3, 0.4]), torch.tensor([0, 2])
    expected = memory.advantages(rewards, inputs).values
    for other in (restored, pickle.loads(pickle.dumps(memory))):
        torch.testing.assert_close(other.advantages(rewards, inputs).values, expected, **EXACT)
    with pytest.raises(ValueError, match="shape"):
        RewardMemory(4, length=2).load_state_dict(memory.state_dict())
