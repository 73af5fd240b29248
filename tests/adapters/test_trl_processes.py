"""The adaptive trainer in two processes: a prompt's difficulty is that of all its completions, wherever they are."""

import os
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from iqareward import AdaptiveWeighter, FullReference
from iqareward.adapters.trl import TRLReward, adaptive_trainer
from tests.tolerances import FORMULA_FP32

DISTANCES = torch.tensor([0.1, 0.3, 0.5, torch.nan, 0.2, 0.4, torch.nan, 0.6])


def closeness(images: Tensor, references: Tensor) -> Tensor:
    return 1 - (images - references).abs().mean((1, 2, 3))


class Trainer:
    """The two methods of TRL's trainers, with an advantage of 1 for every row."""

    def __init__(self, accelerator, num_generations: int) -> None:
        self.accelerator, self.num_generations = accelerator, num_generations
        self.model, self._metrics = SimpleNamespace(training=True), {"train": defaultdict(list)}

    def _calculate_rewards(self, inputs, prompts, completions) -> Tensor:
        return torch.zeros(len(inputs))

    def _generate_and_score_completions(self, inputs) -> dict[str, Tensor]:
        self._calculate_rewards(inputs, [""] * len(inputs), [""] * len(inputs))
        return {"advantages": torch.ones(len(inputs))}


def weighter() -> AdaptiveWeighter:
    made = AdaptiveWeighter(mode="convex")
    made.calibrate(torch.tensor([0.1, 0.3, 0.5]))
    return made


def work(rank: int, folder: str) -> None:
    """One of two processes, with half of the rows; groups of eight lie across both."""
    import accelerate

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": "lo"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}  # looked for by accelerate, not used
    weighters = [weighter() for _ in range(3)]  # before they would calibrate on the rows of both processes
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        accelerator = accelerate.Accelerator(cpu=True)
        reward = FullReference(closeness, higher_is_better=True, bounds=(None, 1.0))
        fidelity = TRLReward(reward, "restored", references="clean")
        rows = [
            {"restored": torch.full((3, 8, 8), distance.item()), "clean": torch.zeros(3, 8, 8)}
            for distance in DISTANCES[4 * rank : 4 * rank + 4]
        ]
        found = []
        for size, one in zip((2, 4, 8), weighters, strict=True):
            trainer = adaptive_trainer(Trainer, one, fidelity)(accelerator, size)
            found.append(trainer._generate_and_score_completions(rows)["advantages"])
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_difficulty_over_two_processes(tmp_path) -> None:
    """The weights follow means over groups of two, four and eight rows, half of which the other process has."""
    pytest.importorskip("accelerate")
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for size, *rows in zip((2, 4, 8), *halves, strict=True):
        difficulty = DISTANCES.view(-1, size).nanmean(1).repeat_interleave(size)
        torch.testing.assert_close(torch.cat(rows), weighter()(difficulty).rl, **FORMULA_FP32)
