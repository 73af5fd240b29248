"""Pieces that stay in a CPU's cache."""

import pytest
import torch

from iqareward.functional._chunks import CPU_PIXELS_PER_CHUNK, map_chunks, rows_at_once

CPU, OTHER = torch.device("cpu"), torch.device("meta")


@pytest.mark.parametrize(("side", "rows"), [(64, 64), (512, 1), (2048, 1), (0, CPU_PIXELS_PER_CHUNK)])
def test_rows_in_cache(side, rows):
    """On a CPU as many images as have so many pixels, at least one."""
    assert rows_at_once(torch.empty(100, 3, side, side, device="meta"), CPU) == rows


@pytest.mark.parametrize(
    ("side", "per_pixel", "rows"), [(512, 128, 128), (1024, 1024, 4), (16, 1024, 83), (9000, 64, 1)]
)
def test_rows_on_a_device(side, per_pixel, rows):
    """Elsewhere as many as 4 GiB of working memory allow, small ones as if networks enlarged them, at least one."""
    batch = torch.empty(100, 3, side, side, device="meta")
    assert rows_at_once(batch, OTHER, bytes_per_pixel=per_pixel) == rows


def test_map_chunks_calls_with_pieces():
    """Every row once, in order, in pieces that are not larger than they should be."""
    sizes = []

    def formula(rows):
        sizes.append(len(rows))
        return rows.flatten(1)[:, 0]

    batch = torch.arange(10.0)[:, None, None].expand(10, 256, 512)
    assert torch.equal(map_chunks(formula, batch), torch.arange(10.0))
    assert sizes == [2] * 5
