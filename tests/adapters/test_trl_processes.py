"""The adaptive trainer in two processes: a prompt's difficulty is that of all its completions, wherever they are."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from iqareward.adapters.trl import _per_prompt
from tests.tolerances import EXACT

DISTANCES = torch.tensor([1.0, 3.0, 5.0, torch.nan, 2.0, 4.0, torch.nan, torch.nan])


def work(rank: int, folder: str) -> None:
    """One of two processes, with half of the rows; groups of eight lie across both."""
    import accelerate

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # looked for by accelerate, not used
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        training = SimpleNamespace(training=True)
        found = []
        for size in (2, 4, 8):
            trainer = SimpleNamespace(accelerator=accelerator, model=training, num_generations=size)
            found.append(_per_prompt(trainer, DISTANCES[4 * rank : 4 * rank + 4]))
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_difficulty_over_two_processes(tmp_path) -> None:
    """Means over groups of two, four and eight consecutive rows, half of which the other process holds."""
    pytest.importorskip("accelerate")
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for size, *rows in zip((2, 4, 8), *halves, strict=True):
        expected = DISTANCES.view(-1, size).nanmean(1).repeat_interleave(size)
        torch.testing.assert_close(torch.cat(rows), expected, **EXACT, equal_nan=True)
