"""What the processes of the reference loop send each other in an update: counted, and predicted for many GPUs.

    python -m benchmarks.communication             # under a minute
    python -m benchmarks.communication --quick     # without FSDP

Two gloo processes train a small restorer; every collective is counted where PyTorch dispatches it, whoever asks for
it. The times at 8 and 64 GPUs are predicted from the counted scheme and the speed of one link; nothing of them was
measured. The last line of standard output is one JSON document.
"""

import argparse
import os
import socket
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import iqareward
from benchmarks._harness import document, finish
from iqareward.diffusion import (
    DifficultyAdaptiveTrainer,
    RolloutConfig,
    SyntheticPairs,
    TrainConfig,
    Validation,
    build_restorer,
)

PROCESSES, INPUTS, GROUP, STEPS, ROWS = 2, 4, 4, 4, 4

# Where in the loop a collective comes from, by the innermost function of ours that called it.
PARTS = {
    "_average_gradients": "gradients",
    "experiences": "weights to sample with",
    "validate": "validation",
    "compare": "rewards and ids",
    "calibrate": "the weighter's sums, before training",
    "_sums": "the weighter's sums, before training",
    "updates.step": "figures and the norm",
    "_figures": "figures and the norm",
    "_step": "passes and counts of the learner",
    "save": "checkpoint",
    "train": "start and end",
}
# Bytes that a ring sends per process, of what a process puts in.
SENT = {
    "allreduce": lambda size: 2 * (PROCESSES - 1) / PROCESSES * size,
    "allgather": lambda size: (PROCESSES - 1) * size,
    "reduce_scatter": lambda size: (PROCESSES - 1) / PROCESSES * size,
}


class Counter(TorchDispatchMode):
    """Counts collectives and their bytes by part of the loop and by update."""

    def __init__(self) -> None:
        super().__init__()
        self.update = 0
        self.found: dict[tuple[int, str, str], list[float]] = defaultdict(lambda: [0, 0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            name = func.overloadpacket.__name__.strip("_").replace("all_", "all").replace("_base", "")
            kind = next((each for each in SENT if each in name), None)
            if kind is not None:
                sizes = [each.numel() * each.element_size() for each in tree_leaves(args) if torch.is_tensor(each)]
                # a gathered result is among the arguments, and is larger than what goes in
                size = min(sizes) if kind == "allgather" else max(sizes)
                entry = self.found[self.update, self._part(), kind]
                entry[0] += 1
                entry[1] += SENT[kind](size)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _part() -> str:
        frame: Any = sys._getframe(2)
        while frame is not None:
            file, name = Path(frame.f_code.co_filename), frame.f_code.co_name
            found = PARTS.get(name) or PARTS.get(f"{file.stem}.{name}")
            if found and "iqareward" in file.parts:
                return found
            frame = frame.f_back
        return "other"


def count(rank: int, folder: str, environment: dict[str, str], sharded: bool) -> None:
    """Two updates by one of the processes; the first writes what it counted in the second."""
    os.environ |= environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    from accelerate import Accelerator

    policy = build_restorer((16, 32))
    model: Any = policy.model
    weights = sum(weight.numel() for weight in model.parameters())
    if sharded:
        for block in (*model.down_blocks, model.mid_block, *model.up_blocks):
            fully_shard(block)
        fully_shard(model)
    trainer = DifficultyAdaptiveTrainer(
        policy,
        iqareward.load("gmsd"),
        SyntheticPairs(8, size=16),
        output_dir=f"{folder}/run",
        rollout_config=RolloutConfig(group_size=GROUP, num_steps=STEPS),
        train_config=TrainConfig(inputs_per_update=INPUTS, rows_at_once=ROWS),
        validation=Validation(SyntheticPairs(4, size=16, seed=1), {"ssim": iqareward.load("ssim")}, num_steps=STEPS),
        accelerator=Accelerator(cpu=True),
        show_progress=False,
    )
    counter, plain = Counter(), trainer.update

    def update() -> dict[str, Any]:
        counter.update += 1
        return plain()

    trainer.update = update
    with counter:
        trainer.train(2, save_every=10, validate_every=10)
    if rank == 0:
        torch.save((weights, dict(counter.found)), f"{folder}/counted.pt")
    trainer.accelerator.end_training()


def counted(sharded: bool) -> list[dict[str, Any]]:
    """What one process sent, by part: of an update before whose end nothing is validated, and besides."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
        free.close()
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(PROCESSES)}
        shared |= {"GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        mp.spawn(count, (folder, shared, sharded), nprocs=PROCESSES)
        weights, found = torch.load(f"{folder}/counted.pt")
    rows = []
    for (update, part, kind), (calls, size) in sorted(found.items()):
        once = part in ("validation", "checkpoint", "start and end") or "before" in part
        if update == 1 or (once and update != 1):
            when = {0: "before the first update", 1: "an update"}.get(update, "after the last update")
            row = {"part": part, "when": when, "collective": kind, "calls": int(calls), "bytes_sent": int(size)}
            rows.append({"mode": "FSDP" if sharded else "whole weights", "weights": weights} | row)
    return rows


# Weights that train and that are frozen, in millions, with LoRA of rank 16 for SD3.5-medium.
MODELS = {
    "restorer, 1.8 M": (1.8, 0.0),
    "SD3.5-medium, LoRA of 10 M": (10.0, 2500.0),
    "2.5 B, all weights": (2500.0, 0.0),
    "12 B, all weights": (12000.0, 0.0),
}
LINKS = {"NVLink, 450 GB/s": 450e9, "InfiniBand, 400 Gb/s": 50e9, "Ethernet, 100 Gb/s": 12.5e9}  # bytes per second
PASSES = 19  # per process and update: 8 rollouts of an input, 4 at a time, 9 stochastic steps, and one pass of SFT


def predicted() -> list[dict[str, Any]]:
    """Gigabytes that a process sends in an update, and seconds of a ring at the full speed of its slowest link."""
    rows = []
    for processes, links in ((8, list(LINKS)), (64, list(LINKS)[1:])):
        ring = (processes - 1) / processes
        for name, (trained, frozen) in MODELS.items():
            gradients = 4e6 * trained  # float32
            in_bf16 = 2e6 * (trained + frozen)
            sent = {
                "whole weights": 2 * ring * gradients,
                # weights once to sample with, and in each pass for forward and backward; gradients after each
                "FSDP": ring * (in_bf16 * (1 + 2 * PASSES) + gradients * PASSES),
            }
            for mode, size in sent.items():
                row = {"model": name, "processes": processes, "mode": mode, "gigabytes_sent": round(size / 1e9, 3)}
                rows.append(row | {f"seconds, {link}": round(size / LINKS[link], 4) for link in links})
    return rows


def main() -> None:
    """Count, predict, and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="without FSDP")
    parser.add_argument("--json", type=Path, help="also write the document here")
    options = parser.parse_args()
    rows = [row for sharded in ((False,) if options.quick else (False, True)) for row in counted(sharded)]
    for row in rows:
        print(f"{row['mode']:14} {row['when']:24} {row['part']:38} {row['collective']:15}", end=" ")
        print(f"{row['calls']:4} calls {row['bytes_sent']:10,} bytes")
    for row in predicted():
        print("predicted:", row)
    record = document("communication", rows, [], ["accelerate", "diffusers"]) | {"predicted": predicted()}
    finish(record, options.json)


if __name__ == "__main__":
    main()
