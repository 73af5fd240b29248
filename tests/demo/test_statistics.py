"""The demo's rank correlation against SciPy's."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from iqareward.demo.statistics import above_original, spearman
from tests.tolerances import OTHER_PACKAGE

stats = pytest.importorskip("scipy.stats", reason="SciPy comes with scikit-image")


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(-3, 3), min_size=3, max_size=8).filter(lambda scores: len(set(scores)) > 1))
def test_spearman_agrees_with_scipy(scores: list[int]) -> None:
    """Also with ties, which share their mean rank."""
    levels = np.arange(len(scores))
    ours = spearman(torch.tensor(scores, dtype=torch.float32), torch.from_numpy(levels))
    expected = torch.tensor(stats.spearmanr(scores, levels).statistic, dtype=torch.float64)
    torch.testing.assert_close(ours, expected, **OTHER_PACKAGE)


def test_spearman_is_signed_and_batched() -> None:
    """Falling scores give -1, rising ones +1, a row each."""
    levels = torch.arange(4)
    rows = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.1, 0.2, 0.3, 0.4]])
    expected = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(spearman(rows, levels), expected, **OTHER_PACKAGE)


@pytest.mark.parametrize("scores", [[1.0, 1.0, 1.0], [3.0, math.nan, 1.0]])
def test_spearman_is_undefined_without_an_order(scores: list[float]) -> None:
    """Equal scores have no order and a missing score no rank: NaN, not 0."""
    assert spearman(torch.tensor(scores), torch.arange(3)).isnan()


def test_above_original_needs_a_higher_score() -> None:
    """A tie with the original is no mistake, and a missing score is none either."""
    scores = torch.tensor([0.5, 0.6, 0.5, 0.4, math.nan])
    assert above_original(scores).tolist() == [True, False, False, False]
