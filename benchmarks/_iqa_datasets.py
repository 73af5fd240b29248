"""Image sets with human opinions that a user may have: which file, which reference, which score."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class Rated(NamedTuple):
    """A rated image.

    Attributes:
        image: its file.
        reference: that of its original; None = the set has none.
        opinion: mean opinion score, higher is better.
    """

    image: Path
    reference: Path | None
    opinion: float


def kadid10k(folder: Path) -> Iterator[Rated]:
    """KADID-10k (`dmos.csv`, `images/`); its DMOS grows with quality.

    https://database.mmsp-kn.de/kadid-10k-database.html
    """
    with (folder / "dmos.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            images = folder / "images"
            yield Rated(images / row["dist_img"], images / row["ref_img"], float(row["dmos"]))


def tid2013(folder: Path) -> Iterator[Rated]:
    """TID2013 (`mos_with_names.txt`, `distorted_images/`, `reference_images/`).

    http://www.ponomarenko.info/tid2013.htm
    """
    references = {file.stem.lower(): file for file in (folder / "reference_images").iterdir()}
    images = {
        file.name.lower(): file for file in (folder / "distorted_images").iterdir()
    }  # i01_01_1.bmp or I01_01_1.bmp
    for line in (folder / "mos_with_names.txt").read_text().splitlines():
        opinion, name = line.split()
        yield Rated(images[name.lower()], references[name.lower().partition("_")[0]], float(opinion))


def koniq10k(folder: Path) -> Iterator[Rated]:
    """KonIQ-10k (`koniq10k_scores_and_distributions.csv`, `1024x768/`).

    https://database.mmsp-kn.de/koniq-10k-database.html
    """
    with (folder / "koniq10k_scores_and_distributions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            yield Rated(folder / "1024x768" / row["image_name"], None, float(row["MOS"]))


DATASETS = {"kadid10k": kadid10k, "tid2013": tid2013, "koniq10k": koniq10k}
