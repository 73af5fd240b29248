"""Batches from any map-style data set: grouped by size, checked, the same with any number of workers."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset
from torch.utils.data import Subset as TorchSubset

from iqareward.diffusion import RealESRGANDegradation, SyntheticPairs, batches, read_ahead
from iqareward.diffusion.pairs import InputOrder
from tests.tolerances import EXACT


class Foreign(torch.utils.data.Dataset):
    """A data set that draws random numbers, as users write them."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, object]:
        if index == 11:
            raise KeyError("no such file: eleven.png")
        noise = torch.rand(3, 8, 8) + float(np.random.rand()) + random.random()  # noqa: NPY002
        return {"degraded": noise / 3, "reference": torch.rand(3, 16, 16), "path": "a.png"}


def test_inputs_of_one_kind_share_a_batch():
    """Sizes, ground truth, prompts and tasks part inputs, in order of first appearance."""
    image = torch.rand(3, 8, 8)
    data = [
        {"lq": image, "gt": image},
        {"lq": image, "gt": image, "prompt": "sky", "task": None},
        {"lq": image, "gt": torch.rand(3, 16, 16)},
        {"degraded": image.half(), "reference": image.double()},
        {"lq": image},
    ]
    found = batches(data, [2, 3, 4, 0, 1])
    assert [batch.ids for batch in found] == [(2,), (3, 0), (4,), (1,)]
    assert [batch.prompts for batch in found] == [None, None, None, ("sky",)]
    assert found[2].references is None
    assert found[1].degraded.dtype == torch.float32


def test_pixels_that_are_not_finite_cost_one_input():
    """NaN or infinity in either image makes the input grey and not usable; the others are as they were."""
    good, bad = torch.rand(3, 8, 8), torch.rand(3, 8, 8)
    bad[0, 0, 0] = torch.nan
    endless = torch.rand(3, 8, 8)
    endless[1, 2, 3] = torch.inf
    data = [{"lq": good, "gt": good}, {"lq": good, "gt": bad}, {"lq": endless, "gt": good}]
    (batch,) = batches(data, [0, 1, 2])
    assert batch.usable.tolist() == [True, False, False]
    torch.testing.assert_close(batch.degraded[0], good, **EXACT)
    torch.testing.assert_close(batch.degraded[1:], torch.full((2, 3, 8, 8), 0.5), **EXACT)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (torch.zeros(3, 8, 8), "a mapping with 'lq', got Tensor"),
        ({"image": torch.zeros(3, 8, 8)}, "degraded image as 'lq', got the keys"),
        ({"lq": torch.zeros(1, 8, 8)}, r"float tensor \[3, h, w\] in \[0, 1\], got torch.float32 \[1, 8, 8\]"),
        ({"lq": torch.zeros(3, 8, 8, dtype=torch.uint8)}, "got torch.uint8"),
        ({"lq": np.zeros((8, 8, 3))}, "got ndarray"),
        ({"lq": torch.full((3, 8, 8), -1.0)}, "got -1 to -1"),
        ({"lq": torch.zeros(3, 8, 8), "gt": torch.full((3, 8, 8), 255.0)}, "'gt' as a float tensor"),
        ({"lq": torch.zeros(3, 8, 8), "degraded": torch.zeros(3, 8, 8)}, "'lq' or 'degraded', got both"),
        ({"lq": torch.zeros(3, 8, 8), "task": 3}, "'task' as a string, got int"),
    ],
)
def test_a_wrong_item_is_named(item, message):
    """The id and what was expected are in the message."""
    with pytest.raises(ValueError, match=f"Input 1: expected.*{message}"):
        batches([{"lq": torch.zeros(3, 8, 8)}, item], [0, 1])


def test_foreign_random_numbers_follow_the_id():
    """A random data set gives one item for an id, alone or not, in torch's wrappers too, and disturbs nobody."""
    states = torch.random.get_rng_state(), random.getstate()
    together, alone = batches(Foreign(), [1, 2, 3])[0], batches(Foreign(), [2])[0]
    torch.testing.assert_close(together.degraded[1], alone.degraded[0], **EXACT)
    assert not together.degraded[0].equal(together.degraded[1])
    wrapped = [batches(TorchSubset(ConcatDataset([Foreign()]), range(12)), ids)[0] for ids in ([1, 2], [2])]
    torch.testing.assert_close(wrapped[0].degraded[1], wrapped[1].degraded[0], **EXACT)
    assert states[0].equal(torch.random.get_rng_state())
    assert states[1] == random.getstate()


@pytest.mark.parametrize("data", [SyntheticPairs(12, size=32, degradation=RealESRGANDegradation(scale=2)), Foreign()])
def test_any_number_of_workers_reads_the_same(data):
    """In this process and in two workers, from the start and from a later update, also as one of two processes."""
    order = InputOrder(11, batch_size=4, seed=0)
    expected = [batches(data, order.ids(update))[0] for update in range(5)]
    for workers, start in ((0, 0), (2, 0), (2, 3)):
        found = [batch for (batch,) in read_ahead(data, order, range(start, 5), num_workers=workers)]
        assert [batch.ids for batch in found] == [batch.ids for batch in expected[start:]]
        for own, other in zip(found, expected[start:], strict=True):
            torch.testing.assert_close(own.degraded, other.degraded, **EXACT)
            torch.testing.assert_close(own.references, other.references, **EXACT)
    (half,) = next(read_ahead(data, order, [0], rank=1, world=2))
    assert half.ids == expected[0].ids[2:]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_keeps_its_message(workers):
    """What the data set raised arrives as it was, also from a worker."""
    order = InputOrder(12, batch_size=12, seed=0)
    with pytest.raises(KeyError) as raised:
        list(read_ahead(Foreign(), order, range(1), num_workers=workers))
    assert raised.value.args == ("no such file: eleven.png",)
