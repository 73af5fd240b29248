"""Pairs: an id always gives the same pair, files are cropped and matched by name, and bad files are named."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from iqareward.difficulty import rmse
from iqareward.diffusion import (
    Degradation,
    FolderPairs,
    Pairs,
    StoredPairs,
    Subset,
    SyntheticPairs,
    batches,
    synthetic_images,
)
from tests.tolerances import EXACT

NAMES = ("a.png", "b.PNG", "inner/c.png", "inner/deeper/d.bmp")


def save(image: Tensor, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((image * 255).round().to(torch.uint8).movedim(0, -1).numpy()).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images of 40 x 30 in folders, and a file that is no image."""
    for image, name in zip(synthetic_images(range(4), size=40), NAMES):
        save(image[:, :30], tmp_path / "clean" / name)
    (tmp_path / "clean" / "notes.txt").write_text("no image")
    return tmp_path / "clean"


def images_of(pairs: Pairs, ids: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(degraded, references) `[B, 3, H, W]` of inputs of one size."""
    (batch,) = batches(pairs, ids)
    assert batch.ids == tuple(ids)
    assert batch.references is not None
    return batch.degraded, batch.references


def check_batches(pairs: Pairs) -> None:
    """The promises of the protocol."""
    degraded, references = images_of(pairs, [0, 1, 2, 3])
    assert degraded.shape == references.shape
    for images in (degraded, references):
        assert images.dtype == torch.float32
        assert images.amin() >= 0
        assert images.amax() <= 1
    for copy in (pairs, pickle.loads(pickle.dumps(pairs))):
        for rows in ([3, 1], [2]):
            again = images_of(copy, rows)
            torch.testing.assert_close(again[0], degraded[rows], **EXACT)
            torch.testing.assert_close(again[1], references[rows], **EXACT)
        torch.testing.assert_close(copy[2]["lq"], degraded[2], **EXACT)
    assert len(list(pairs)) == len(pairs)
    with pytest.raises(IndexError, match="ids in"):
        batches(pairs, [0, len(pairs)])


def test_pairs_do_not_depend_on_their_batch(folder):
    """Both kinds keep the promises of the protocol, also as a pickled copy."""
    check_batches(SyntheticPairs(10, size=24))
    check_batches(FolderPairs(folder, size=24))
    check_batches(FolderPairs(folder, size=24, degraded_folder=folder))
    check_batches(FolderPairs(folder, size=24, crops=2))


def test_severity_tells_the_damage():
    """Severities are uniform, and are what the degradation was given."""
    pairs = SyntheticPairs(256, size=32)
    severities = pairs.severities(range(256))
    torch.testing.assert_close(severities.sort().values, torch.linspace(0, 1, 256), rtol=0, atol=0.1)
    degraded, references = images_of(pairs, range(32))
    torch.testing.assert_close(Degradation()(references, severities[:32], range(32)), degraded, **EXACT)
    ranks = torch.stack([rmse(degraded, references), severities[:32]]).argsort(1).argsort(1).double()
    assert torch.corrcoef(ranks)[0, 1] > 0.7


def test_seeds_are_other_data_sets():
    """No image or severity of one seed is in the other."""
    first, other = SyntheticPairs(8, size=16), SyntheticPairs(8, size=16, seed=1)
    assert len(first) == 8
    assert (rmse(images_of(first, range(8))[1], images_of(other, range(8))[1]) > 0.02).all()
    assert not (first.severities(range(8)) == other.severities(range(8))).any()


def test_folder_is_sorted_and_cropped(folder):
    """Ids follow the sorted names, other files are left out, and a crop is a part of its image."""
    pairs = FolderPairs(folder, size=16, degradation=Degradation(("noise",)))
    assert pairs.names == list(NAMES)
    assert len(pairs) == 4
    crop = images_of(pairs, [2])[1][0]
    whole = (synthetic_images([2], size=40)[0, :, :30] * 255).round() / 255
    windows = whole.unfold(1, 16, 1).unfold(2, 16, 1).movedim(0, 2)
    assert (windows == crop).all(-1).all(-1).all(-1).sum() == 1
    other_crops = [images_of(FolderPairs(folder, size=16, seed=seed), [2])[1][0] for seed in range(1, 4)]
    assert not all(other.equal(crop) for other in other_crops)


def test_several_crops_of_a_file_are_other_inputs(folder):
    """Ids k * crops to k * crops + crops - 1 are other places of file k, each with a severity of its own."""
    pairs = FolderPairs(folder, size=16, crops=3)
    assert len(pairs) == 12
    degraded, references = images_of(pairs, [6, 7, 8])
    whole = (synthetic_images([2], size=40)[0, :, :30] * 255).round() / 255
    windows = whole.unfold(1, 16, 1).unfold(2, 16, 1).movedim(0, 2)
    assert all((windows == crop).all(-1).all(-1).all(-1).sum() == 1 for crop in references)
    assert len({tuple(crop.flatten().tolist()) for crop in references}) > 1
    assert len({float(error) for error in rmse(degraded, references)}) == 3


def test_real_pairs_are_cropped_alike(folder, tmp_path):
    """With a second folder both crops show the same place, and nothing else is done to them."""
    for image, name in zip(synthetic_images(range(4), size=40), NAMES):
        save(1 - (image[:, :30] * 255).round() / 255, tmp_path / "negative" / name)
    degraded, references = images_of(FolderPairs(folder, size=20, degraded_folder=tmp_path / "negative"), range(4))
    torch.testing.assert_close((degraded * 255).round(), ((1 - references) * 255).round(), **EXACT)


def test_bad_files_are_named(folder, tmp_path):
    """A file that is broken, too small, missing or of another size is in the message."""
    with pytest.raises(ValueError, match=r"at least 31 x 31, got \S*a\.png of 40 x 30"):
        images_of(FolderPairs(folder, size=31), [0])
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"could not read \S*a\.png"):
        images_of(FolderPairs(folder, size=16), [1, 0])
    save(torch.zeros(3, 30, 40), tmp_path / "degraded" / "a.png")
    with pytest.raises(ValueError, match=r"3 files do not fit, the first being: \S*b\.PNG is the ground truth of no"):
        FolderPairs(folder, size=16, degraded_folder=tmp_path / "degraded")
    for name in NAMES:
        save(torch.zeros(3, 15, 20), tmp_path / "degraded" / name)
    with pytest.raises(ValueError, match=r"clean/b\.PNG to be 1 times \S*degraded/b\.PNG, 20 x 15, got 40 x 30"):
        images_of(FolderPairs(folder, size=10, degraded_folder=tmp_path / "degraded"), [1])


def test_real_pairs_may_differ_in_suffix(folder, tmp_path):
    """A degraded image is found with any image suffix in any case; two that fit are named, not guessed."""
    for name in NAMES:
        save(torch.full((3, 30, 40), 0.2), (tmp_path / "dark" / name).with_suffix(".BMP"))
    degraded, _ = images_of(FolderPairs(folder, size=16, degraded_folder=tmp_path / "dark"), range(4))
    torch.testing.assert_close(degraded, torch.full((4, 3, 16, 16), 0.2), **EXACT)
    save(torch.zeros(3, 30, 40), tmp_path / "dark" / "b.tif")
    with pytest.raises(ValueError, match=r"dark/b\.BMP is one of several images of that name"):
        FolderPairs(folder, size=16, degraded_folder=tmp_path / "dark")


def test_nothing_is_left_out_without_a_word(folder):
    """A link that leads nowhere, an animation and floats of 0 to 255 are errors that name the file."""
    frame = Image.new("L", (40, 30))
    frame.save(folder / "c.gif", save_all=True, append_images=[Image.new("L", (40, 30), 255)])
    with pytest.raises(ValueError, match=r"could not read \S*c\.gif: it holds 2 frames"):
        images_of(FolderPairs(folder, size=16), [2])
    Image.new("F", (40, 30), 255).save(folder / "c.tif")
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got \S*c\.tif with 255 to 255"):
        images_of(FolderPairs(folder, size=16), [3])
    (folder / "d.png").symlink_to("nowhere.png")
    with pytest.raises(ValueError, match=r"cannot use \S*d\.png: a link that leads nowhere"):
        FolderPairs(folder, size=16)


def test_nothing_to_read_is_refused(tmp_path):
    """Missing and empty folders, and sizes and numbers below 1, are errors at construction."""
    with pytest.raises(ValueError, match="expected a folder of images"):
        FolderPairs(tmp_path / "absent", size=16)
    with pytest.raises(ValueError, match="matches no images"):
        FolderPairs(tmp_path, size=16)
    for options in ({"num_inputs": 0}, {"num_inputs": 4, "size": 0}):
        with pytest.raises(ValueError, match="SyntheticPairs expected"):
            SyntheticPairs(**options)
    for options in ({"size": 0}, {"size": 16, "crops": 0}):
        with pytest.raises(ValueError, match="size >= 1, crops >= 1 and scale >= 1"):
            FolderPairs(tmp_path, **options)


PAIRS = SyntheticPairs(6, size=16)


def test_a_subset_counts_from_zero():
    """Its ids are places in the list it was given, in any order."""
    part = Subset(PAIRS, (5, 0, 2))
    assert len(part) == 3
    for found, expected in zip(images_of(part, [2, 0]), images_of(PAIRS, [2, 5]), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_subset_has_ids_of_its_pairs():
    """None, or one too many, is an error."""
    for ids in ((), (6,), (-1,)):
        with pytest.raises(ValueError, match=r"ids in \[0, 6\)"):
            Subset(PAIRS, ids)


def test_stored_pairs_are_the_pairs():
    """The same tensors for the same ids."""
    for found, expected in zip(images_of(StoredPairs.of(PAIRS), [4, 1]), images_of(PAIRS, [4, 1]), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)
