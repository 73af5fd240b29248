"""Some of the pairs, or all of them in memory, are the pairs they are made of."""

import pytest
import torch

from iqareward.diffusion.data.pairs import SyntheticPairs
from iqareward.diffusion.data.views import StoredPairs, Subset
from tests.tolerances import EXACT

PAIRS = SyntheticPairs(6, size=16)


def test_a_subset_counts_from_zero():
    """Its ids are places in the list it was given, in any order."""
    part = Subset(PAIRS, (5, 0, 2))
    assert len(part) == 3
    for found, expected in zip(part.batch([2, 0]), PAIRS.batch([2, 5]), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_subset_has_ids_of_its_pairs():
    """None, or one too many, is an error."""
    for ids in ((), (6,), (-1,)):
        with pytest.raises(ValueError, match=r"ids in \[0, 6\)"):
            Subset(PAIRS, ids)


def test_stored_pairs_are_the_pairs():
    """The same tensors for the same ids."""
    for found, expected in zip(StoredPairs.of(PAIRS).batch([4, 1]), PAIRS.batch([4, 1]), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
