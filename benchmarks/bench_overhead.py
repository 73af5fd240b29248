"""What the training signals cost per optimiser step: microseconds for B rows, on the CPU or the GPU if there is one.

    python -m benchmarks.bench_overhead             # under a minute
    python -m benchmarks.bench_overhead --quick     # smoke run

The promise is for weighting: the weights of a step and the update after it, with `active`, for 1024 rows. The last line
of standard output is one JSON document.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._harness import document, finish, medians, target
from iqareward.advantages import RewardMemory, combine_advantages, group_advantages, rank_advantages
from iqareward.difficulty import DifficultyMemory
from iqareward.groups import group_statistics
from iqareward.losses import mixed_loss
from iqareward.weighting import AdaptiveWeighter

ROLLOUTS, NUM_INPUTS, PROMISED_MICROSECONDS = 8, 10_000, 200.0


def calls(num_rows: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Everything a loop may call once per step, on the same rows."""
    generator = torch.Generator().manual_seed(0)
    difficulty = (torch.rand(num_rows, generator=generator) + 0.01).to(device)
    rewards = torch.randn(num_rows, 3, generator=generator).to(device)
    groups = (torch.arange(num_rows) // ROLLOUTS).to(device)
    bucket = (torch.arange(num_rows) % 10).to(device)
    active = (torch.rand(num_rows, generator=generator) > 0.1).to(device)
    weighter, bucketed = AdaptiveWeighter(), AdaptiveWeighter(num_buckets=10)
    weighter.calibrate(difficulty)
    bucketed.calibrate(difficulty, bucket)
    weights, one_reward = weighter(difficulty), rewards[:, 0].contiguous()
    past, history = DifficultyMemory(NUM_INPUTS, half_life=100), RewardMemory(NUM_INPUTS)

    def step() -> None:
        weighter(difficulty, active=active)
        weighter.update(difficulty)

    def step_with_buckets() -> None:
        bucketed(difficulty, bucket=bucket, active=active)
        bucketed.update(difficulty, bucket)

    return {
        "weighter and update": step,
        "weighter alone": lambda: weighter(difficulty, active=active),
        "weighter and update, 10 buckets": step_with_buckets,
        "group_statistics": lambda: group_statistics(one_reward, groups),
        "group_advantages": lambda: group_advantages(one_reward, groups),
        "rank_advantages": lambda: rank_advantages(one_reward, groups),
        "combine_advantages, 3 rewards": lambda: combine_advantages(rewards, groups, weights=[1.0, 1.0, 1.0]),
        "RewardMemory.update": lambda: history.update(one_reward, groups),
        "RewardMemory.advantages": lambda: history.advantages(one_reward, groups),
        "DifficultyMemory.update": lambda: past.update(difficulty, groups),
        "mixed_loss": lambda: mixed_loss(one_reward, one_reward, weights),
    }


def main() -> None:
    """Measure, print the table and the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # small tensors: threads would wait for each other more than they work
    rows = []
    for num_rows in (64, 1024):
        found = medians(calls(num_rows, device), rounds=20 if options.quick else 2000)
        rows += [{"call": name, "rows": num_rows, "microseconds": round(1e6 * s, 1)} for name, s in found.items()]
    table = Table("call", "rows", "microseconds")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(stderr=True).print(table)
    promised = next(row for row in rows if row["call"] == "weighter and update" and row["rows"] == 1024)
    targets = [target("weighter and update, us", promised["microseconds"], PROMISED_MICROSECONDS, "lower")]
    finish(document("overhead", rows, targets, []), options.out)


if __name__ == "__main__":
    main()
