"""Numbers, table and figure of the toy experiment."""

import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks._harness import document, finish, target

METRICS = ("rmse", "mse", "psnr", "reward")
PARTS = ("all", "easy", "mid", "hard")
RMSE, MSE, PSNR, REWARD = range(4)


def scores(distances: Tensor, rewards: Tensor, sft_distances: Tensor) -> np.ndarray:
    """Means over all test samples and each third of them by the SFT model's error: `[arm, seed, part, metric]`."""
    order = sft_distances[0].argsort(-1)
    third = order.shape[-1] // 3
    parts = [order, order[:, :third], order[:, third : 2 * third], order[:, 2 * third :]]
    tables = []
    for part in parts:
        index = part.expand(distances.shape[0], -1, -1)
        rmse, reward = distances.gather(-1, index), rewards.gather(-1, index)
        values = [rmse, rmse.square(), -20 * rmse.log10(), reward]
        tables.append(torch.stack([value.mean(-1) for value in values], -1))
    return torch.stack(tables, 2).numpy()


def interval(per_seed: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % bootstrap interval over the seeds."""
    generator = np.random.default_rng(0)
    resampled = per_seed[generator.integers(len(per_seed), size=(4000, len(per_seed)))].mean(1)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(per_seed.mean()), float(low), float(high)


def gain_at_equal_reward(table: np.ndarray, arm: int, num_fixed: int, metric: int) -> np.ndarray:
    """Fidelity of an arm less that of the fixed share with the same mean reward, per seed, positive = better.

    Reward rises with the fixed share in every run, so there is exactly one such share; between two of them both are
    interpolated linearly. Beyond pure RL or SFT the nearer of the two is the comparison.
    """
    sign = 1.0 if metric == PSNR else -1.0
    gains = []
    for seed in range(table.shape[1]):
        fixed = table[:num_fixed, seed, 0]
        order = np.argsort(fixed[:, REWARD])
        front = np.interp(table[arm, seed, 0, REWARD], fixed[order, REWARD], fixed[order, metric])
        gains.append(sign * (table[arm, seed, 0, metric] - front))
    return np.array(gains)


def rows(names: list[str], table: np.ndarray, num_fixed: int) -> list[dict]:
    """One row per arm: scores with intervals, and the gains over the front of fixed shares."""
    found = []
    for arm, name in enumerate(names):
        row: dict = {"arm": name}
        for p, part in enumerate(PARTS):
            for m, metric in enumerate(METRICS):
                row[f"{part} {metric}"] = round(float(table[arm, :, p, m].mean()), 4)
        if arm >= num_fixed:
            for m in (RMSE, MSE, PSNR):
                gain = interval(gain_at_equal_reward(table, arm, num_fixed, m))
                row[f"gain {METRICS[m]}"] = [round(value, 5) for value in gain]
            for control in ("fixed 0", "fixed 0.5", "fixed 1"):
                other = names.index(control)
                for p, m in ((0, RMSE), (0, REWARD), (1, RMSE), (3, REWARD)):
                    paired = interval(table[arm, :, p, m] - table[other, :, p, m])
                    row[f"{PARTS[p]} {METRICS[m]} - {control}"] = [round(value, 5) for value in paired]
        found.append(row)
    return found


def markdown(found: list[dict], title: str) -> str:
    """The two tables of the documentation."""
    lines = [title, "", "| arm | RMSE easy / mid / hard | reward easy / mid / hard | mean RMSE | PSNR | mean reward |"]
    lines.append("|---|---|---|---|---|---|")
    for row in found:
        cells = [" / ".join(f"{row[f'{part} {metric}']:.3f}" for part in PARTS[1:]) for metric in ("rmse", "reward")]
        whole = f"{row['all rmse']:.4f} | {row['all psnr']:.3f} | {row['all reward']:.4f}"
        lines.append(f"| {row['arm']} | {cells[0]} | {cells[1]} | {whole} |")
    lines += ["", "Gain over the front of fixed shares at equal mean reward, positive = better [95 % interval]:", ""]
    lines += ["| arm | PSNR (dB) | mean RMSE | mean squared error |", "|---|---|---|---|"]
    for row in found:
        if "gain psnr" in row:
            cells = [_show(row[f"gain {m}"], d) for m, d in (("psnr", 3), ("rmse", 4), ("mse", 4))]
            lines.append(f"| {row['arm']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _show(gain: list[float], digits: int) -> str:
    return f"{gain[0]:+.{digits}f} [{gain[1]:+.{digits}f}, {gain[2]:+.{digits}f}]"


def theme(options: Namespace) -> str:
    """Name of the run: what differs from the standard one."""
    parts = ["toy_weighting", "search" if options.search else options.advantages]
    parts += [f"scale{options.sft_scale:g}"] * (options.sft_scale != 3)
    parts += [f"sft{options.sft_steps}"] * (options.sft_steps != 1000)
    parts += [f"bias{options.reward_bias:g}"] * (options.reward_bias != 0)
    return "_".join(parts)


def publish(names: list[str], table: np.ndarray, num_fixed: int, options: Namespace, seconds: float) -> None:
    """Print the table and the JSON line, and write both where they were asked for."""
    found = rows(names, table, num_fixed)
    # The processor time of one thread: the wall time of a shared machine says nothing.
    cpu_seconds = time.process_time()
    record = document(theme(options), found, [target("cpu_seconds", cpu_seconds, 240, "lower")], ["matplotlib"])
    record["settings"] = {key: value for key, value in vars(options).items() if not isinstance(value, Path)}
    record["seconds"] = round(seconds, 1)
    setting = f"{options.seeds} seeds from {options.first_seed}, {options.advantages} advantages, "
    setting += f"SFT scale {options.sft_scale:g}, {options.sft_steps} SFT steps, reward bias {options.reward_bias:g}; "
    setting += (
        f"{record['date']}, commit {record['commit']}, {record['hardware']}, {cpu_seconds:.0f} s of processor time."
    )
    text = markdown(found, setting)
    print(text)
    path = options.out and options.out / f"{record['theme']}_cpu_{record['date']}.json"
    finish(record, path)
    if path:
        path.with_suffix(".md").write_text(text)
