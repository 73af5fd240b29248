"""Batches of columns get scores, alone and in the `map` of Hugging Face data sets."""

import multiprocessing
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from iqareward.datasets import ScoreColumns
from tests.datasets.levels import SIDE, Level, png

datasets = pytest.importorskip("datasets", reason="Hugging Face's data sets")


def data(**columns):
    images = [{"bytes": png(level), "path": None} for level in range(6)] + [{"bytes": b"bad", "path": None}]
    made = datasets.Dataset.from_dict({"image": images, "id": list(range(7)), **columns})
    return made.cast_column("image", datasets.Image(decode=False))


def test_a_mapped_data_set_has_scores_and_reasons():
    """Columns of float32 and of reasons are added; what was there stays."""
    scored = data().map(ScoreColumns([Level(), Level(name="again")]), batched=True, batch_size=3)
    assert scored.column_names == ["image", "id", "level", "again", "problem"]
    assert scored.features["level"].dtype == "float32"
    assert scored["level"][:6] == scored["again"][:6] == [0, 1, 2, 3, 4, 5]
    assert np.isnan(scored["level"][6])
    assert scored["problem"][:6] == [""] * 6
    assert scored["problem"][6].startswith("not read")


@pytest.mark.slow
def test_several_processes_after_torch_was_used():
    """`num_proc` forks, and a fork without the threads of torch's pool would wait for them for ever."""
    program = (
        "import torch, datasets\n"
        "from tests.datasets.test_columns import data\n"
        "from iqareward.datasets import ScoreColumns\n"
        "datasets.disable_progress_bars()\n"
        "torch.set_num_threads(4)\n"
        "torch.randn(2000, 2000) @ torch.randn(2000, 2000)\n"
        "scored = data().select(range(6)).map(ScoreColumns(['niqe', 'quick']), batched=True, num_proc=2)\n"
        "print(len(scored['quick']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.strip() == "6"


def test_decoded_images_arrays_and_paths(tmp_path):
    """Whatever a column holds is scored."""
    (tmp_path / "a.png").write_bytes(png(9))
    pixels = np.full((SIDE, SIDE, 3), 9, dtype=np.uint8)
    forms = [png(9), {"bytes": None, "path": str(tmp_path / "a.png")}, Image.fromarray(pixels), pixels, None]
    scored = ScoreColumns(Level())({"image": forms})
    np.testing.assert_array_equal(scored["level"], [9, 9, 9, 9, np.nan])
    assert scored["problem"].tolist() == [""] * 4 + ["not read: there is no image"]


def test_columns_are_tried_in_order():
    """The first name with a value counts, for each row."""
    batch = {"png": [None, png(2)], "jpg": [png(1), png(3)], "id": ["a", "b"]}
    scored = ScoreColumns(Level(), images="png;jpg", keep=["id"])(batch)
    assert scored["level"].tolist() == [1, 2]
    assert scored["id"] == ["a", "b"]


def test_references_and_prompts():
    """A reward that needs a column gets it, and says what is missing where a row has none."""
    scored = ScoreColumns("psnr", references="clean")({"image": [png(1)] * 2, "clean": [png(1), None]})
    np.testing.assert_array_equal(scored["psnr"], [100, np.nan])
    assert scored["problem"].tolist() == ["", "references: none here"]


def test_values_that_are_not_one_image_or_one_text():
    """A list of either is a row with a reason, and never the score of its first."""
    pixels = np.zeros((2, SIDE, SIDE, 3), dtype=np.uint8)
    scored = ScoreColumns(Level())({"image": [pixels, [png(1), png(2)], png(3)]})
    np.testing.assert_array_equal(scored["level"], [np.nan, np.nan, 3])
    batch = {"image": [png(3)] * 3, "text": [["a", "b"], float("nan"), "a red house"]}
    problems = ScoreColumns(Level(), prompts="text")(batch)["problem"]
    assert problems.tolist() == ["prompts: expected one text, got list", "prompts: expected one text, got float", ""]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ("psnr", {}, "psnr needs references: name the column"),
        (["niqe", "niqe"], {}, "'niqe' twice"),
        ([], {}, "at least one reward"),
        ("niqe", {"keep": ["niqe"]}, "Rename them"),
    ],
)
def test_what_cannot_be_scored_is_refused_at_once(arguments, options, message):
    """Before any image is read."""
    with pytest.raises(ValueError, match=message):
        ScoreColumns(arguments, **options)


def test_a_missing_column():
    """The error names the columns that there are."""
    with pytest.raises(ValueError, match="named photo, got the columns image, id"):
        ScoreColumns("niqe", images="photo")({"image": [png(1)], "id": [1]})


def test_rows_instead_of_batches():
    """Without `batched=True`, the bytes of one image would be taken for a batch of numbers."""
    with pytest.raises(TypeError, match="batched=True"):
        ScoreColumns(Level())({"image": png(1)})


def test_processes_agree_on_the_fingerprint():
    """Hugging Face's cache finds the scores again in another process: the pickle is the same before and after use."""
    scorer = ScoreColumns(["niqe", "quick"])
    before = datasets.fingerprint.Hasher.hash(scorer)
    scorer({"image": [png(1)]})
    assert datasets.fingerprint.Hasher.hash(scorer) == before
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(datasets.fingerprint.Hasher.hash, (pickle.loads(pickle.dumps(scorer)),)) == before
