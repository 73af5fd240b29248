"""Pieces that stay in a CPU's cache."""

import pytest
import torch

from iqareward.functional._chunks import CPU_PIXELS_PER_CHUNK, map_chunks, rows_in_cache

CPU, OTHER = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(("side", "rows"), [(64, 64), (512, 1), (2048, 1), (0, CPU_PIXELS_PER_CHUNK)])
def test_rows_in_cache(side, rows):
    """On a CPU as many images as have so many pixels, at least one; elsewhere the whole batch."""
    batch = torch.empty(100, 3, side, side, device="meta")
    assert rows_in_cache(batch, CPU) == rows
    assert rows_in_cache(batch, OTHER) == 100


def test_map_chunks_calls_with_pieces():
    """Every row once, in order, in pieces that are not larger than they should be."""
    sizes = []

    def formula(rows):
        sizes.append(len(rows))
        return rows.flatten(1)[:, 0]

    batch = torch.arange(10.0)[:, None, None].expand(10, 256, 512)
    assert torch.equal(map_chunks(formula, batch), torch.arange(10.0))
    assert sizes == [2] * 5
