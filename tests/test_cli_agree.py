"""`iqareward agree` as a person uses it: tables with scores, images that rewards score, directions, gaps and files."""

import csv
import io
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from iqareward import load, to_images
from iqareward.agreement import pair_accuracy, spearman
from iqareward.cli import app
from tests.test_rated import lay_out

HTML = "{http://www.w3.org/2000/svg}"


def run(*arguments: object, code: int = 0) -> str:
    """What the command prints, which must end with `code`; the message if that is 2."""
    result = CliRunner(env={"COLUMNS": "160"}).invoke(app, ["agree", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output if code != 2 else " ".join(result.stderr.split())


def figures(*arguments: object, folder: Path, code: int = 0) -> dict:
    file = folder / "found.json"
    run(*arguments, "--output", file, code=code)
    return json.loads(file.read_text())


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Four inputs with three outputs each; one score is missing."""
    rng = np.random.default_rng(0)
    lines = ["scene,method,mos,lpips,mine"]
    for row in range(12):
        human = float(rng.normal())
        mine = "" if row == 7 else f"{human + 0.5 * rng.normal():.4f}"
        lines.append(f"s{row // 3},m{row % 3},{human:.4f},{0.5 - 0.1 * human:.4f},{mine}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "table.csv"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two references, each with three levels of noise, in a table with human scores."""
    rng, lines = np.random.default_rng(1), ["image\treference\tmos\tscene"]
    for scene in range(2):
        clean = np.kron(rng.integers(60, 195, (4, 4, 3)), np.ones((8, 8, 1)))
        Image.fromarray(clean.astype(np.uint8)).save(tmp_path / f"clean{scene}.png")
        for level in range(1, 4):
            noisy = np.clip(clean + 9 * level * rng.normal(size=clean.shape), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(tmp_path / f"noisy{scene}_{level}.png")
            lines.append(f"noisy{scene}_{level}.png\tclean{scene}.png\t{5 - level + 0.1 * scene}\t{scene}")
    (tmp_path / "rated.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "rated.tsv"


def test_columns_of_a_table(table: Path, tmp_path: Path) -> None:
    """Figures are those of the library, a distance is turned round by its name, and a missing score is counted."""
    options = [table, "--human", "mos", "--group", "scene", "--score", "lpips", "--score", "mine"]
    options += ["--higher-is-better", "mine", "--by", "method"]
    found = figures(*options, folder=tmp_path, code=1)
    rows = list(csv.DictReader(io.StringIO(table.read_text())))
    human = [float(row["mos"]) for row in rows]
    scores = [float(row["mine"] or "nan") for row in rows]
    metrics = {metric["name"]: metric for metric in found["metrics"]}
    assert metrics["lpips"]["spearman"]["value"] == pytest.approx(1.0, abs=1e-9)
    assert found["baseline"] == "lpips"
    known = [row for row in range(12) if row != 7]
    expected = spearman([scores[row] for row in known], [human[row] for row in known])
    assert metrics["mine"]["spearman"]["value"] == pytest.approx(expected, abs=1e-9)
    pairs = pair_accuracy(scores, human, [row["scene"] for row in rows])
    assert metrics["mine"]["pair_accuracy"]["value"] == pytest.approx(pairs.accuracy, abs=1e-9)
    assert (metrics["mine"]["scored"], metrics["mine"]["pairs"]["unscored"]) == (11, 2)
    assert found["directions"]["lpips"] == "lower is better, by its name"
    assert found["within"].keys() == {"m0", "m1", "m2"}
    assert "mean of method" in metrics
    assert "mine: 1 images without a score are left out, and 2 pairs" in run(*options, code=1)


def test_direction_is_never_guessed(table: Path) -> None:
    """An unknown name, and a distance with negative scores, need an option; an option for nothing is refused."""
    options = [table, "--human", "mos", "--group", "scene"]
    assert "Pass --lower-is-better mine or --higher-is-better mine" in run(*options, "--score", "mine", code=2)
    table.write_text(table.read_text().replace("lpips", "niqe").replace(",0.", ",-0."))
    assert "there are negative scores, as rewards have them" in run(*options, "--score", "niqe", code=2)
    run(*options, "--score", "niqe", "--higher-is-better", "niqe")
    message = run(*options, "--score", "niqe", "--lower-is-better", "nique", code=2)
    assert "--lower-is-better nique: it is neither --human nor a --score column" in message


def test_human_scores_may_fall_with_quality(table: Path, tmp_path: Path) -> None:
    """A difference opinion score is turned round by the same option."""
    options = [table, "--human", "mos", "--group", "scene", "--score", "lpips", "--lower-is-better", "mos"]
    found = figures(*options, folder=tmp_path)
    assert found["metrics"][0]["spearman"]["value"] == pytest.approx(-1.0, abs=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "pass --human COLUMN; .* has the columns scene, method, mos, lpips, mine"),
        (["--human", "mos"], "pass --score COLUMN .* or --reward NAME"),
        (["--human", "moss", "--score", "lpips"], "--human 'moss': .* has the columns"),
        (["--human", "mos", "--group", "x", "--score", "lpips"], "--group 'x'"),
        (["--human", "scene", "--score", "lpips"], "row 1 of .* is 's0', not a number"),
        (["--human", "mos", "--score", "lpips", "--baseline", "b"], "baseline 'b' is not among the metrics lpips"),
        (["--human", "mos", "--reward", "ssim"], "--image 'image'"),
        (["--human", "mos", "--score", "lpips", "--output", "a.png"], "the suffix .json, .csv, .html or .svg"),
    ],
)
def test_mistakes(options: list[str], message: str, table: Path) -> None:
    """Each is answered by what to do."""
    assert re.search(message, run(table, *options, code=2))


def test_rewards_score_the_images(pictures: Path, tmp_path: Path) -> None:
    """References come from their column; scores are those of the reward, kept in a file and not computed again."""
    kept = tmp_path / "kept.csv"
    options = [pictures, "--human", "mos", "--group", "scene", "--reward", "psnr", "--reward", "ssim", "--scores", kept]
    found = figures(*options, folder=tmp_path)
    assert [metric["pair_accuracy"]["value"] for metric in found["metrics"]] == [1.0, 1.0]
    with kept.open() as file:
        rows = {Path(row["path"]).name: row for row in csv.DictReader(file)}
    image, reference = (to_images(tmp_path / name, value_range=(0, 1)) for name in ("noisy0_1.png", "clean0.png"))
    expected = load("psnr")(image, references=reference).item()
    assert float(rows["noisy0_1.png"]["psnr"]) == pytest.approx(expected, abs=1e-4)
    assert Path(rows["noisy0_1.png"]["reference"]).name == "clean0.png"
    before = kept.read_bytes()
    assert "6 of 6 images are scored already" in run(*options)
    assert kept.read_bytes() == before
    (tmp_path / "noisy1_3.png").write_bytes((tmp_path / "noisy1_1.png").read_bytes())
    assert "5 of 6 images are scored already; 1 have changed" in run(*options)


def test_missing_images_are_named(pictures: Path, tmp_path: Path) -> None:
    """An image or reference that is not there is named, counted, and makes the exit code 1; none at all is an error."""
    (tmp_path / "noisy0_2.png").unlink()
    options = [pictures, "--human", "mos", "--group", "scene", "--reward", "psnr"]
    text = run(*options, code=1)
    assert "noisy0_2.png: not read:" in text
    assert "psnr: 1 images without a score are left out, and 2 pairs" in text
    (tmp_path / "clean1.png").unlink()
    assert "no reference" in run(*options, code=1)
    assert "none of the 6 images is there" in run(*options, "--folder", tmp_path / "nowhere", code=2)


def test_folder_of_references_and_of_images(pictures: Path, tmp_path: Path) -> None:
    """Without a column, references are a folder with the same names or one file; images may start elsewhere."""
    (tmp_path / "elsewhere").mkdir()
    moved = tmp_path / "elsewhere" / "rated.csv"
    moved.write_text(pictures.read_text().replace("\t", ",").replace("reference", "other"))
    options = [moved, "--human", "mos", "--group", "scene", "--reward", "psnr", "--folder", tmp_path]
    assert "pass --reference" in run(*options, code=2)
    one = figures(*options, "--reference", tmp_path / "clean0.png", folder=tmp_path)
    same = figures(*options, "--reference", tmp_path, folder=tmp_path)  # each image is its own reference
    column = figures(*options, "--reference", "other", folder=tmp_path)
    values = [found["metrics"][0]["spearman"]["value"] for found in (one, same, column)]
    assert values[2] > 0.9
    assert values[1] is None  # 100 dB for all
    assert values[0] != values[2]


@pytest.mark.parametrize("name", ["kadid10k", "koniq10k"])
def test_data_set(name: str, tmp_path: Path) -> None:
    """A folder of a data set needs no columns; what has no pairs says so."""
    text = run(f"{name}:{lay_out(name, tmp_path)}", "--reward", "piqe", "--by", "distortion")
    assert ("there are no pairs" in text) == (name == "koniq10k")
    assert "2 inputs are too few for intervals" in text


def test_limit_keeps_whole_inputs(tmp_path: Path) -> None:
    """Every n-th input with all of its images."""
    found = figures("qualisr", "--limit", 10, folder=tmp_path)
    assert (found["groups"], found["images"]) == (10, 30)


def test_files(tmp_path: Path) -> None:
    """JSON, CSV, a page that loads nothing and a picture that follows the colour scheme hold the same figures."""
    files = [tmp_path / f"found{suffix}" for suffix in (".json", ".csv", ".html", ".svg")]
    run("qualisr", "--by", "method", *(part for file in files for part in ("--output", file)))
    document = json.loads(files[0].read_text())
    best = document["metrics"][0]
    assert best["name"] == document["baseline"] == "qalign"
    rows = list(csv.DictReader(io.StringIO(files[1].read_text())))
    (row,) = [r for r in rows if (r["within"], r["metric"], r["measure"]) == ("", "qalign", "spearman")]
    assert [float(row[key]) for key in ("value", "low", "high")] == list(best["spearman"].values())
    assert {r["within"] for r in rows} == {"", "pasd", "realesrgan", "supir"}
    page = files[2].read_text()
    assert "0.79 [0.70, 0.85]" in page
    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="http', page)
    picture = files[3].read_text()
    drawn = ElementTree.fromstring(picture)
    assert "prefers-color-scheme: dark" in picture
    assert len(drawn.findall(f".//{HTML}circle")) == 3 * len(document["metrics"])
    texts = [text.text for text in drawn.iter(f"{HTML}text")]
    assert {metric["name"] for metric in document["metrics"]} <= set(texts)


def test_names_from_a_table_are_escaped(tmp_path: Path) -> None:
    """Markup in the name of a column is text on the page, in the picture and on the terminal."""
    name = "<b>[red]"
    rows = [f"{row % 3},{row},{row * row}" for row in range(6)]
    (tmp_path / "table.csv").write_text("\n".join([f"scene,mos,{name}", *rows]) + "\n")
    options = ["--human", "mos", "--score", name, "--higher-is-better", name, "--group", "scene"]
    files = [part for suffix in ("html", "svg") for part in ("--output", tmp_path / f"found.{suffix}")]
    assert name in run(tmp_path / "table.csv", *options, *files)
    for suffix in ("html", "svg"):
        text = (tmp_path / f"found.{suffix}").read_text()
        assert "<b>[" not in text
        assert "&lt;b&gt;[red]" in text
