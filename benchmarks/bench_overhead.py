"""What the training signals cost per optimiser step: microseconds for B rows, on the CPU or the GPU if there is one.

    python -m benchmarks.bench_overhead             # under a minute
    python -m benchmarks.bench_overhead --quick     # smoke run

The promise is for weighting: the weights of a step and the update after it, with `has_signal`, for 1024 rows. The last
line of standard output is one JSON document.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks._harness import document, finish, target
from iqareward.advantages import RewardMemory, combine_advantages, group_advantages, rank_advantages
from iqareward.difficulty import DifficultyMemory
from iqareward.groups import group_statistics
from iqareward.weighting import AdaptiveWeighter, mixed_loss

ROLLOUTS, NUM_INPUTS, CALLS_PER_BLOCK = 8, 10_000, 20
PROMISED_MICROSECONDS = 200.0


def calls(num_rows: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Everything a loop may call once per step, on the same rows."""
    generator = torch.Generator().manual_seed(0)
    difficulty = (torch.rand(num_rows, generator=generator) + 0.01).to(device)
    rewards = torch.randn(num_rows, 3, generator=generator).to(device)
    groups = (torch.arange(num_rows) // ROLLOUTS).to(device)
    bins = (torch.arange(num_rows) % 10).to(device)
    has_signal = (torch.rand(num_rows, generator=generator) > 0.1).to(device)
    weighter, binned = AdaptiveWeighter(), AdaptiveWeighter(num_bins=10)
    weighter.calibrate(difficulty)
    binned.calibrate(difficulty, bins)
    weights, one_reward = weighter(difficulty), rewards[:, 0].contiguous()
    past, history = DifficultyMemory(NUM_INPUTS, half_life=100), RewardMemory(NUM_INPUTS)

    def step() -> None:
        weighter(difficulty, has_signal=has_signal)
        weighter.update(difficulty)

    def step_with_bins() -> None:
        binned(difficulty, bins=bins, has_signal=has_signal)
        binned.update(difficulty, bins)

    return {
        "weighter and update": step,
        "weighter alone": lambda: weighter(difficulty, has_signal=has_signal),
        "weighter and update, 10 bins": step_with_bins,
        "group_statistics": lambda: group_statistics(one_reward, groups),
        "group_advantages": lambda: group_advantages(one_reward, groups),
        "rank_advantages": lambda: rank_advantages(one_reward, groups),
        "combine_advantages, 3 rewards": lambda: combine_advantages(rewards, groups, weights=[1.0, 1.0, 1.0]),
        "RewardMemory.update": lambda: history.update(one_reward, groups),
        "RewardMemory.advantages": lambda: history.advantages(one_reward, groups),
        "DifficultyMemory.update": lambda: past.update(difficulty, groups),
        "mixed_loss": lambda: mixed_loss(one_reward, one_reward, weights),
    }


def block(call: Callable[[], object]) -> float:
    """Microseconds per call of consecutive calls, as in a loop."""
    start = time.perf_counter()
    for _ in range(CALLS_PER_BLOCK):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - start) / CALLS_PER_BLOCK


def interleaved(blocks: dict[str, Callable[[], float]], rounds: int) -> dict[str, tuple[float, float]]:
    """Best and median block of each call, taken in turns.

    The best one is the cost of the call; what is above it is other work on the machine, which these calls are short
    enough to slip between.
    """
    times: dict[str, list[float]] = {name: [] for name in blocks}
    for _ in range(rounds):
        for name, run in blocks.items():
            times[name].append(run())
    return {name: (round(min(found), 1), round(statistics.median(found), 1)) for name, found in times.items()}


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
        blocks = {name: partial(block, call) for name, call in calls(num_rows, device).items()}
        for name, (best, median) in interleaved(blocks, rounds=5 if options.quick else 150).items():
            rows.append({"call": name, "rows": num_rows, "microseconds": best, "median": median})
    table = Table("call", "rows", "microseconds, best block", "median block")
    for row in rows:
        table.add_row(*(str(value) for value in row.values()))
    Console(stderr=True).print(table)
    promised = next(row for row in rows if row["call"] == "weighter and update" and row["rows"] == 1024)
    targets = [target("weighter and update, us", promised["microseconds"], PROMISED_MICROSECONDS, "lower")]
    finish(document("overhead", rows, targets, []), options.out)


if __name__ == "__main__":
    main()
