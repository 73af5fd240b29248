"""Train the small restorer on photographs: crops with their damage are stored, then learned from.

    python -m examples.small_restorer.train --photos PHOTOS... --output weights   # about an hour of one core

It needs `pip install . --group demo`. The crops are made once; a run that was cut off while it made them goes on.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from examples.distill.pictures import crop_of
from examples.small_restorer.restorer import build
from examples.small_restorer.tasks import InTurns
from iqareward.diffusion import supervised
from iqareward.diffusion.pairs import Item, PairSet
from iqareward.image_files import find_images

SIDE, BATCH, RATE, AVERAGE = 128, 16, 1e-3, 0.999
SEVERITIES = (0.2, 1.0)
AT_ONCE = 100  # crops that are damaged and written together


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m examples.small_restorer.train", description=__doc__, formatter_class=style
    )
    parser.add_argument("--photos", type=Path, nargs="+", required=True, help="photographs, or folders of them")
    parser.add_argument("--crops", type=Path, default=Path("restorer-crops"), help="folder for the training data")
    parser.add_argument("--count", type=int, default=12_000, help="number of crops")
    parser.add_argument("--updates", type=int, default=8_000, help="optimiser steps with 16 crops each")
    parser.add_argument("--output", type=Path, required=True, help="file for the weights, .safetensors")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    crops = Crops.cut([*find_images(options.photos).files], options.count, options.crops, options.seed)
    policy, started = build(seed=options.seed), time.perf_counter()
    policy.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    losses = supervised(
        policy, crops, num_updates=options.updates, batch_size=BATCH, learning_rate=RATE, ema_decay=AVERAGE,
        accelerator=Accelerator(cpu=True, mixed_precision="bf16"), seed=options.seed,
        history_file=options.output.with_suffix(".jsonl"),
    )  # fmt: skip
    save_file({name: each.half().contiguous() for name, each in policy.model.state_dict().items()}, options.output)
    tail = sum(losses[-500:]) / max(len(losses[-500:]), 1)
    seconds = time.perf_counter() - started
    Console().print(f"{len(losses)} updates in {seconds:.0f} s; mean loss of the last {len(losses[-500:])}: {tail:.5f}")


@dataclass(frozen=True)
class Crops(PairSet):
    """Crops `[N, 3, S, S]` in bytes with their damage, which are read from files as they are needed."""

    degraded: Any
    references: Any

    @classmethod
    def cut(cls, photos: Sequence[Path], count: int, folder: Path, seed: int) -> "Crops":
        """Cut and damage what is missing; crop i has task i modulo 5 and a photograph in turn."""
        folder.mkdir(parents=True, exist_ok=True)
        shape, done = (count, 3, SIDE, SIDE), folder / "done"
        files = [folder / f"{name}-{count}.npy" for name in ("degraded", "references")]
        mode = "r+" if all(file.exists() for file in files) else "w+"
        degraded, references = (
            np.lib.format.open_memmap(file, mode=mode, dtype=np.uint8, shape=None if mode == "r+" else shape)
            for file in files
        )
        first = int(done.read_text()) if mode == "r+" and done.exists() else 0
        for start in track(range(first, count, AT_ONCE), description="crops"):
            rows = range(start, min(start + AT_ONCE, count))
            draws = [np.random.default_rng([seed, row]) for row in rows]
            clean = torch.stack(
                [crop_of(photos[row % len(photos)], SIDE, own) for row, own in zip(rows, draws, strict=True)]
            )
            severity = torch.tensor([own.uniform(*SEVERITIES) for own in draws], dtype=torch.float32)
            for store, images in ((degraded, InTurns()(clean, severity, rows, seed=seed)), (references, clean)):
                store[rows.start : rows.stop] = images.mul(255).round().byte().numpy()
                store.flush()
            done.write_text(str(rows.stop))
        return cls(degraded, references)

    def __len__(self) -> int:
        return len(self.references)

    def _items(self, ids: list[int]) -> list[Item]:
        return [{"lq": _image(self.degraded[row]), "gt": _image(self.references[row])} for row in ids]


def _image(pixels: Any) -> Tensor:
    return torch.from_numpy(np.array(pixels)).float() / 255


if __name__ == "__main__":
    main()
