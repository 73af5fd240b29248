"""Photographs that come with the repository: crops to train on, and crops of the Kodak pictures to test on.

    python -m examples.small_restorer.photographs --photos PHOTOS --kodak KODAK   # makes the two sheets

Each file is a sheet of square crops. A row of `training.jpg` has one photograph; `LICENSES.tsv` has their authors and
licences, in the order of the rows. `kodak.png` has the centres of the 24 Kodak pictures, which Kodak released for
unrestricted use, in their order; nothing here is trained on them.
"""

import argparse
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import iqareward
from examples.distill.pictures import crop_of
from iqareward.image_files import find_images

FOLDER = Path(__file__).with_name("photographs")
TRAINING, KODAK = ("training.jpg", 128), ("kodak.png", 256)  # file, side of a crop in pixels
COLUMNS, KODAK_COLUMNS = 16, 6


def training() -> Tensor:
    """Crops of 14 photographs, `[224, 3, 128, 128]` in [0, 1]."""
    return _crops(*TRAINING)


def kodak() -> Tensor:
    """The centres of the Kodak pictures, `[24, 3, 256, 256]` in [0, 1]."""
    return _crops(*KODAK)


def windows(crops: Tensor, rows: Tensor, corners: Tensor, side: int, flips: Tensor | None = None) -> Tensor:
    """Square parts of crops.

    Args:
        crops: `[M, 3, H, W]`.
        rows: `[N]` of which crop.
        corners: `[N, 2]` top and left of each window.
        side: Of a window, in pixels.
        flips: `[N]` whether a window is mirrored; none if not given.

    Returns:
        `[N, 3, side, side]`.
    """
    places = torch.arange(side)
    down, across = (corners[:, axis, None] + places for axis in (0, 1))
    if flips is not None:
        across = torch.where(flips.bool()[:, None], across.flip(1), across)
    return crops[rows[:, None, None], :, down[:, :, None], across[:, None, :]].movedim(3, 1).contiguous()


@lru_cache
def _crops(file: str, side: int) -> Tensor:
    sheet = iqareward.to_images(Image.open(FOLDER / file))[0]
    return sheet.unfold(1, side, side).unfold(2, side, side).flatten(1, 2).movedim(1, 0).contiguous()


def main() -> None:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m examples.small_restorer.photographs", description=__doc__, formatter_class=style
    )
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs with LICENSES.tsv")
    parser.add_argument("--kodak", type=Path, required=True, help="folder of the Kodak pictures")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    licences = (options.photos / "LICENSES.tsv").read_text().splitlines()
    photos = [options.photos / line.split("\t")[0] for line in licences]
    crops = [
        crop_of(photo, TRAINING[1], np.random.default_rng([7, row, column]))
        for row, photo in enumerate(photos)
        for column in range(COLUMNS)
    ]
    _save(crops, COLUMNS, TRAINING[0], quality=95, subsampling=0)
    pictures = [iqareward.to_images(Image.open(file).convert("RGB"))[0] for file in find_images([options.kodak]).files]
    _save([_centre(picture, KODAK[1]) for picture in pictures], KODAK_COLUMNS, KODAK[0], optimize=True)
    (FOLDER / "LICENSES.tsv").write_text("\n".join(licences) + "\n")


def _centre(picture: Tensor, side: int) -> Tensor:
    top, left = ((length - side) // 2 for length in picture.shape[1:])
    return picture[:, top : top + side, left : left + side]


def _save(crops: list[Tensor], columns: int, file: str, **options: Any) -> None:
    rows = [torch.cat(crops[start : start + columns], 2) for start in range(0, len(crops), columns)]
    pixels = torch.cat(rows, 1).mul(255).round().byte().movedim(0, -1).numpy()
    Image.fromarray(pixels).save(FOLDER / file, **options)


if __name__ == "__main__":
    main()
