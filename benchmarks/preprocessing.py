"""How far do common shortcuts leave the pixels that a judge was trained on, and do they change the order of rollouts?

    python -m benchmarks.preprocessing [--quick]

Groups of eight imagined rollouts of a photograph are padded to a square and resized to 448 x 448, as mPLUG-Owl2's
Pillow pipeline does it, and by each shortcut. Levels are of 255. The weights of the real judges are not needed: PIQE
and NIQE stand for them, and score the resized pixels. `tau` is Kendall's correlation of the order within a group with
the order by exact pixels; `shift` the mean change in standard deviations of a group. The last line of standard output
is one JSON document.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as vision
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks._harness import document, finish
from benchmarks._photographs import PHOTOGRAPHS, load_photograph
from benchmarks.jpeg_transport import kendall, rollouts
from iqareward import load
from iqareward.functional.resize import resize_levels, to_levels
from iqareward.rewards.owl2.preprocess import CLIP_MEAN, CLIP_STD, PAD_LEVELS, preprocess

SIDE, GROUPS_PER_PHOTOGRAPH = 448, 6
JUDGES = ("piqe", "niqe")
BLACK = (0.0, 0.0, 0.0)

Way = Callable[[Tensor], Tensor]  # [N, 3, H, W] in [0, 1] -> [N, 3, SIDE, SIDE] levels in [0, 255]


def ours(images: Tensor) -> Tensor:
    """What the network is given, back in levels."""
    mean, std = (torch.tensor(row).view(3, 1, 1) for row in (CLIP_MEAN, CLIP_STD))
    return (preprocess(images, SIDE) * std + mean) * 255


def squares(images: Tensor, color: tuple[float, ...] = PAD_LEVELS) -> Tensor:
    """8-bit levels, the content in the middle of a square of one colour."""
    levels = to_levels(images)
    height, width = levels.shape[-2:]
    side = max(height, width)
    canvas = torch.tensor(color).view(1, 3, 1, 1).repeat(len(levels), 1, side, side)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[..., top : top + height, left : left + width] = levels
    return canvas


def pillow(images: Tensor) -> Tensor:
    """Pillow itself, one image after the other."""
    rows = [
        np.array(Image.fromarray(square).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for square in squares(images).to(torch.uint8).movedim(1, -1).numpy()
    ]
    return torch.from_numpy(np.stack(rows)).movedim(-1, 1).float()


def interpolated(images: Tensor, *, mode: str = "bicubic", antialias: bool = True) -> Tensor:
    """torch's own resize of float levels, without rounding."""
    return F.interpolate(squares(images), (SIDE, SIDE), mode=mode, antialias=antialias).clamp(0, 255)


def torchvision_bytes(images: Tensor) -> Tensor:
    """torchvision's resize of bytes, as the image processors of transformers 5 call it."""
    bicubic = vision.InterpolationMode.BICUBIC
    return vision.resize(squares(images).to(torch.uint8), [SIDE, SIDE], bicubic, antialias=True).float()


WAYS: dict[str, Way] = {
    "Pillow itself": pillow,
    "torchvision on 8 bits (transformers 5)": torchvision_bytes,
    "torch bicubic, antialiased, rounded": lambda images: interpolated(images).round(),
    "torch bicubic, antialiased": interpolated,
    "torch bilinear, antialiased": partial(interpolated, mode="bilinear"),
    "torch bicubic, not antialiased": partial(interpolated, antialias=False),
    "8 bits by truncation": lambda images: ours((images * 255).floor() / 255),
    "black bars": lambda images: resize_levels(squares(images, BLACK), (SIDE, SIDE)),
    "squashed, no bars": lambda images: resize_levels(to_levels(images), (SIDE, SIDE)),
}


def compare(images: Tensor) -> dict[str, dict[str, float]]:
    """Pixel differences, tau and shift of each way, for one group."""
    exact = ours(images)
    judges = [load(name) for name in JUDGES]
    scores = [judge(exact / 255).numpy() for judge in judges]
    found: dict[str, dict[str, float]] = {}
    for way, resize in WAYS.items():
        levels = resize(images)
        difference = (levels - exact).abs()
        found[way] = {"mean": difference.mean().item(), "largest": difference.max().item()}
        for judge, before in zip(judges, scores, strict=True):
            after = judge(levels / 255).numpy()
            found[way][f"{judge.name}_tau"] = kendall(before, after)
            found[way][f"{judge.name}_shift"] = float((after - before).mean() / before.std())
    return found


def measure(groups: int) -> list[dict[str, Any]]:
    """A row per way: means over the groups, and the largest difference of all."""
    chance = torch.Generator().manual_seed(0)
    photographs = [load_photograph(name) for name in PHOTOGRAPHS]
    jobs = [photograph for photograph in photographs for _ in range(groups)]
    console = Console(stderr=True)
    runs = [compare(rollouts(photograph, chance)) for photograph in track(jobs, "groups", console=console)]
    rows = []
    for way in WAYS:
        columns = {key: [run[way][key] for run in runs] for key in runs[0][way]}
        means = {key: float(np.mean(values)) for key, values in columns.items()}
        rows.append({"way": way, "groups": len(runs)} | means | {"largest": max(columns["largest"])})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one group per photograph")
    parser.add_argument("--json", type=Path, help="also write the document here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(1 if options.quick else GROUPS_PER_PHOTOGRAPH)
    for row in rows:
        print("  ".join(f"{value:+.3f}" if isinstance(value, float) else f"{value!s:40}" for value in row.values()))
    finish(document("preprocessing", rows, [], ["pillow", "scikit-image", "torchvision"]), options.json)


if __name__ == "__main__":
    main()
