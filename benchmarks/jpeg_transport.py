"""What does JPEG between trainer and judge do to a reward? The order within groups of rollouts, before and after.

    python -m benchmarks.jpeg_transport [--quick]

Groups of eight imagined rollouts of a photograph, which differ by a little blur and noise as those of a restorer do,
are scored as they are, through 8-bit PNG, and through JPEG as reward servers send it. `tau` is Kendall's correlation
between the two orders within a group, 1 = the same order; `shift` is the mean change in standard deviations of a group.
The last line of standard output is one JSON document.
"""

import argparse
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks._harness import document, finish
from benchmarks._photographs import PHOTOGRAPHS, load_photograph
from iqareward import load, to_images
from iqareward.functional.filters import blur_valid, gaussian_taps

REWARDS = ("piqe", "niqe", "ssim", "gmsd", "haarpsi", "psnr")
QUALITIES = (95, 90, 75)  # 75 is Pillow's default, and so that of servers that name none
SIDE, GROUP, GROUPS_PER_PHOTOGRAPH = 256, 8, 6


def rollouts(photograph: Tensor, chance: torch.Generator) -> Tensor:
    """`[GROUP, 3, H, W]`: a little blur and a little noise, both different in each."""
    found = []
    for _ in range(GROUP):
        sigma, noise = (float(torch.rand((), generator=chance)) for _ in range(2))
        padded = torch.nn.functional.pad(photograph[None], (3, 3, 3, 3), mode="reflect")
        blurred = blur_valid(padded, gaussian_taps(7, 0.3 + 0.5 * sigma))[0]
        found.append(blurred + 0.02 * noise * torch.randn(photograph.shape, generator=chance))
    return torch.stack(found).clamp(0, 1)


def through(file_format: str, **options: int) -> Callable[[Tensor], Tensor]:
    """Images as they arrive when a server is sent files of this format."""

    def send(images: Tensor) -> Tensor:
        arrived = []
        for image in images:
            stream = io.BytesIO()
            levels = (image * 255).round().to(torch.uint8).movedim(0, -1).numpy()
            Image.fromarray(levels).save(stream, file_format, **options)
            arrived.append(to_images(Image.open(stream))[0])
        return torch.stack(arrived)

    return send


TRANSPORTS = {"png": through("PNG")} | {f"jpeg {q}": through("JPEG", quality=q) for q in QUALITIES}


def kendall(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-a between two scores of the same rollouts."""
    upper = np.triu_indices(len(first), 1)
    signs = [np.sign(np.subtract.outer(values, values))[upper] for values in (first, second)]
    return float((signs[0] * signs[1]).mean())


def measure(groups: int) -> list[dict[str, Any]]:
    """A row per reward and transport, means over the groups."""
    chance = torch.Generator().manual_seed(0)
    photographs = [load_photograph(name, SIDE)[:, :SIDE, :SIDE] for name in PHOTOGRAPHS]
    rewards = {name: load(name) for name in REWARDS}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    jobs = [photograph for photograph in photographs for _ in range(groups)]
    for truth in track(jobs, "groups", console=Console(stderr=True), transient=True):
        images = rollouts(truth, chance)
        references = truth.expand_as(images)
        sent = {name: send(images) for name, send in TRANSPORTS.items()}
        for name, reward in rewards.items():
            before = reward(images, references=references).numpy()
            for transport, arrived in sent.items():
                after = reward(arrived, references=references).numpy()
                shift = float((after - before).mean() / before.std())
                found.setdefault((name, transport), []).append((kendall(before, after), shift))
    return [
        {"reward": name, "transport": transport, "groups": len(values),
         "tau": float(np.mean([tau for tau, _ in values])), "shift": float(np.mean([shift for _, shift in values]))}
        for (name, transport), values in found.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one group per photograph")
    parser.add_argument("--json", type=Path, help="also write the document here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(1 if options.quick else GROUPS_PER_PHOTOGRAPH)
    for row in rows:
        print(f"{row['reward']:8} {row['transport']:8} tau {row['tau']:+.2f}  shift {row['shift']:+.2f}")
    finish(document("jpeg-transport", rows, [], ["pillow", "scikit-image"]), options.json)


if __name__ == "__main__":
    main()
