"""The agreement benchmark: noisy images as stated, scores as people gave them, and every reward in the document."""

import csv
import gzip
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from benchmarks import agreement
from benchmarks.agreement import CROPS, HEIGHT, LEVELS, WIDTH, measure, rows, white_noise
from iqareward import load, to_images
from tests.benchmarks.quick import quick_run

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of smooth stand-ins for the photographs, and the table of their noisy crops."""
    kodak, folder = tmp_path_factory.mktemp("kodak"), tmp_path_factory.mktemp("noisy")
    rng = np.random.default_rng(0)
    for number in range(1, 25):
        shape = (768, 512) if number in (4, 9) else (512, 768)
        coarse = rng.integers(100, 156, (shape[0] // 64, shape[1] // 64, 3))
        pixels = np.kron(coarse, np.ones((64, 64, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(kodak / f"kodim{number:02}.png", compress_level=1)
    with gzip.open(kodak / "mos.csv.gz", "wt") as file:
        file.write("dis_img_path,dis_type,ref_img_path,score\n")
        for number in range(1, 25):
            for level in range(1, 6):
                file.write(f"TID2013/distorted_images/i{number:02}_01_{level}.bmp,AWGN,x,{6 - level + number / 100}\n")
    return kodak, white_noise(kodak, kodak / "mos.csv.gz", folder)


def test_noise_has_the_stated_levels(noisy: tuple[Path, Path]) -> None:
    """Every image has the PSNR of its level against its reference, which is a crop of its photograph."""
    kodak, table = noisy
    with table.open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 24 * len(LEVELS)
    for line in lines[:10]:
        image, reference = (to_images(table.parent / line[name], value_range=(0, 1)) for name in ("image", "reference"))
        assert tuple(image.shape) == (1, 3, HEIGHT, WIDTH)
        expected = LEVELS[int(line["level"]) - 1]
        assert load("psnr")(image, references=reference).item() == pytest.approx(expected, abs=0.1)
    number, (top, left) = 8, CROPS[8]
    with Image.open(kodak / f"kodim{number:02}.png") as photograph, Image.open(table.parent / "i08.bmp") as reference:
        window = photograph.crop((left, top, left + WIDTH, top + HEIGHT))
        assert np.array_equal(np.asarray(window), np.asarray(reference))


def test_rewards_are_measured_within_references(noisy: tuple[Path, Path]) -> None:
    """PSNR orders all pairs of falling opinion, its negative none; the groups are the references."""
    found = measure(str(noisy[1]), ["psnr"], Console(quiet=True))
    assert (found.overall.groups, found.overall.images) == (24, 120)
    (row,) = rows("noise", found)
    assert row["pair_accuracy"] == [1.0, 1.0, 1.0]
    assert row["pairs"] == 240


def test_quick_run_ends_in_its_document() -> None:
    """It has the table of QualiSR, overall and within methods, and says what is missing for the noise."""
    document = quick_run(agreement)
    best = document["rows"][0]
    assert (best["set"], best["within"], best["metric"]) == ("qualisr", "", "qalign")
    assert {row["within"] for row in document["rows"]} == {"", "pasd", "realesrgan", "supir"}
    assert document["missing"] == {"white noise": "needs --kodak and --mos"}


@pytest.mark.skipif(not (SHARED / "data" / "kodak24").is_dir(), reason="no photographs of Kodak (../shared/data)")
def test_three_crops_are_those_of_tid2013(fixtures_dir: Path) -> None:
    """Where a reference of TID2013 is at hand, its pixels are those of the crop."""
    for number, (top, left) in CROPS.items():
        with (
            Image.open(SHARED / "data" / "kodak24" / f"kodim{number:02}.png") as photograph,
            Image.open(fixtures_dir / "calibration" / "ref" / f"I{number:02}.png") as reference,
        ):
            window = photograph.crop((left, top, left + WIDTH, top + HEIGHT))
            assert np.array_equal(np.asarray(window), np.asarray(reference.convert("RGB")))
