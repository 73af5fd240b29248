"""Fit the natural-scene model that ships with the package, and check it on photographs outside the fit.

    python -m benchmarks.fit_niqe --held-out DIR          # table only
    python -m benchmarks.fit_niqe --held-out DIR --write  # also replace the model in iqareward/functional/data

Needs scikit-image, which brings the photographs and scipy. Each photograph of the fit is judged by a
model refitted without it; photographs in DIR (png) by the model of all five. Spearman is between -NIQE and the level of
a degradation: -1 is perfect. "false" is the share of degraded copies that beat their own original.
"""

import argparse
import io
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import skimage
import skimage.data
import skimage.filters
import torch
from PIL import Image
from torch import Tensor

import iqareward
from benchmarks._harness import document, finish, target
from iqareward.agreement import spearman
from iqareward.functional.brisque import brisque
from iqareward.functional.niqe import PACKAGED, NaturalModel, fit_natural_model, niqe
from iqareward.functional.piqe import piqe

# Licences as stated in the docstrings of skimage.data; `motorcycle` states none and stays out.
PHOTOS = {"astronaut": "public domain", "coffee": "CC0", "chelsea": "CC0", "camera": "CC0", "rocket": "public domain"}
SHIPPED_BLOCK = 48
SIZES = ((384, 512), (256, 256), (192, 192), (128, 128))
LEVELS = {
    "blur": (0.6, 1.2, 2.0, 3.0, 5.0),
    "noise": (3, 8, 15, 28, 50),
    "jpeg": (80, 50, 30, 15, 7),
    "resize": (1.5, 2, 3, 4, 6),
}


def to_image(pixels: np.ndarray) -> Tensor:
    """`[3, H, W]` in [0, 1] from an 8-bit array; grey becomes three equal channels."""
    pixels = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=2)
    return torch.from_numpy(pixels[..., :3].astype(np.float32) / 255).permute(2, 0, 1)


def fit_photos() -> dict[str, Tensor]:
    return {name: to_image(getattr(skimage.data, name)()) for name in PHOTOS}


def held_out_photos(folder: Path | None) -> dict[str, Tensor]:
    paths = sorted(folder.glob("*.png")) if folder else []
    return {path.stem: to_image(np.asarray(Image.open(path).convert("RGB"))) for path in paths}


def degrade(pixels: np.ndarray, family: str, strength: float) -> np.ndarray:
    """An 8-bit `[H, W, 3]` copy of `pixels`, worse by `strength`."""
    if family == "blur":
        return np.clip(skimage.filters.gaussian(pixels, strength, channel_axis=2, preserve_range=True), 0, 255)
    if family == "noise":
        noise = np.random.default_rng(int(strength)).normal(0, strength, pixels.shape)
        return np.clip(pixels + noise, 0, 255)
    picture = Image.fromarray(pixels)
    if family == "jpeg":
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(strength))
        return np.asarray(Image.open(file))
    small = picture.resize(
        (round(picture.width / strength), round(picture.height / strength)), Image.Resampling.BICUBIC
    )
    return np.asarray(small.resize(picture.size, Image.Resampling.BICUBIC))


def attack(pixels: np.ndarray, kind: str) -> np.ndarray:
    """A copy that a judge of quality should not prefer: oversharpened, faintly checkered, or over-contrasted."""
    values = pixels.astype(np.float64)
    if kind == "sharpen":
        values += 1.5 * (values - skimage.filters.gaussian(values, 1.5, channel_axis=2, preserve_range=True))
    elif kind == "checker":
        parity = np.indices(values.shape[:2]).sum(axis=0) % 2
        values += np.expand_dims(6.0 * (1 - 2 * parity), 2)
    else:
        values = 128 + 1.5 * (values - 128)
    return np.clip(values, 0, 255)


def copies(photo: Tensor, size: tuple[int, int]) -> Tensor | None:
    """The central crop, its 20 degraded copies family by family, and the three attacks: `[24, 3, H, W]`."""
    height, width = size
    if photo.shape[1] < height or photo.shape[2] < width:
        return None
    top, left = (photo.shape[1] - height) // 2, (photo.shape[2] - width) // 2
    pixels = (photo[:, top : top + height, left : left + width] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    worse = [degrade(pixels, family, strength) for family, steps in LEVELS.items() for strength in steps]
    attacked = [attack(pixels, kind) for kind in ("sharpen", "checker", "contrast")]
    return torch.stack([to_image(np.round(copy).astype(np.uint8)) for copy in (pixels, *worse, *attacked)])


def summarise(scores_by_photo: list[np.ndarray]) -> dict[str, float]:
    """Mean and worst Spearman per family, false share, and how often each attack wins."""
    row: dict[str, float] = {"photos": len(scores_by_photo)}
    for index, family in enumerate(LEVELS):
        steps = slice(1 + 5 * index, 6 + 5 * index)
        values = [spearman(-np.append(scores[0], scores[steps]), range(6)) for scores in scores_by_photo]
        row[family], row[f"{family}_worst"] = float(np.mean(values)), float(np.max(values))
    row["false"] = float(np.mean([s[1:21] < s[0] for s in scores_by_photo]))
    for index, kind in enumerate(("sharpen", "checker", "contrast")):
        row[kind] = float(np.mean([s[21 + index] < s[0] for s in scores_by_photo]))
    return row


def evaluate(
    score: Callable[[str, Tensor], Tensor], photos: dict[str, Tensor], size: tuple[int, int]
) -> dict[str, float]:
    images = {name: copies(photo, size) for name, photo in photos.items()}
    return summarise([score(name, batch).numpy() for name, batch in images.items() if batch is not None])


def evaluate_block(
    block_size: int, fitted: dict[str, Tensor], held_out: dict[str, Tensor], sizes: Sequence[tuple[int, int]]
) -> list[dict[str, Any]]:
    """One row per image size; every photograph is judged by a model that has not seen it."""
    everything = fit_natural_model(list(fitted.values()), block_size=block_size)
    without = {
        name: fit_natural_model([photo for other, photo in fitted.items() if other != name], block_size=block_size)
        for name in fitted
    }
    rows = []
    for size in sizes:
        if min(size) < 2 * block_size:
            continue
        row = evaluate(lambda name, batch: niqe(batch, model=without.get(name, everything)), fitted | held_out, size)
        rows.append({"metric": f"niqe block {block_size}", "size": list(size), **row})
    return rows


def write(model: NaturalModel) -> None:
    """Save the model with everything needed to fit it again."""
    metadata = {
        "photos": ", ".join(f"{name} ({licence})" for name, licence in PHOTOS.items()),
        "source": f"scikit-image {version('scikit-image')} skimage.data",
        "options": "sharpness 0.75; scales 1, 0.75, 0.5; plain and mirrored; block offsets 0 and half; no randomness",
        "versions": f"iqareward {iqareward.__version__}, torch {torch.__version__}, numpy {np.__version__}",
        "command": "python -m benchmarks.fit_niqe --write",
        "date": date.today().isoformat(),
    }
    path = Path(iqareward.__file__).parent / "functional" / "data" / PACKAGED
    path.parent.mkdir(exist_ok=True)
    model.save(path, metadata)
    path.chmod(0o644)  # safetensors writes files that only their owner can read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--held-out", type=Path, help="folder of png photographs that take no part in the fit")
    parser.add_argument("--blocks", type=int, nargs="+", default=[SHIPPED_BLOCK])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--quick", action="store_true", help="256x256 only")
    parser.add_argument("--output", type=Path, help="also write the JSON document here")
    options = parser.parse_args()
    fitted, held_out = fit_photos(), held_out_photos(options.held_out)
    rows: list[dict[str, Any]] = []
    sizes = [(256, 256)] if options.quick else SIZES
    for block_size in options.blocks:
        rows += evaluate_block(block_size, fitted, held_out, sizes)
    for size in sizes:
        for metric in (piqe, brisque):
            found = evaluate(lambda _, batch, metric=metric: metric(batch), fitted | held_out, size)
            rows.append({"metric": metric.__name__, "size": list(size), **found})
    for row in rows:
        print(*(f"{key} {value:.2f}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()))
    if options.write:
        write(fit_natural_model(list(fitted.values()), block_size=SHIPPED_BLOCK))
    targets = [
        target("false share at 256x256", row["false"], 0.11, "lower")
        for row in rows
        if row["metric"] == f"niqe block {SHIPPED_BLOCK}" and row["size"] == [256, 256]
    ]
    finish(document("niqe_fit", rows, targets, ["scikit-image", "scipy", "pillow"]), options.output)


if __name__ == "__main__":
    main()
