"""Difficulty: the sign is right for every kind of metric, rollouts share their input's value, and old entries fade."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.difficulty import (
    DifficultyMemory,
    blind_difficulty,
    pass_rate,
    reference_distance,
    rmse,
)
from tests.tolerances import EXACT, FORMULA_FP32

properties = settings(deadline=None, max_examples=25, derandomize=True)


def photos(num: int = 6, seed: int = 0) -> torch.Tensor:
    """Uniform noise images."""
    return torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


class Bounded:
    """A reward like SSIM: 1 for equal images, bounded above."""

    name, bounds = "bounded", (None, 1.0)

    def __call__(self, images, references=None, prompts=None, **ignored):
        return 1 - (images - references).abs().mean((1, 2, 3))


def test_rmse_is_the_root_of_the_mean_square():
    """Against the formula in fp64, for images and for latents."""
    images, references = photos(), photos(seed=1)
    expected = ((images.double() - references.double()) ** 2).mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(reference_distance(images, references).double(), expected, **FORMULA_FP32)
    assert rmse(torch.rand(2, 16, 4, 4), torch.rand(2, 16, 4, 4)).shape == (2,)


def test_every_kind_of_metric_grows_with_the_damage():
    """A bounded reward, a similarity and a distance all give larger numbers for worse images, and 0 for none."""
    clean = photos()
    metrics = (
        (rmse, None),
        (Bounded(), None),
        (lambda a, b: 1 - (a - b).abs().mean((1, 2, 3)), 1.0),
        (lambda a, b: (a - b).abs().mean((1, 2, 3)), 0.0),
    )
    for metric, best in metrics:
        none, some, more = (reference_distance((clean + shift), clean, metric, best=best) for shift in (0.0, 0.05, 0.1))
        torch.testing.assert_close(none, torch.zeros(6), **EXACT)
        assert (some > none).all()
        assert (more > some).all()


def test_metric_without_a_best_value_is_refused():
    """An unbounded metric must not be turned into a difficulty by a guess."""
    with pytest.raises(ValueError, match=r"best=1\.0 for SSIM"):
        reference_distance(photos(), photos(), lambda a, b: (a - b).mean((1, 2, 3)))
    with pytest.raises(ValueError, match="one shape"):
        reference_distance(photos(6), photos(2))


def test_groups_in_the_place_of_the_metric_are_refused():
    """Ids passed by position, as `group_advantages` takes them, are refused with the right spelling."""
    with pytest.raises(TypeError, match=r"`metric`.*got Tensor\. .*groups=\.\.\."):
        reference_distance(photos(), photos(seed=1), torch.arange(6))


def test_difficulty_is_detached_and_shared_by_rollouts():
    """Each rollout gets its input's mean over the rollouts that could be scored."""
    images = photos().requires_grad_()
    groups = torch.tensor([4, 9, 4, 9, 4, 1])

    def metric(a, b):
        scores = (a - b).abs().mean((1, 2, 3))
        return torch.where(torch.arange(6) == 2, torch.nan, scores)

    difficulty = reference_distance(images, photos(seed=1), metric, groups=groups, best=0.0)
    plain = reference_distance(images, photos(seed=1), metric, best=0.0)
    assert not difficulty.requires_grad
    assert plain[2].isnan()
    torch.testing.assert_close(difficulty[[0, 2, 4]], plain[[0, 4]].mean().repeat(3), **FORMULA_FP32)
    torch.testing.assert_close(difficulty[5], plain[5], **EXACT)


@properties
@given(seed=st.integers(0, 2**31 - 1))
def test_all_estimators_are_finite_or_nan(seed):
    """Whatever the scores contain, no estimator returns an infinity or a negative number."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(24, generator=generator) * 3
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf])
    scores[:6] = odd.repeat(2)
    groups = torch.randint(0, 8, (24,), generator=generator)
    for result in (
        pass_rate(scores, groups, threshold=0.5),
        blind_difficulty(scores, best=5.0),
        reference_distance(scores[:, None].expand(24, 4), torch.zeros(24, 4), groups=groups),
    ):
        assert not result.isinf().any()
        assert not (result < 0).any()


def test_estimators_by_hand():
    """Values that can be checked on paper."""
    rewards, groups = torch.tensor([1.0, 3.0, 4.0, torch.nan]), torch.tensor([0, 0, 1, 1])
    torch.testing.assert_close(pass_rate(rewards, groups, threshold=3.0), torch.tensor([0.5, 0.5, 1.0, 1.0]), **EXACT)
    torch.testing.assert_close(blind_difficulty(torch.tensor([2.0, 6.0]), best=5.0), torch.tensor([3.0, 0.0]), **EXACT)


def test_memory_is_an_average_of_the_past():
    """With no ageing the entry is the exponential average of its values, and rollouts count once."""
    memory = DifficultyMemory(4, half_life=1e9, decay=0.5)
    ids = torch.tensor([2, 2])
    for value in (1.0, 3.0):
        memory.update(torch.tensor([value - 0.5, value + 0.5]), ids)
    torch.testing.assert_close(memory.recall(ids), torch.full((2,), 2.0), **FORMULA_FP32)
    assert memory.recall(torch.tensor([0])).isnan().all()


def test_stale_entries_fade():
    """An entry not seen for long is recalled near the typical difficulty, and gives way to a new value."""
    memory = DifficultyMemory(3, half_life=2.0, decay=0.9)
    memory.update(torch.tensor([10.0, 1.0]), torch.tensor([0, 1]))
    fresh = memory.recall(torch.tensor([0])).item()
    for _ in range(20):
        memory.update(torch.tensor([1.0]), torch.tensor([1]))
    assert memory.recall(torch.tensor([0])).item() < 1.1 < fresh == 10.0
    memory.update(torch.tensor([4.0]), torch.tensor([0]))
    assert memory.recall(torch.tensor([0])).item() == pytest.approx(4.0, abs=0.02)


def test_memory_ignores_what_was_not_scored():
    """NaN leaves the entry and its age alone."""
    memory = DifficultyMemory(2, half_life=5.0)
    memory.update(torch.tensor([2.0, 3.0]), torch.tensor([0, 1]))
    before = memory.state_dict()
    memory.update(torch.tensor([torch.nan]), torch.tensor([0]))
    after = memory.state_dict()
    torch.testing.assert_close(after["values"], before["values"], **EXACT)
    torch.testing.assert_close(after["seen"], before["seen"], **EXACT)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e300])
def test_memory_never_takes_in_what_is_not_finite(value):
    """Alone or beside a healthy rollout, as the first value or later, in fp64 too; others' recall is not touched."""
    memory, ids = DifficultyMemory(3, half_life=1e9), torch.tensor([0, 1])
    for rows in ([value, 2.0], [1.0, 2.0], [value, 2.0]):
        memory.update(torch.tensor(rows, dtype=torch.float64), ids)
    assert memory.recall(ids).tolist() == [1.0, 2.0]
    memory.update(torch.tensor([1.0, value]), torch.tensor([0, 0]))
    assert memory.recall(ids).isfinite().all()


def test_memory_of_huge_difficulties():
    """Means of finite entries are finite, where their sum would overflow."""
    memory, ids = DifficultyMemory(4, half_life=1.0), torch.arange(4)
    for _ in range(3):
        memory.update(torch.full((4,), 3e38), ids)
    memory.update(torch.full((1,), 3e38), ids[:1])
    torch.testing.assert_close(memory.recall(ids), torch.full((4,), 3e38), **FORMULA_FP32)


def test_memory_state_round_trip_is_exact():
    """A restored or pickled memory recalls and continues bit for bit; a foreign one is refused."""
    memory = DifficultyMemory(8, half_life=3.0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        memory.update(torch.rand(4, generator=generator), torch.randint(0, 8, (4,), generator=generator))
    restored = DifficultyMemory(8, half_life=3.0)
    restored.load_state_dict(memory.state_dict())
    copy = pickle.loads(pickle.dumps(memory))
    for other in (restored, copy):
        other.update(torch.tensor([0.5]), torch.tensor([1]))
    memory.update(torch.tensor([0.5]), torch.tensor([1]))
    for other in (restored, copy):
        torch.testing.assert_close(
            other.recall(torch.arange(8)), memory.recall(torch.arange(8)), equal_nan=True, **EXACT
        )
    with pytest.raises(ValueError, match="9 inputs, got 8"):
        DifficultyMemory(9, half_life=3.0).load_state_dict(memory.state_dict())
    with pytest.raises(ValueError, match="half_life"):
        DifficultyMemory(9, half_life=0.0)
