"""Statistics per input id: right, NaN-aware, indifferent to order, and exact where spreads are zero."""

import numpy as np
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
from iqareward.difficulty import (
    DifficultyMemory,
    blind_difficulty,
    pass_rate,
    reference_distance,
)
from iqareward.groups import (
    check_ids,
    check_rows,
    gather_rows,
    group_index,
    group_statistics,
    place_in_group,
)
from iqareward.weighting import AdaptiveWeighter
from tests.gpu import needs_cuda, no_waits, on_devices
from tests.tolerances import EXACT, FORMULA_FP32

properties = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def ragged(seed: int, num_rows: int = 40):
    """Values with a few NaN, under ids that are large, negative and of unequal frequency."""
    generator = torch.Generator().manual_seed(seed)
    values = 50 + torch.randn(num_rows, generator=generator)
    values[torch.rand(num_rows, generator=generator) < 0.2] = torch.nan
    ids = torch.tensor([-7, 0, 3, 10**12, 99])
    return values, ids[(torch.rand(num_rows, generator=generator) ** 2 * 5).long()]


@properties
@given(seed=seeds)
def test_statistics_are_those_of_a_loop_over_ids(seed):
    """Count, mean and Bessel-corrected std equal torch's on each id's finite values, in fp64."""
    values, groups = ragged(seed)
    result = group_statistics(values, groups)
    for row, group in enumerate(groups):
        own = values[(groups == group) & values.isfinite()].double()
        assert result.num_scored[row] == len(own)
        mean = own.mean() if len(own) else torch.tensor(torch.nan, dtype=torch.float64)
        std = own.std() if len(own) > 1 else torch.tensor(torch.nan, dtype=torch.float64)
        torch.testing.assert_close(result.mean[row].double(), mean, equal_nan=True, **FORMULA_FP32)
        torch.testing.assert_close(result.std[row].double(), std, equal_nan=True, **FORMULA_FP32)


@properties
@given(seed=seeds)
def test_statistics_follow_their_rows(seed):
    """Permuting the rows permutes the statistics."""
    values, groups = ragged(seed)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    for there, here in zip(
        group_statistics(values[order], groups[order]), group_statistics(values, groups), strict=True
    ):
        torch.testing.assert_close(there, here[order], equal_nan=True, **FORMULA_FP32)


@properties
@given(value=st.floats(-1e3, 1e3, width=32), size=st.integers(2, 9))
def test_equal_values_have_no_spread_at_all(value, size):
    """The std of equal values is exactly 0 and their mean exactly the value, although sum / n would round."""
    values = torch.full((size,), value)
    result = group_statistics(values, torch.zeros(size, dtype=torch.int64))
    torch.testing.assert_close(result.std, torch.zeros(size), **EXACT)
    torch.testing.assert_close(result.mean, values, **EXACT)


def test_infinite_values_are_not_scored():
    """+-inf count as little as NaN."""
    values = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, 3.0])
    result = group_statistics(values, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(result.mean, torch.full((5,), 2.0), **EXACT)
    assert result.num_scored.tolist() == [2] * 5


def test_no_rows_and_integer_rewards():
    """B = 0 gives B = 0; integers are computed in fp32, fp64 stays."""
    empty = group_statistics(torch.empty(0), torch.empty(0, dtype=torch.int64))
    assert empty.mean.shape == (0,)
    groups = torch.tensor([1, 1])
    assert group_statistics(torch.tensor([1, 2]), groups).mean.tolist() == [1.5, 1.5]
    assert group_statistics(torch.rand(2, dtype=torch.float64), groups).std.dtype == torch.float64


def test_index_and_places():
    """Ids become numbers below B; places count along the given order within each id."""
    groups = torch.tensor([5, -1, 5, 5, -1])
    index = group_index(groups)
    assert index.tolist() == [1, 0, 1, 1, 0]
    assert place_in_group(index, torch.arange(5).flip(0)).tolist() == [2, 1, 1, 0, 0]


def test_gather_without_a_process_group_is_the_identity():
    """A single process gets its own rows back, detached, and the slice of all of them."""
    rows = torch.rand(3, requires_grad=True)
    (gathered,), mine = gather_rows(rows)
    torch.testing.assert_close(gathered[mine], rows.detach(), **EXACT)
    assert not gathered.requires_grad
    with pytest.raises(ValueError, match="one number of rows"):
        gather_rows(torch.rand(3), torch.rand(2))


@pytest.mark.parametrize("values", [torch.rand(4, 1), [0.1, 0.2]])
def test_rows_that_are_not_one_value_each_are_refused(values):
    """The message names the caller and the expected shape."""
    with pytest.raises(ValueError, match="somebody expected"):
        check_rows("somebody", values)


INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
SPELLINGS = {
    **{f"tensor {name}": lambda ids, name=name: torch.tensor(ids).to(getattr(torch, name)) for name in INTEGERS},
    **{f"array {name}": lambda ids, name=name: np.array(ids, dtype=name) for name in INTEGERS},
    "list": list,
    "tuple": tuple,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_everything_with_ids_takes_any_integers(spelling):
    """Tensors of every integer dtype, arrays and lists mean the same to every function and memory."""
    rows, ids = torch.tensor([1.0, 3.0, 2.0, 5.0]), [0, 0, 1, 1]
    spelled = SPELLINGS[spelling](ids)

    def results(groups):
        memory, difficulty = RewardMemory(2, length=2), DifficultyMemory(2, half_life=5.0)
        memory.update(rows, groups)
        difficulty.update(rows, groups)
        weighter = AdaptiveWeighter(num_bins=2, mode="convex")
        weighter.calibrate(rows, groups)
        (gathered_rows, gathered_groups), _ = gather_rows(rows, groups)
        return [
            check_ids("test", groups, rows, size=2),
            memory.advantages(rows, groups).values,
            difficulty.recall(groups),
            weighter(rows, bins=groups).rl,
            group_statistics(rows, groups).mean,
            group_statistics(gathered_rows, gathered_groups).mean,
            group_advantages(rows, groups).values,
            rank_advantages(rows, groups).values,
            combine_advantages(rows[:, None], groups, weights=[1.0]).values,
            reference_distance(rows[:, None], torch.zeros(4, 1), groups=groups),
            pass_rate(rows, groups, threshold=2.0),
            blind_difficulty(rows, best=5.0, groups=groups),
        ]

    for found, expected in zip(results(spelled), results(torch.tensor(ids)), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (torch.zeros(3), ValueError),
        (torch.zeros(3, dtype=torch.bool), ValueError),
        ([0.0, 1.0, 2.0], ValueError),
        (torch.zeros(4, dtype=torch.int64), ValueError),
        (torch.zeros(3, 1, dtype=torch.int64), ValueError),
        (["a", "b", "c"], TypeError),
        (None, TypeError),
    ],
)
def test_what_is_no_id_is_refused(ids, error):
    """The message names the caller and says what ids are."""
    with pytest.raises(error, match="somebody expected"):
        check_ids("somebody", ids, torch.rand(3))


@pytest.mark.parametrize("wrong", [-1, 3])
def test_ids_out_of_range_are_refused_by_both_memories(wrong):
    """Neither the last input's entry nor one that does not exist is taken, and nothing is changed."""
    rows, ids = torch.tensor([1.0, 2.0]), torch.tensor([0, wrong])
    memory, difficulty = RewardMemory(3, length=1), DifficultyMemory(3, half_life=5.0)
    for one in (memory, difficulty):
        before = one.state_dict()
        with pytest.raises(ValueError, match=r"\[0, 3\)"):
            one.update(rows, ids)
        for name, value in one.state_dict().items():
            torch.testing.assert_close(value, before[name], equal_nan=True, **EXACT)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        memory.advantages(rows, ids)
    with pytest.raises(ValueError, match=r"\[0, 3\)"):
        difficulty.recall(ids)


@pytest.mark.gpu
@needs_cuda
def test_ids_out_of_range_on_a_device_touch_no_other_input():
    """Their rows are left out without waiting for the device, and every other entry stays as it was."""
    memory, difficulty = RewardMemory(3, length=1), DifficultyMemory(3, half_life=5.0)
    all_ids, wrong = torch.arange(3).cuda(), torch.tensor([-1, 3, 0]).cuda()
    rows, others = torch.tensor([1.0, 2.0, 4.0]).cuda(), torch.tensor([7.0, 8.0, 4.0]).cuda()
    for one in (memory, difficulty):
        one.update(rows, all_ids)
    with no_waits():
        for one in (memory, difficulty):
            one.update(others, wrong)
        advantages, recalled = memory.advantages(others, wrong), difficulty.recall(wrong)
    assert memory.state_dict()["rewards"][:3, 0].tolist() == [4.0, 2.0, 4.0]
    assert advantages.has_signal.tolist() == [False] * 3  # a history of length 1 has no spread
    assert difficulty.state_dict()["values"][1:].tolist() == [2.0, 4.0]
    assert recalled.isnan().tolist() == [True, True, False]


@on_devices
def test_statistics_never_wait_for_the_device(device):
    """No call in group_statistics makes the host wait for the GPU, and the numbers are those of the CPU."""
    values, groups = ragged(0)
    there = values.to(device), groups.to(device)
    with no_waits():
        result = group_statistics(*there)
    torch.testing.assert_close(result.std.cpu(), group_statistics(values, groups).std, equal_nan=True, **FORMULA_FP32)
