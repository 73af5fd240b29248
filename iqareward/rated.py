"""Images with human scores: tables of your own, the table of QualiSR in this package, and known data sets."""

import csv
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from iqareward.optional import require
from iqareward.rewards.catalog import published
from iqareward.rewards.specs import PYIQA_PREFIX

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_NAMES = ("human", "group", "image", "reference")  # columns that are known by their names
SUFFIXES = (*_SEPARATORS, ".jsonl", ".parquet")


@dataclass(frozen=True)
class RatedTable:
    """A table with a row for each image.

    Attributes:
        source: what it was read from.
        columns: name -> N cells as text, all of one length; an empty cell is a missing value.
        folder: where relative paths of images start.
        human: column of human scores; "" = unknown, as are the others.
        group: column of inputs.
        image: column of image files.
        reference: column of references.
        scores: columns of scores.
        lower_is_better: those of them that fall as quality rises.
    """

    source: str
    columns: Mapping[str, list[str]]
    folder: Path
    human: str = ""
    group: str = ""
    image: str = ""
    reference: str = ""
    scores: tuple[str, ...] = ()
    lower_is_better: tuple[str, ...] = ()

    def column(self, name: str, option: str) -> list[str]:
        """The cells of a column that an option names, or a ValueError that lists the columns there are."""
        if name not in self.columns:
            raise ValueError(f"{option} {name!r}: {self.source} has the columns {', '.join(self.columns)}.")
        return self.columns[name]

    def numbers(self, name: str, option: str) -> list[float]:
        """The cells of a column as numbers, NaN where a cell is empty."""
        found: list[float] = []
        for row, cell in enumerate(self.column(name, option), start=1):
            try:
                found.append(float(cell.strip() or "nan"))
            except ValueError as error:
                raise ValueError(f"{option} {name!r}: row {row} of {self.source} is {cell!r}, not a number.") from error
        return found


def read_rated(source: str) -> RatedTable:
    """Read images with human scores.

    Args:
        source: a table (.csv, .tsv, .txt with tabs, .jsonl with an object a line, or .parquet), `"qualisr"`, or a data
            set and its folder, such as `"kadid10k:/data/kadid10k"`; `DATASETS` has their names.

    Returns:
        The table. Columns named `human`, `group`, `image` and `reference` are taken as such. Data sets have these and
        `distortion`; their higher human scores are better, and a group has one reference.

    Raises:
        ValueError: an unknown source, a damaged table, or a folder that does not hold the data set.
        ImportError: a package that reads this kind of file is not installed.

    Example:
        >>> table = read_rated("qualisr")
        >>> len(table.columns["human"]), table.group, table.scores[:3]
        (120, 'input', ('qalign', 'musiq', 'unique'))
    """
    if source == "qualisr":
        return _qualisr()
    name, colon, folder = source.partition(":")
    if colon and name in DATASETS:
        return _dataset(name, Path(folder))
    file = Path(source)
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"{source}: expected a table ({', '.join(SUFFIXES)}), 'qualisr', or a data set with its folder, such as "
            f"kadid10k:DIR. The data sets are {', '.join(DATASETS)}."
        )
    columns = _read_table(file)
    if not columns or not next(iter(columns.values())):
        raise ValueError(f"{file} has no rows below its header.")
    human, group, image, reference = (name if name in columns else "" for name in _NAMES)
    return RatedTable(str(file), columns, file.parent, human, group, image, reference)


def lower_is_better(name: str) -> bool | None:
    """Tell by its name whether a published metric falls as quality rises; None if the name is not known.

    Args:
        name: a name of the catalogue, or a metric of pyiqa if that is installed.

    Example:
        >>> lower_is_better("LPIPS"), lower_is_better("ssim"), lower_is_better("score_7")
        (True, False, None)
    """
    for known in (name, PYIQA_PREFIX + name):
        try:
            line = published(known)
        except (ValueError, ImportError):
            continue
        return line is not None and line[0] < 0
    return None


def _qualisr() -> RatedTable:
    """Human and metric scores of 120 super-resolved images, https://github.com/msu-video-group/QualiSR-Lab, BSD-3."""
    with resources.as_file(resources.files("iqareward") / "data" / "qualisr.csv") as file:
        columns = _read_table(file)
    scores = tuple(columns)[3:]
    lower = tuple(name for name in scores if "lpips" in name or name == "pieapp")
    return RatedTable("qualisr", columns, Path(), "human", "input", scores=scores, lower_is_better=lower)


def _read_table(file: Path) -> dict[str, list[str]]:
    try:
        if file.suffix.lower() == ".parquet":
            try:
                import pyarrow.parquet as parquet
            except ImportError as error:
                raise ImportError(f"{file} needs pyarrow. Run: pip install pyarrow   (or convert it to CSV)") from error
            return {name: list(map(_text, cells)) for name, cells in parquet.read_table(file).to_pydict().items()}
        if file.suffix.lower() == ".jsonl":
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            names = dict.fromkeys(name for row in rows for name in row)
            return {name: [_text(row.get(name)) for row in rows] for name in names}
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = list(csv.reader(stream, delimiter=_SEPARATORS[file.suffix.lower()], strict=True))
    except (OSError, ImportError):
        raise
    except Exception as error:  # whatever the parsers make of a foreign file
        raise ValueError(f"{file} cannot be read as {file.suffix}: {error}.") from error
    header, *rows = [line for line in lines if line] or [[]]
    if len(set(header)) < len(header):
        raise ValueError(f"{file}: columns share a name in {', '.join(header)}. Rename one.")
    for number, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"{file}: row {number} has {len(row)} cells below a header of {len(header)}.")
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def _text(cell: Any) -> str:
    return "" if cell is None or (isinstance(cell, float) and math.isnan(cell)) else str(cell)


Row = tuple[Path, Path | None, str, float]
"""Image, reference, distortion and human score."""


class _LayoutError(ValueError):
    """A folder that is not laid out as its data set."""


def _dataset(name: str, folder: Path) -> RatedTable:
    try:
        rows = list(DATASETS[name](folder))
    except (_LayoutError, ImportError, OSError):
        raise
    except Exception as error:  # whatever a foreign list does to the parsers
        raise ValueError(f"{folder}: the list of {name} cannot be read: {error}.") from error
    if not any(image.is_file() for image, *_ in rows):
        first = f"expected {rows[0][0]} and others" if rows else "its list of scores is empty"
        raise ValueError(f"{folder}: none of the {len(rows)} rated images of {name} is there; {first}.")
    images, references, distortions, human = zip(*rows, strict=True)
    columns = {
        "image": list(map(str, images)),
        "reference": ["" if reference is None else str(reference) for reference in references],
        "group": [image.name if reference is None else reference.stem for image, reference, *_ in rows],
        "distortion": list(distortions),
        "human": list(map(repr, human)),
    }
    reference = "reference" if any(columns["reference"]) else ""
    return RatedTable(f"{name}:{folder}", columns, Path(), "human", "group", "image", reference)


def _existing(folder: Path, dataset: str, *choices: str) -> Path:
    """The first of some paths that exists in the folder of a data set."""
    for choice in choices:
        if (folder / choice).exists():
            return folder / choice
    if not folder.is_dir():
        raise _LayoutError(f"{dataset}: there is no folder {folder}.")
    held = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(held[:6]) + (", ..." if len(held) > 6 else "")
    raise _LayoutError(f"{dataset} expected {' or '.join(choices)} in {folder}, which holds {shown or 'nothing'}.")


def _csv(file: Path, *names: str) -> Iterable[list[str]]:
    columns = _read_table(file)
    if lacking := [name for name in names if name not in columns]:
        raise ValueError(f"{file} expected the columns {', '.join(names)}, lacks {', '.join(lacking)}.")
    return map(list, zip(*(columns[name] for name in names), strict=True))


def kadid10k(folder: Path) -> Iterable[Row]:
    """KADID-10k: `dmos.csv` and `images/`; its DMOS grows with quality.

    https://database.mmsp-kn.de/kadid-10k-database.html
    """
    images = _existing(folder, "kadid10k", "images")
    for image, reference, human in _csv(_existing(folder, "kadid10k", "dmos.csv"), "dist_img", "ref_img", "dmos"):
        yield images / image, images / reference, image.split("_")[1], float(human)


def tid2013(folder: Path) -> Iterable[Row]:
    """TID2013: `mos_with_names.txt`, `distorted_images/` and `reference_images/`, in any case of letters.

    http://www.ponomarenko.info/tid2013.htm
    """
    distorted, originals = (_existing(folder, "tid2013", f"{kind}_images") for kind in ("distorted", "reference"))
    images, references = ({file.name.lower(): file for file in place.iterdir()} for place in (distorted, originals))
    for line in _existing(folder, "tid2013", "mos_with_names.txt").read_text().splitlines():
        if line.strip():
            human, name = line.split()
            name = name.lower()
            reference = f"{name.partition('_')[0]}.bmp"
            yield (
                images.get(name, distorted / name), references.get(reference, originals / reference),
                name.split("_")[1], float(human),
            )  # fmt: skip


def koniq10k(folder: Path) -> Iterable[Row]:
    """KonIQ-10k: `koniq10k_scores_and_distributions.csv` and `1024x768/` (or `512x384/`).

    https://database.mmsp-kn.de/koniq-10k-database.html
    """
    images = _existing(folder, "koniq10k", "1024x768", "512x384")
    scores = _existing(folder, "koniq10k", "koniq10k_scores_and_distributions.csv")
    for image, human in _csv(scores, "image_name", "MOS"):
        yield images / image, None, "authentic", float(human)


def pipal(folder: Path) -> Iterable[Row]:
    """PIPAL, its training part: `Train_Label/*.txt`, `Train_Ref/`, and `Distortion_1/` to `Distortion_4/` anywhere.

    https://www.jasongt.com/projectpages/pipal.html
    """
    labels, originals = (_existing(folder, "pipal", f"Train_{kind}") for kind in ("Label", "Ref"))
    images = {file.name: file for file in folder.rglob("*.bmp") if file.parent.name != "Train_Ref"}
    for file in sorted(labels.rglob("*.txt")):
        for line in file.read_text().splitlines():
            if line.strip():
                name, human = line.strip().split(",")
                reference, distortion, _ = name.split("_")
                image = images.get(name, folder / "Distortion_1" / name)
                yield image, originals / f"{reference}.bmp", distortion, float(human)


def spaq(folder: Path) -> Iterable[Row]:
    """SPAQ: `TestImage/` and `Annotations/MOS and Image attribute scores.xlsx`.

    https://github.com/h4nwei/SPAQ
    """
    images = _existing(folder, "spaq", "TestImage", "Dataset/TestImage")
    sheet = "MOS and Image attribute scores.xlsx"
    file = _existing(folder, "spaq", f"Annotations/{sheet}", f"annotations/{sheet}", sheet)
    header, *rows = _sheet(file)
    if not {"Image name", "MOS"} <= header.keys():
        raise ValueError(f"{file} expected the columns Image name and MOS, got {', '.join(header)}.")
    for row in rows:
        yield images / row[header["Image name"]], None, "authentic", float(row[header["MOS"]])


def live_challenge(folder: Path) -> Iterable[Row]:
    """LIVE in the Wild (LIVE Challenge): `Images/` and `Data/AllImages_release.mat`, `Data/AllMOS_release.mat`.

    The images with which its observers practised, in `Images/trainingImages/`, are left out.
    https://live.ece.utexas.edu/research/ChallengeDB/index.html
    """
    images = _existing(folder, "live_challenge", "Images")
    files = [_existing(folder, "live_challenge", f"Data/All{kind}_release.mat") for kind in ("Images", "MOS")]
    loadmat = require("scipy.io", extra="perceptual", purpose="the MATLAB files of LIVE Challenge").loadmat
    try:
        names, scores = (loadmat(str(file))[file.stem].ravel() for file in files)
        pairs = [(str(name.item()), float(human)) for name, human in zip(names, scores, strict=True)]
    except Exception as error:  # whatever the parser makes of a foreign file
        raise ValueError(f"{files[0]} and {files[1].name} are not those of LIVE Challenge: {error}.") from error
    for name, human in pairs:
        if not (images / "trainingImages" / name).is_file():
            yield images / name, None, "authentic", human


def _sheet(file: Path) -> list[dict[str, Any]]:
    """The rows of a spreadsheet as cells by their letters; the first row is turned round, from name to letter."""
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    try:
        with zipfile.ZipFile(file) as archive:
            texts: list[str] = []
            if "xl/sharedStrings.xml" in archive.namelist():
                for item in ElementTree.fromstring(archive.read("xl/sharedStrings.xml")):
                    texts.append("".join(part.text or "" for part in item.iter(f"{space}t")))
            sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
        rows: list[dict[str, Any]] = []
        for row in sheet.iter(f"{space}row"):
            cells: dict[str, str] = {}
            for cell in row.iter(f"{space}c"):
                value = "".join(part.text or "" for part in cell.iter() if part.tag in (f"{space}v", f"{space}t"))
                letters = "".join(filter(str.isalpha, cell.get("r", "")))
                cells[letters] = texts[int(value)] if cell.get("t") == "s" else value
            if cells:
                rows.append(cells)
        header = {name: letters for letters, name in rows[0].items()}
    except Exception as error:  # whatever the parsers make of a foreign file
        raise ValueError(f"{file} cannot be read as a spreadsheet: {error}.") from error
    return [header, *rows[1:]]


DATASETS: dict[str, Callable[[Path], Iterable[Row]]] = {
    "kadid10k": kadid10k,
    "tid2013": tid2013,
    "koniq10k": koniq10k,
    "pipal": pipal,
    "spaq": spaq,
    "live_challenge": live_challenge,
}
"""Name of a data set -> what reads its folder: images, references, distortions and human scores."""
