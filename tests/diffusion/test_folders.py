"""FolderPairs on the layouts of published data sets: which file belongs to which, scales, tables, and hostile files."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from iqareward.diffusion import FolderPairs, RealESRGANDegradation, batches
from tests.tolerances import EXACT


def write(path: Path, level: int, side: int = 8) -> None:
    """A flat image whose grey level tells which file it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side), (level, level, level)).save(path)


def levels(pairs: FolderPairs) -> list[tuple[int, ...]]:
    """The grey levels of (lq, gt) of every input."""
    return [tuple(round(float(item[key].mean() * 255)) for key in ("lq", "gt") if key in item) for item in pairs]


LAYOUTS = {  # rule: (files of the degraded images, of the ground truth), in that order of pairs
    "div2k": (["LR/X4/0001x4.png", "LR/X4/0002x4.png"], ["HR/0001.png", "HR/0002.png"]),
    "realsr": (["Canon_001_LR4.png", "Nikon_001_LR4.png"], ["Canon_001_HR.png", "Nikon_001_HR.png"]),
    "gopro": (["GOPR0372/blur/07.png", "GOPR0384/blur/07.png"], ["GOPR0372/sharp/07.png", "GOPR0384/sharp/07.png"]),
    "rain100": (["rain-001.png", "rain-002.png"], ["norain-001.png", "norain-002.png"]),
    "reside": (
        ["hazy/0001_0.8_0.2.jpg", "hazy/0001_1.0_0.1.jpg", "hazy/0002_0.8_0.2.jpg"],
        ["clear/0001.png", "clear/0001.png", "clear/0002.png"],
    ),
}


@pytest.mark.parametrize("rule", LAYOUTS)
def test_a_known_layout_is_paired(rule, tmp_path):
    """The files of published data sets under their own names, many to one included."""
    degraded, truth = LAYOUTS[rule]
    expected = []
    for place, (lq, gt) in enumerate(zip(degraded, truth, strict=True)):
        level = 100 + truth.index(gt) * 10
        write(tmp_path / lq, 50 + 10 * place)
        write(tmp_path / gt, level)
        expected.append((50 + 10 * place, level))
    folders = {"div2k": ("HR", "LR/X4"), "reside": ("clear", "hazy")}.get(rule)
    places = {"source": tmp_path} if folders is None else {
        "source": tmp_path / folders[0], "degraded_folder": tmp_path / folders[1]
    }  # fmt: skip
    found = levels(FolderPairs(**places, rule=rule))
    assert [pair[1] for pair in found] == [pair[1] for pair in expected]
    assert [pair[0] for pair in found] == pytest.approx([pair[0] for pair in expected], abs=1)  # JPEG


def test_own_patterns_name_the_task(tmp_path):
    """Two patterns over one tree; the field `task` becomes the task, and the option the prompt."""
    for place, task in enumerate(("derain", "haze")):
        write(tmp_path / task / "bad" / "1.png", 10 + place)
        write(tmp_path / task / "good" / "1_gt.png", 20 + place)
    pairs = FolderPairs(tmp_path, rule=("{task}/bad/{name}", "{task}/good/{name}_gt"), prompt="a photo")
    assert levels(pairs) == [(10, 20), (11, 21)]
    assert [(item["task"], item["prompt"]) for item in pairs] == [("derain", "a photo"), ("haze", "a photo")]
    for rule in ("unknown", ("{name}", "{other}"), ("{name}", "*")):
        with pytest.raises(ValueError, match="FolderPairs expected"):
            FolderPairs(tmp_path, rule=rule)


def test_crops_are_aligned_on_the_grid_of_the_degraded_image(tmp_path):
    """At x4 the crop of the ground truth, reduced, is the crop of the degraded image; other sizes name both files."""
    small = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    large = small.repeat(4, 0).repeat(4, 1)
    Image.fromarray(small).save(tmp_path / "ax4.png")
    Image.fromarray(large).save(tmp_path / "a.png")
    pairs = FolderPairs(tmp_path, size=16, rule="div2k", scale=4, crops=8)
    for item in pairs:
        assert item["lq"].shape == (3, 4, 4)
        torch.testing.assert_close(item["gt"][:, ::4, ::4], item["lq"], **EXACT)
    whole = FolderPairs(tmp_path, rule="div2k", scale=4)[0]
    assert (whole["lq"].shape, whole["gt"].shape) == ((3, 10, 12), (3, 40, 48))
    with pytest.raises(ValueError, match="multiple of the scale 4, got 18"):
        FolderPairs(tmp_path, size=18, rule="div2k", scale=4)
    with pytest.raises(ValueError, match=r"a\.png to be 2 times \S*ax4\.png, 24 x 20, got 48 x 40"):
        _ = FolderPairs(tmp_path, size=16, rule="div2k", scale=2)[0]


def test_photographs_without_ground_truth_and_whole_images_of_mixed_sizes(tmp_path):
    """Inputs without `gt`, in their own sizes; a made pair is cut to a multiple of the degradation's scale."""
    write(tmp_path / "a.png", 10, side=18)
    write(tmp_path / "b.png", 20, side=24)
    found = batches(FolderPairs(tmp_path, rule="no references"), [0, 1])
    assert [(batch.ids, batch.degraded.shape[-1], batch.references) for batch in found] == [
        ((0,), 18, None),
        ((1,), 24, None),
    ]
    made = [
        item["gt"].shape[-1] / item["lq"].shape[-1]
        for item in FolderPairs(tmp_path, degradation=RealESRGANDegradation())
    ]
    assert made == [4, 4]


@pytest.mark.parametrize("kind", ["csv", "tsv", "list"])
def test_tables_have_columns(kind, tmp_path):
    """A table pairs any files, with a prompt and a task for each input; a ground truth alone is degraded."""
    write(tmp_path / "in" / "x.png", 10)
    write(tmp_path / "out" / "y.png", 20)
    rows = [
        ("lq", "gt", "prompt", "task"),
        ("in/x.png", "out/y.png", "a cat, asleep", "denoise"),
        ("", "out/y.png", "", ""),
    ]
    if kind == "list":
        source = [{"lq": tmp_path / "in/x.png", "gt": tmp_path / "out/y.png", "prompt": "a cat, asleep",
                   "task": "denoise"},
                  {"gt": tmp_path / "out/y.png"}]  # fmt: skip
    else:
        source = tmp_path / f"pairs.{kind}"
        cells = [[f'"{cell}"' for cell in row] for row in rows]
        source.write_text("\n".join(("," if kind == "csv" else "\t").join(row) for row in cells), encoding="utf-8-sig")
    pairs = FolderPairs(source)
    assert len(pairs) == 2
    assert levels(pairs)[0] == (10, 20)
    assert (pairs[0]["prompt"], pairs[0]["task"]) == ("a cat, asleep", "denoise")
    assert "task" not in pairs[1]
    (tmp_path / "in/x.png").unlink()
    with pytest.raises(ValueError, match=r"row \d names \S*x\.png, which is not there"):
        FolderPairs(source)


def test_files_that_do_not_fit_are_named(tmp_path):
    """No partner, two candidates, a ground truth too many, a truncated file, NaN, and a table without files."""
    write(tmp_path / "rain-1.png", 10)
    write(tmp_path / "norain-1.png", 20)
    write(tmp_path / "rain-2.png", 10)
    with pytest.raises(ValueError, match=r"rain-2\.png has no ground truth \S*norain-2"):
        FolderPairs(tmp_path, rule="rain100")
    (tmp_path / "rain-2.png").rename(tmp_path / "norain-2.png")
    with pytest.raises(ValueError, match=r"norain-2\.png is the ground truth of no degraded image"):
        FolderPairs(tmp_path, rule="rain100")
    (tmp_path / "norain-2.png").rename(tmp_path / "norain-1.bmp")
    with pytest.raises(ValueError, match=r"norain-1\.bmp and \S*norain-1\.png are both ground truth of rain-1\.png"):
        FolderPairs(tmp_path, rule="rain100")
    (tmp_path / "norain-1.bmp").unlink()
    pairs = FolderPairs(tmp_path, rule="rain100")
    content = (tmp_path / "rain-1.png").read_bytes()
    (tmp_path / "rain-1.png").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"could not read \S*/rain-1\.png"):
        _ = pairs[0]
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(tmp_path / "norain-3.tif")
    with pytest.raises(ValueError, match=r"floats in \[0, 1\], got \S*norain-3\.tif with nan"):
        _ = FolderPairs([{"lq": tmp_path / "norain-3.tif"}])[0]
    (tmp_path / "table.csv").write_text("input,output\na,b\n")
    with pytest.raises(
        ValueError, match=r"'lq' or 'gt' in \S*table\.csv, row 1, got the columns \['input', 'output'\]"
    ):
        FolderPairs(tmp_path / "table.csv")
