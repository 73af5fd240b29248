"""Do `periodic_grid` and `seams` see faint grids and tile borders in photographs, and are they silent otherwise?

    python -m benchmarks.artefacts FOLDER... [--output FILE] [--quick]

Centres of 512 x 512 pixels of the photographs in the folders, with what restorers and files do to them (JPEG, blur,
noise, sharpening), and with patterns of known period and strength. `found` is the share of photographs above the value
that 5 % of the untouched ones exceed. `alarms` is the share of draws of 16 photographs for which `HackingMonitor`, told
that the reward rose and given the untouched ones as ground truth, reports the statistic. The last line of standard
output is one JSON document.
"""

import argparse
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks._harness import document, finish
from benchmarks._tables import table
from iqareward.functional.statistics import STATISTICS, seam_strength
from iqareward.image_files import find_images
from iqareward.monitor import HackingMonitor

SIDE, DRAWS, INPUTS, LARGE = 512, 50, 16, 2500
FALSE_ALARMS = 0.05
TILE = 128
MEASURES: dict[str, Callable[[Tensor], Tensor]] = {
    "periodic_grid": STATISTICS["periodic_grid"],
    "seams": STATISTICS["seams"],
    "seams, tile known": lambda images: seam_strength(images, period=TILE),
}


def photographs(folders: list[Path]) -> tuple[Tensor, list[str]]:
    """`[N, 3, 512, 512]` centres; large files are reduced to 3/10, which leaves no grid of a camera's JPEG blocks."""
    crops, names = [], []
    for file in find_images(folders).files:
        image = Image.open(file).convert("RGB")
        if max(image.size) > LARGE:
            image = image.resize([3 * side // 10 for side in image.size], Image.Resampling.LANCZOS)
        left, top = ((side - SIDE) // 2 for side in image.size)
        crops.append(_tensor(image.crop((left, top, left + SIDE, top + SIDE))))
        names.append(file.stem)
    return torch.stack(crops), names


def _tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).movedim(-1, 0).float() / 255


def _pil(image: Tensor) -> Image.Image:
    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())


def in_8_bits(images: Tensor) -> Tensor:
    """As files have them."""
    return (images.clamp(0, 1) * 255).round() / 255


def jpeg(images: Tensor, quality: int) -> Tensor:
    """Through a JPEG file."""
    found = []
    for image in images:
        stream = io.BytesIO()
        _pil(image).save(stream, "JPEG", quality=quality)
        found.append(_tensor(Image.open(stream)))
    return torch.stack(found)


def filtered(images: Tensor, effect: Any) -> Tensor:
    """Through a filter of Pillow."""
    return torch.stack([_tensor(_pil(image).filter(effect)) for image in images])


def noisy(images: Tensor, sigma: float) -> Tensor:
    """With Gaussian noise."""
    return in_8_bits(images + sigma * torch.randn(images.shape, generator=torch.Generator().manual_seed(0)))


def checkerboard(cell: int) -> Tensor:
    """`[512, 512]` of +0.5 and -0.5."""
    cells = torch.arange(SIDE) // cell
    return (cells[:, None] + cells) % 2 - 0.5


def lines(period: int) -> Tensor:
    """`[512, 512]`: lines of 1 in both directions."""
    marked = torch.arange(SIDE) % period == 0
    return (marked[:, None] | marked).float()


def kinds(clean: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every treatment with its name."""
    yield "untouched", clean
    yield "JPEG, quality 90", jpeg(clean, 90)
    yield "JPEG, quality 50", jpeg(clean, 50)
    yield "Gaussian blur, 1.5 pixels", filtered(clean, ImageFilter.GaussianBlur(1.5))
    yield "noise, 10/255", noisy(clean, 10 / 255)
    yield "sharpening, radius 2, 150 %", filtered(clean, ImageFilter.UnsharpMask(2, 150, 0))
    for cell in (1, 2, 4, 8, 16):
        for levels in (1, 2, 4):
            yield f"checkerboard, period {2 * cell}, {levels}/255", in_8_bits(clean + levels / 255 * checkerboard(cell))
    for period in (8, 16, 32):
        yield f"lines, period {period}, 2/255", in_8_bits(clean + 2 / 255 * lines(period))
    yield (
        "checkerboard, period 8, 4/255, blurred by 1.5",
        filtered(clean + 4 / 255 * checkerboard(4), ImageFilter.GaussianBlur(1.5)),
    )
    yield "checkerboard, period 8, 4/255, noise 10/255", noisy(clean + 4 / 255 * checkerboard(4), 10 / 255)
    for levels in (1, 2, 4, 8):
        yield f"tiles of {TILE}, {levels}/255 apart", in_8_bits(clean + levels / 255 * checkerboard(TILE))
    yield f"tiles of {TILE}, 4/255 apart, noise 10/255", noisy(clean + 4 / 255 * checkerboard(TILE), 10 / 255)


def alarms(name: str, before: Tensor, now: Tensor) -> float:
    """Share of draws for which the monitor reports the statistic."""
    count, chance, rewards = 0, torch.Generator().manual_seed(0), torch.zeros(INPUTS)
    for _ in range(DRAWS):
        rows = torch.randperm(len(before), generator=chance)[:INPUTS]
        monitor = HackingMonitor({}, statistics={name: STATISTICS["seams"]}, patience=1)
        monitor.add_values({"reward": rewards, name: before[rows]}, {name: before[rows]})
        monitor.step()
        monitor.add_values({"reward": rewards + 1, name: now[rows]})
        count += name in monitor.step().alarmed
    return count / DRAWS


def main() -> None:
    """Measure everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, help="also write the JSON document to this file")
    parser.add_argument("--quick", action="store_true", help="four photographs; does it run?")
    options = parser.parse_args()
    clean, names = photographs(options.folders)
    if options.quick:
        clean = clean[:INPUTS]
    rows: list[dict[str, Any]] = []
    untouched = {name: measure(clean) for name, measure in MEASURES.items()}
    bounds = {name: values.quantile(1 - FALSE_ALARMS) for name, values in untouched.items()}
    for kind, images in track(list(kinds(clean)), "treatments", console=Console(stderr=True)):
        for name, measure in MEASURES.items():
            values = measure(images)
            low, middle, high = values.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
            row: dict[str, Any] = {"treatment": kind, "statistic": name, "photographs": len(clean), "median": middle}
            row |= {"5 %": low, "95 %": high, "found": (values > bounds[name]).float().mean().item()}
            row["alarms"] = alarms(name, untouched[name], values)
            if kind == "untouched":
                row["highest"] = [[names[place], values[place].item()] for place in values.topk(3).indices.tolist()]
            rows.append(row)
    for name in MEASURES:
        print(f"\n{name}, found above {bounds[name]:.2f}\n")
        shown = [row for row in rows if row["statistic"] == name]
        cells = [
            [row["treatment"], f"{row['median']:.2f} [{row['5 %']:.2f}, {row['95 %']:.2f}]"]
            + [f"{100 * row[key]:.0f} %" for key in ("found", "alarms")]
            for row in shown
        ]
        print(table(["treatment", "median [5 %, 95 %]", "found", "alarms"], cells))
    finish(document("artefacts", rows, [], ["pillow"]), options.output)


if __name__ == "__main__":
    main()
