"""Tables with human scores, and folders laid out as the data sets are published, with their real names."""

import csv
import gzip
import json
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import pytest
from PIL import Image

from iqareward.rated import DATASETS, lower_is_better, read_rated

MOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "mos"
# the first rows of the published lists, in the order of the lists
ROWS = {
    "kadid10k": [
        ("I01_01_01.png", "I01.png", 4.57), ("I01_01_02.png", "I01.png", 4.33), ("I81_25_05.png", "I81.png", 3.27),
    ],
    "tid2013": [
        ("i01_01_1.bmp", "i01.bmp", 5.5143), ("i01_01_2.bmp", "i01.bmp", 5.5676), ("i25_24_5.bmp", "i25.bmp", 2.7714),
    ],
    "koniq10k": [("10004473376.jpg", "", 3.82857142857143), ("9996001596.jpg", "", 3.41747572815534)],
    "pipal": [("A0001_00_00.bmp", "A0001.bmp", 1520.0648), ("A0248_06_26.bmp", "A0248.bmp", 1257.06)],
    "spaq": [("00001.jpg", "", 48.86), ("00002.jpg", "", 62.5), ("11125.jpg", "", 10.8)],
    "live_challenge": [("101.bmp", "", 66.3595), ("533.JPG", "", 50.0), ("1164.bmp", "", 72.7539)],
}  # fmt: skip
DISTORTIONS = {"kadid10k": ["01", "01", "25"], "tid2013": ["01", "01", "24"], "pipal": ["00", "06"]}
TABLES = {
    "kadid10k": "KADID-10k", "tid2013": "TID2013", "koniq10k": "KonIQ-10k", "pipal": "PIPAL", "spaq": "SPAQ",
    "live_challenge": "LIVE_Challenge",
}  # fmt: skip


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(len(file.name)).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, {".jpg": "JPEG", ".bmp": "BMP", ".png": "PNG"}[file.suffix.lower()])


def spreadsheet(file: Path, rows: list[list[str | float]]) -> None:
    """A workbook of one sheet as spreadsheet programs write it: texts are shared, numbers are not."""
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    texts = [cell for row in rows for cell in row if isinstance(cell, str)]

    def cell(place: str, value: str | float) -> str:
        if isinstance(value, str):
            return f'<c r="{place}" t="s"><v>{texts.index(value)}</v></c>'
        return f'<c r="{place}"><v>{value}</v></c>'

    lines: list[str] = []
    for number, row in enumerate(rows, start=1):
        cells = "".join(cell(f"{'ABC'[place]}{number}", value) for place, value in enumerate(row))
        lines.append(f'<row r="{number}">{cells}</row>')
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w") as archive:
        shared = "".join(f"<si><t>{escape(text)}</t></si>" for text in texts)
        archive.writestr("xl/sharedStrings.xml", f"<sst {space}>{shared}</sst>")
        sheet = f"<worksheet {space}><sheetData>{''.join(lines)}</sheetData></worksheet>"
        archive.writestr("xl/worksheets/sheet1.xml", sheet)


def lay_out(name: str, folder: Path) -> Path:
    """A tiny folder with the layout and the names of a data set."""
    rows = ROWS[name]
    if name == "kadid10k":
        lines = [f"{image},{reference},{human},0.5" for image, reference, human in rows]
        (folder / "dmos.csv").write_text("\n".join(["dist_img,ref_img,dmos,var", *lines]) + "\n")
        files = [f"images/{file}" for row in rows for file in row[:2]]
    elif name == "tid2013":
        (folder / "mos_with_names.txt").write_text("".join(f"{human} {image}\r\n" for image, _, human in rows))
        files = [f"distorted_images/{image.replace('i25', 'I25')}" for image, *_ in rows]  # the set mixes its case
        files += [f"reference_images/{reference.upper()}" for _, reference, _ in rows]
    elif name == "koniq10k":
        lines = [f'"{image}",0,0,1,2,3,6,{human},0.5,60' for image, _, human in rows]
        header = '"image_name","c1","c2","c3","c4","c5","c_total","MOS","SD","MOS_zscore"'
        (folder / "koniq10k_scores_and_distributions.csv").write_text("\n".join([header, *lines]) + "\n")
        files = [f"1024x768/{image}" for image, *_ in rows]
    elif name == "pipal":
        (folder / "Train_Label").mkdir()
        for image, reference, human in rows:
            (folder / "Train_Label" / reference.replace("bmp", "txt")).write_text(f"{image},{human}\n")
        files = [f"Distortion_{place}/{row[0]}" for place, row in enumerate(rows, start=1)]
        files += [f"Train_Ref/{reference}" for _, reference, _ in rows]
    elif name == "spaq":
        sheet = folder / "Annotations" / "MOS and Image attribute scores.xlsx"
        spreadsheet(sheet, [["Image name", "MOS", "Brightness"], *([image, human, 50.0] for image, _, human in rows)])
        files = [f"TestImage/{image}" for image, *_ in rows]
    else:
        scipy_io = pytest.importorskip("scipy.io")
        listed = [("t1.bmp", "", 63.9634), *rows]  # images to practise on stand first
        names = np.array([[np.array([image])] for image, *_ in listed], dtype=object)
        (folder / "Data").mkdir()
        scipy_io.savemat(folder / "Data" / "AllImages_release.mat", {"AllImages_release": names})
        scores = np.array([[human for *_, human in listed]])
        scipy_io.savemat(folder / "Data" / "AllMOS_release.mat", {"AllMOS_release": scores})
        files = ["Images/trainingImages/t1.bmp", *(f"Images/{image}" for image, *_ in rows)]
    for file in files:
        picture(folder / file)
    return folder


@pytest.mark.parametrize("name", DATASETS)
def test_folder_of_a_data_set(name: str, tmp_path: Path) -> None:
    """Every image with its score, in the order of the list, with its reference and distortion where there are any."""
    table = read_rated(f"{name}:{lay_out(name, tmp_path)}")
    rows = ROWS[name]
    images = list(map(Path, table.columns["image"]))
    assert all(image.is_file() for image in images)
    assert [image.name.lower() for image in images] == [image.lower() for image, *_ in rows]
    assert table.numbers(table.human, "--human") == [human for *_, human in rows]
    if rows[0][1]:
        references = list(map(Path, table.columns[table.reference]))
        assert all(reference.is_file() for reference in references)
        assert [reference.name.lower() for reference in references] == [row[1].lower() for row in rows]
        assert [group.lower() for group in table.columns[table.group]] == [row[1][:-4].lower() for row in rows]
        assert table.columns["distortion"] == DISTORTIONS[name]
    else:
        assert table.reference == ""
        assert len(set(table.columns[table.group])) == len(rows)  # each image is an input of its own


@pytest.mark.skipif(not MOS.is_dir(), reason="the lists of scores are not distributed with the repository (../shared)")
@pytest.mark.parametrize("name", DATASETS)
def test_names_and_scores_are_the_published_ones(name: str) -> None:
    """The rows that these tests lay out stand in an independent copy of the lists, with the same scores."""
    with gzip.open(MOS / f"{TABLES[name]}.csv.gz", "rt") as file:
        listed = {Path(row["dis_img_path"]).name: row for row in csv.DictReader(file)}
    for image, reference, human in ROWS[name]:
        assert Path(listed[image].get("ref_img_path") or "").name == reference
        if image != "533.JPG":  # one is there for its suffix
            assert float(listed[image]["score"]) == pytest.approx(human, abs=1e-6)


@pytest.mark.parametrize("name", DATASETS)
def test_wrong_folder_says_what_was_expected(name: str, tmp_path: Path) -> None:
    """A folder of something else is refused with the name that is missing and what is there instead."""
    (tmp_path / "holiday").mkdir()
    with pytest.raises(ValueError, match=rf"{name} expected .* in .*, which holds holiday"):
        read_rated(f"{name}:{tmp_path}")
    with pytest.raises(ValueError, match="there is no folder"):
        read_rated(f"{name}:{tmp_path / 'nowhere'}")


def test_list_without_its_images(tmp_path: Path) -> None:
    """The scores without any of the images are refused; one missing image is kept in the table."""
    lay_out("kadid10k", tmp_path)
    (tmp_path / "images" / "I01_01_02.png").unlink()
    assert len(read_rated(f"kadid10k:{tmp_path}").columns["image"]) == 3
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match=r"none of the 3 rated images of kadid10k is there; expected .*I01_01_01\.png"):
        read_rated(f"kadid10k:{tmp_path}")


def test_damaged_list(tmp_path: Path) -> None:
    """A line that is not of the data set is an error with its folder."""
    lay_out("tid2013", tmp_path)
    (tmp_path / "mos_with_names.txt").write_text("5.5 i01_01_1.bmp extra\n")
    with pytest.raises(ValueError, match=r"the list of tid2013 cannot be read: too many values"):
        read_rated(f"tid2013:{tmp_path}")


def test_damaged_spreadsheet(tmp_path: Path) -> None:
    """A spreadsheet that is none is named."""
    folder = lay_out("spaq", tmp_path)
    (folder / "Annotations" / "MOS and Image attribute scores.xlsx").write_bytes(b"PK damaged")
    with pytest.raises(ValueError, match=r"scores\.xlsx cannot be read as a spreadsheet"):
        read_rated(f"spaq:{folder}")


COLUMNS = {"image": ["a.png", "b.png", "ü,.png"], "mos": [1.5, 2.0, None], "scene": ["x", "x", "y"]}


def written(suffix: str, folder: Path) -> Path:
    file = folder / f"table{suffix}"
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)]
    if suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        import pyarrow.parquet as parquet

        parquet.write_table(pyarrow.Table.from_pydict(COLUMNS), file)
    else:
        with file.open("w", newline="", encoding="utf-8-sig") as stream:
            writer = csv.DictWriter(stream, COLUMNS, delimiter="," if suffix == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
    return file


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".jsonl", ".parquet"])
def test_every_kind_of_table(suffix: str, tmp_path: Path) -> None:
    """One table in each format has the same columns; an empty cell is a missing number."""
    table = read_rated(str(written(suffix, tmp_path)))
    assert list(table.columns) == list(COLUMNS)
    assert table.columns["image"] == COLUMNS["image"]
    np.testing.assert_array_equal(table.numbers("mos", "--human"), [1.5, 2.0, np.nan])
    assert table.folder == tmp_path


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "x,y\n1\n", "row 1 has 1 cells below a header of 2"),
        ("a.csv", "x,x\n1,2\n", "columns share a name"),
        ("a.csv", "x,y\n", "no rows below its header"),
        ("a.csv", "", "no rows below its header"),
        ("a.jsonl", "[1\n", "cannot be read as .jsonl"),
        ("a.parquet", "text", "cannot be read as .parquet"),
        ("a.xlsx", "", "expected a table"),
    ],
)
def test_damaged_tables(name: str, content: str, message: str, tmp_path: Path) -> None:
    """What is wrong is said, with the file."""
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_rated(str(tmp_path / name))


def test_cells_and_columns_that_do_not_fit(tmp_path: Path) -> None:
    """A word among numbers is named with its row, an unknown column with those there are."""
    (tmp_path / "a.csv").write_text("mos,name\n1,x\ngood,y\n")
    table = read_rated(str(tmp_path / "a.csv"))
    with pytest.raises(ValueError, match=r"--human 'mos': row 2 of .* is 'good', not a number"):
        table.numbers("mos", "--human")
    with pytest.raises(ValueError, match=r"--human 'mso': .* has the columns mos, name"):
        table.numbers("mso", "--human")


def test_directions_by_name() -> None:
    """Names of the catalogue in any spelling; an unknown one is not guessed."""
    assert [lower_is_better(name) for name in ("lpips_vgg", "NIQE", "gmsd", "piqe")] == [True] * 4
    assert [lower_is_better(name) for name in ("psnr", "MS-SSIM", "qalign")] == [False] * 3
    assert lower_is_better("my distance") is None
