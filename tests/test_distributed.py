"""Two processes see what one process with all rows would see."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from iqareward.groups import gather_rows, group_statistics
from iqareward.weighting import AdaptiveWeighter
from tests.tolerances import EXACT, FORMULA_FP32

# Processes get unequal shares of the rows, as the last batch of an epoch does.
CUTS = (0, 5, 16)


def rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Difficulties, ids whose groups cross the processes, and bins."""
    difficulty = torch.rand(16, generator=torch.Generator().manual_seed(0)) + 0.05
    difficulty[3] = torch.nan
    return difficulty, torch.arange(16) % 3, torch.arange(16) % 2


def work(rank: int, folder: str) -> None:
    """One of two processes: everything that talks to the other, on its own rows."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        own = slice(CUTS[rank], CUTS[rank + 1])
        difficulty, groups, bins = (tensor[own] for tensor in rows())
        (everything, all_groups), mine = gather_rows(difficulty, groups)
        weighter = AdaptiveWeighter(num_bins=2, mode="convex")
        weighter.calibrate(difficulty, bins)
        result = {
            "statistics": [field[mine] for field in group_statistics(everything, all_groups)],
            "gathered": everything,
            "mine": everything[mine],
            "rl": weighter(difficulty, bins=bins).rl,
            "anchor": weighter.state_dict()["anchor"],
        }
        torch.save(result, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What both processes found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.start_processes(work, args=(str(folder),), nprocs=2, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.slow
def test_statistics_are_those_of_the_whole_batch(results):
    """Each process gets its own rows of the statistics over both, groups crossing the border included."""
    difficulty, groups, _ = rows()
    for field, expected in enumerate(group_statistics(difficulty, groups)):
        found = torch.cat([result["statistics"][field] for result in results])
        torch.testing.assert_close(found, expected, equal_nan=True, **FORMULA_FP32)


@pytest.mark.slow
def test_gathered_rows_are_all_rows_in_order(results):
    """Both processes hold all rows; their slice of them is what they gave."""
    difficulty, _, _ = rows()
    for result in results:
        torch.testing.assert_close(result["gathered"], difficulty, equal_nan=True, **EXACT)
    torch.testing.assert_close(torch.cat([r["mine"] for r in results]), difficulty, equal_nan=True, **EXACT)


@pytest.mark.slow
def test_weights_do_not_depend_on_the_number_of_processes(results):
    """Calibration and weights of two processes are those of one; both hold the same anchor."""
    difficulty, _, bins = rows()
    alone = AdaptiveWeighter(num_bins=2, mode="convex")
    alone.calibrate(difficulty, bins)
    expected = alone(difficulty, bins=bins).rl
    torch.testing.assert_close(torch.cat([result["rl"] for result in results]), expected, **FORMULA_FP32)
    torch.testing.assert_close(results[0]["anchor"], results[1]["anchor"], **EXACT)
