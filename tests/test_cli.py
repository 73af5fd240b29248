"""The command line as a person uses it: lists, scores with interruptions and broken files, checks."""

import csv
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import iqareward
from iqareward.cli import app
from iqareward.cli.results import locked
from iqareward.rewards.catalog import CATALOG


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four readable images in two folders, one broken file, one text file."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(["a.png", "b.jpg", "deep/c.webp", "deep/d.png"]):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        smooth = np.kron(rng.integers(0, 256, (6 + index, 5, 3)), np.ones((8, 8, 1)))
        Image.fromarray(np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)).save(path)
    (tmp_path / "photos" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not an image")
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path / "photos"


def run(*arguments: object, code: int = 0) -> str:
    """Standard output of the command, which must end with `code`; messages go to standard error."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.stdout if code != 2 else result.stderr


def rows_of(text: str) -> dict[str, dict[str, str]]:
    return {Path(row["path"]).name: row for row in csv.DictReader(io.StringIO(text, newline=""))}


def rows_in(file: Path) -> dict[str, dict[str, Any]]:
    """Rows of a results file by the path of the picture, which must not repeat."""
    text = file.read_bytes().decode("utf-8", "surrogateescape")
    if file.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text, newline="")))
    else:
        rows = [(row := json.loads(line)) | row["scores"] for line in text.splitlines()]
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: row for row in rows}


def noise(path: Path, seed: int = 0, size: tuple[int, int] = (40, 48)) -> None:
    """Write a picture that piqe can score."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (-(-size[1] // 8), -(-size[0] // 8), 3))
    pixels = np.kron(coarse, np.ones((8, 8, 1)))[: size[1], : size[0]]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels + rng.normal(0, 6, pixels.shape), 0, 255).astype(np.uint8)).save(path)


def test_list_shows_the_whole_catalogue() -> None:
    """Every name is listed, as a table and as JSON with its facts."""
    table = run("list")
    rows = json.loads(run("list", "--json"))
    assert set(rows) == set(CATALOG)
    assert all(name in table for name in ("psnr", "piqe", "niqe"))
    assert rows["ssim"]["needs_references"] is True


def test_list_shows_the_options_of_a_reward() -> None:
    """One line each with the default, the kind of value and what it does; an unknown name is an error that helps."""
    lines = run("list", "SSIM").splitlines()
    assert [line.split()[0] for line in lines] == ["option", "batch_size=none", "color=luma", "differentiable=false"]
    options = json.loads(run("list", "lpips", "--json"))
    assert {"option": "net=alex", "values": "alex or vgg or squeeze"}.items() <= options[5].items()
    assert "did you mean niqe" in run("list", "nique", code=2)


def test_scores_equal_the_api(photos: Path) -> None:
    """A folder is searched recursively, and each score is what `load(...)` gives for that file."""
    rows = rows_of(run("score", photos, "--reward", "piqe", "--format", "csv", code=1))
    assert set(rows) == {"a.png", "b.jpg", "c.webp", "d.png", "broken.png"}
    expected = iqareward.load("piqe")(iqareward.to_images(photos / "deep/d.png")).item()
    assert float(rows["d.png"]["piqe"]) == expected
    assert rows["broken.png"]["piqe"] == ""


def test_broken_files_are_reported_and_the_rest_is_scored(photos: Path) -> None:
    """An unreadable file is named on standard error and costs exit code 1, not the run."""
    result = CliRunner().invoke(app, ["score", str(photos), "--reward", "piqe"])
    assert result.exit_code == 1
    assert "broken.png: not read" in result.stderr
    assert "4 of 5 images have every score" in result.stderr
    assert all(name in result.stdout for name in ("a.png", "c.webp"))


def test_globs_json_and_several_rewards(photos: Path, tmp_path: Path) -> None:
    """Globs work, JSON has one object a line, NaN becomes null, and rewards can be repeated and summed."""
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    total = "0.5*piqe[-100, 0] + 0.5*niqe[-12, 0]"
    rewards = ["--reward", "piqe", "--reward", total, "--format", "json"]
    rows = [
        json.loads(line)
        for line in run("score", photos / "deep/*.png", tmp_path / "tiny.png", *rewards, code=1).splitlines()
    ]
    assert [Path(row["path"]).name for row in rows] == ["d.png", "tiny.png"]
    assert list(rows[0]["scores"]) == ["piqe", total]
    assert rows[1]["scores"] == {"piqe": None, total: None}


def test_references(photos: Path, tmp_path: Path) -> None:
    """References are found by relative name with any suffix; without one a picture lacks those scores alone."""
    truth = tmp_path / "truth"
    (truth / "deep").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "deep/c.webp"):
        image = Image.open(photos / name).convert("RGB")
        image = image.resize((8, 8)) if name == "b.jpg" else image
        image.save((truth / name).with_suffix(".png"))
    job = ["score", photos, "--reward", "psnr", "--reward", "piqe", "--reference", truth, "--format", "csv"]
    rows = rows_of(run(*job, code=1))
    scored = {"a.png": "100.0", "b.jpg": "", "broken.png": "", "c.webp": "100.0", "d.png": ""}
    assert {name: row["psnr"] for name, row in rows.items()} == scored
    assert [name for name, row in rows.items() if not row["piqe"]] == ["broken.png"]
    assert rows["a.png"]["reference"] == str(truth / "a.png")
    assert "its reference 8x8" in rows["b.jpg"]["problem"]
    assert "no reference" in rows["d.png"]["problem"]


def test_rewards_with_prompts_are_refused_before_any_download(photos: Path) -> None:
    """Commands take no prompts, and say how such a reward is called."""
    error = run("score", photos, "--reward", "0.5*hpsv3 + 0.5*clipscore[0, 1]", code=2)
    assert "load(name)(images, prompts=" in " ".join(error.split())


def test_one_picture_against_one(tmp_path: Path) -> None:
    """A file as reference is that of every picture; it need not have the same name."""
    for seed, name in enumerate(("restored.png", "other.png", "truth.png")):
        noise(tmp_path / name, seed)
    job = ["score", tmp_path / "restored.png", "--reward", "psnr", "--format", "csv"]
    rows = rows_of(run(*job, "--reference", tmp_path / "truth.png"))
    images, references = (iqareward.to_images(tmp_path / name) for name in ("restored.png", "truth.png"))
    assert float(rows["restored.png"]["psnr"]) == iqareward.load("psnr")(images, references=references).item()
    message = run(*job, "--reference", tmp_path / "no-such-folder", code=2)
    assert message.count("\n") == 1


def test_tables_fit_the_terminal(tmp_path: Path) -> None:
    """The folder that all pictures share stands above the table, so that at 80 columns every name is in one line."""
    folder = tmp_path / "a_long_name_of_an_experiment" / "checkpoint-10000-restored-pictures"
    for index in range(3):
        noise(folder / "deep" / f"picture-{index}.png", index)
    noise(folder / "picture.png")
    table = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["score", str(folder), "--reward", "piqe", "--reward", "niqe"])
    lines = [line.split()[0] for line in table.stdout.splitlines() if ".png" in line]
    assert lines == [*(f"deep/picture-{index}.png" for index in range(3)), "picture.png"]


def test_missing_scores_say_why(tmp_path: Path) -> None:
    """Each score that is missing has its reason in the table's messages and in the file, and the exit code is 1."""
    noise(tmp_path / "good.png", size=(200, 200))
    noise(tmp_path / "tiny.png", size=(3, 3))
    noise(tmp_path / "small.png", size=(40, 40))
    job = ["score", tmp_path, "--reward", "piqe", "--reward", "niqe"]
    result = CliRunner().invoke(app, [str(word) for word in job])
    assert result.exit_code == 1
    assert "small.png: niqe: the image has a side shorter than 96 pixels" in result.stderr
    assert "tiny.png: piqe: the image has a side shorter than 16 pixels; niqe: the" in result.stderr
    assert "good.png:" not in result.stderr
    rows = rows_of(run(*job, "--format", "csv", code=1))
    assert rows["small.png"]["problem"] == "niqe: the image has a side shorter than 96 pixels"
    assert rows["good.png"]["problem"] == ""
    run("score", tmp_path / "tiny.png", "--reward", "piqe", code=1)  # nothing is scored at all
    run("score", tmp_path / "good.png", "--reward", "piqe")


def test_panoramas_are_scored_without_a_warning(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Pillow only warns of, an image between its limit and twice that, is scored; here warnings are errors."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    run("score", photos / "a.png", "--reward", "piqe")


def test_summary(photos: Path, tmp_path: Path) -> None:
    """Mean, standard deviation and count over all pictures: in the table, beside csv and json, and in a file."""
    job = ["score", photos, "--reward", "piqe", "--reward", "niqe"]
    rows = rows_of(run(*job, "--format", "csv", code=1))
    scores = [float(row["piqe"]) for row in rows.values() if row["piqe"]]
    mean, std = statistics.fmean(scores), statistics.stdev(scores)
    for format in ("table", "csv", "json"):
        result = CliRunner().invoke(app, [*map(str, job), "--format", format, "--summary", str(tmp_path / "s.json")])
        shown = result.stdout if format == "table" else result.stderr
        assert f"{mean:.4f}" in shown
        assert f"{std:.4f}" in shown
        assert "4 of 5" in shown
        found = {line["name"]: line for line in json.loads((tmp_path / "s.json").read_text())}
        assert found["piqe"] == {"name": "piqe", "mean": mean, "std": std, "scored": 4, "images": 5}
        assert found["niqe"] == {"name": "niqe", "mean": None, "std": None, "scored": 0, "images": 5}
    run(*job, "--summary", tmp_path / "s.csv", code=1)
    assert rows_in_summary(tmp_path / "s.csv")["piqe"] == [str(mean), str(std), "4", "5"]


def rows_in_summary(file: Path) -> dict[str, list[str]]:
    return {name: cells for name, *cells in csv.reader(file.read_text().splitlines())}


def test_published_numbers(tmp_path: Path) -> None:
    """`--published` adds what papers print where it is another number, such as niqe without the minus."""
    noise(tmp_path / "a.png", size=(200, 200))
    rewards = ["--reward", "niqe", "--reward", "psnr", "--reward", "0.5*psnr[0, 100] + 0.5*ssim"]
    job = ["score", tmp_path / "a.png", "--reference", tmp_path / "a.png", *rewards]
    (row,) = rows_of(run(*job, "--published", "--format", "csv")).values()
    assert list(row)[1:5] == ["niqe", "niqe published", "psnr", "0.5*psnr[0, 100] + 0.5*ssim"]
    assert float(row["niqe published"]) == -float(row["niqe"]) > 0
    (row,) = map(json.loads, run(*job, "--published", "--format", "json").splitlines())
    assert row["scores"]["niqe published"] == -row["scores"]["niqe"]
    assert "niqe published" not in run(*job, "--format", "csv")


FORMATS = ["scores.csv", "scores.jsonl", "scores.json"]


@pytest.mark.parametrize("name", FORMATS)
def test_an_interrupted_run_goes_on(photos: Path, tmp_path: Path, name: str) -> None:
    """Wherever a killed run stopped writing, the same command completes the file and doubles nothing."""
    output = tmp_path / "results" / name
    job = ["score", photos, "--reward", "piqe", "--output", output]
    run(*job, code=1)
    whole, expected = output.read_bytes(), rows_in(output)
    assert len(expected) == 5
    for length in (*range(0, 60, 4), *range(60, len(whole), 31), len(whole) - 1):
        output.write_bytes(whole[:length])
        if name == "scores.csv" and 0 < length < whole.index(b"\n"):
            run(*job, code=2)  # a header comes at once with the file, so this one is not ours
        else:
            run(*job, code=1)
            assert rows_in(output) == expected
    output.write_bytes(whole)
    run("score", photos / "a.png", "--reward", "piqe", "--output", output)
    assert rows_in(output) == expected


def test_a_killed_process_loses_nothing(photos: Path, tmp_path: Path) -> None:
    """Runs that are killed after any number of rows leave whole rows, and the last one completes the file."""
    pictures, output = tmp_path / "many", tmp_path / "scores.csv"
    for index in range(40):
        noise(pictures / f"{index}.png", index)
    job = ["score", str(pictures), "--reward", "piqe", "--batch-size", "1", "--output", str(output)]
    found: dict[str, dict[str, str]] = {}
    for rows in (1, 20):
        process = subprocess.Popen([sys.executable, "-m", "iqareward", *job], stderr=subprocess.DEVNULL)
        while process.poll() is None and (not output.exists() or output.read_text().count("\n") <= rows):
            time.sleep(0.002)
        process.kill()
        process.wait()
        killed = dict(csv_rows_before_the_last_newline(output))
        assert found.items() <= killed.items()
        found = killed
    run(*job)
    assert found.items() <= rows_in(output).items()
    assert len(rows_in(output)) == 40


def csv_rows_before_the_last_newline(file: Path) -> Iterator[tuple[str, dict[str, str]]]:
    text = file.read_text()
    for row in csv.DictReader(text[: text.rfind("\n") + 1].splitlines()):
        yield row["path"], row


@pytest.mark.parametrize("name", FORMATS)
def test_changed_pictures_are_scored_again(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row is kept only as long as picture, reference and version are those that it was scored with."""
    for index in range(3):
        noise(tmp_path / "restored" / f"{index}.png", index)
        noise(tmp_path / "truth" / f"{index}.png", index + 10)
    output = tmp_path / name
    job = ["score", tmp_path / "restored", "--reward", "psnr", "--reference", tmp_path / "truth", "--output", output]

    def changed() -> set[str]:
        """Pictures with another score than before."""
        before = rows_in(output) if output.exists() else {}
        run(*job)
        now = rows_in(output)
        return {Path(path).stem for path in now if now[path] != before.get(path)}

    assert changed() == {"0", "1", "2"}
    assert changed() == set()
    noise(tmp_path / "restored" / "1.png", 21)  # the next checkpoint's result, of another size in bytes or time
    assert changed() == {"1"}
    noise(tmp_path / "truth" / "2.png", 22)
    assert changed() == {"2"}
    (tmp_path / "truth" / "0.png").rename(tmp_path / "truth" / "0.PNG")
    assert changed() == {"0"}
    noise(tmp_path / "restored" / "3.png", 3)
    noise(tmp_path / "truth" / "3.png", 13)
    assert changed() == {"3"}
    monkeypatch.setattr(iqareward, "__version__", "99.0")
    assert changed() == {"0", "1", "2", "3"}
    images, references = (iqareward.to_images(tmp_path / folder / "1.png") for folder in ("restored", "truth"))
    score = iqareward.load("psnr")(images, references=references).item()
    assert float(rows_in(output)[str(tmp_path / "restored" / "1.png")]["psnr"]) == score


def test_a_file_that_lacked_scores_is_tried_again(photos: Path, tmp_path: Path) -> None:
    """A picture that could not be read has a row without scores, which the next run replaces if it can."""
    output = tmp_path / "scores.csv"
    job = ["score", photos / "broken.png", "--reward", "piqe", "--output", output]
    for _ in range(2):
        run(*job, code=1)
        assert [row["piqe"] for row in rows_in(output).values()] == [""]
    noise(photos / "broken.png")
    run(*job)
    assert [row["problem"] for row in rows_in(output).values()] == [""]


def test_a_file_of_other_results_is_refused(photos: Path, tmp_path: Path) -> None:
    """Other rewards, another folder of references, another format and foreign files are refused by name, unchanged."""
    output = tmp_path / "scores.csv"
    (photos / "broken.png").unlink()
    job = ["score", photos, "--output", output, "--reward"]
    run(*job, "psnr", "--reference", photos)
    whole = output.read_bytes()
    assert "holds scores of psnr, not of niqe" in run(*job, "niqe", code=2)
    shutil.copytree(photos, tmp_path / "truth")
    assert "is not in" in run(*job, "psnr", "--reference", tmp_path / "truth", code=2)
    assert "contradict" in run(*job, "psnr", "--reference", photos, "--format", "json", code=2)
    other = tmp_path / "scores.txt"
    assert "pass --format" in run("score", photos, "--reward", "piqe", "--output", other, code=2)
    shutil.copy(output, other)
    assert "was not written by this command" in run(
        "score", photos, "--reward", "piqe", "--output", other, "--format", "json", code=2
    )
    assert output.read_bytes() == other.read_bytes() == whole
    output.write_bytes(whole + b"\n\n")  # blank lines mean nothing
    run(*job, "psnr", "--reference", photos)
    assert output.read_bytes() == whole
    run(*job, "piqe", "--overwrite")
    assert list(next(iter(rows_in(output).values())))[:2] == ["path", "piqe"]
    assert "not a regular file" in run(
        "score", photos, "--reward", "piqe", "--output", os.devnull, "--format", "csv", code=2
    )


def test_two_runs_on_one_output(photos: Path, tmp_path: Path) -> None:
    """While a run writes to a file, another one is refused."""
    with locked(tmp_path / "scores.csv"):
        (tmp_path / "link.csv").symlink_to(tmp_path / "scores.csv")
        for name in ("scores.csv", "link.csv"):
            message = run("score", photos, "--reward", "piqe", "--output", tmp_path / name, code=2)
            assert "another run writes to" in message
    run("score", photos, "--reward", "piqe", "--output", tmp_path / "scores.csv", code=1)
    assert {file.name for file in tmp_path.iterdir()} == {"photos", "link.csv", "scores.csv"}  # no lock stays behind


ODD_NAMES = (
    "[sft].png", "y[bold].png", "a[/b].png", "=1+1.png", "+1.png", "@x.png", "-2.png", "\t=tab.png", " blank .png",
    "two\nlines.png", "car\rriage.png", "\r.png", ":warning:.png", "a;=1+1.png", 'quo"te,comma.png', "'=1.png",
    "ümlaut 日本.png", "\x1b[31mred.png", "\\[x].png", "line\u2028separator.png", os.fsdecode(b"latin\xe9.png"),
)  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow fewer names")
@pytest.mark.parametrize("name", FORMATS)
def test_names_are_data(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file name comes back as it is from a results file, and a run goes on beside it."""
    for index, odd in enumerate(ODD_NAMES):
        noise(tmp_path / "in" / odd, index)
    monkeypatch.chdir(tmp_path / "in")
    job = ["score", ".", "--reward", "piqe", "--output", tmp_path / name]
    run(*job)
    rows = rows_in(tmp_path / name)
    assert {str(Path(path)) for path in rows} == set(ODD_NAMES)
    assert not [path for path in rows if name == "scores.csv" and path.startswith(("=", "+", "-", "@", "\t", "\r"))]
    whole = (tmp_path / name).read_bytes()
    if name == "scores.csv":  # quoted is what other programs would split, and so begin a cell there
        assert not set(re.sub(rb'"[^"]*"', b"", whole)) & set(b";\t\r=")
    run(*job)
    assert (tmp_path / name).read_bytes() == whole
    os.truncate(tmp_path / name, len(whole) - 3)
    run(*job)
    assert rows_in(tmp_path / name) == rows


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow fewer names")
def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    """In tables and messages no part of a name is markup, a command to the terminal, or lost."""
    shown = [
        "[sft].png",
        "y[bold].png",
        "a[/b].png",
        ":warning:.png",
        r"two\nlines.png",
        r"latin\udce9.png",
        r"\x1b[31mred.png",
    ]
    for index, odd in enumerate(ODD_NAMES):
        noise(tmp_path / "in" / odd, index)
        (tmp_path / "broken" / odd).parent.mkdir(exist_ok=True)
        (tmp_path / "broken" / odd).write_bytes(b"no picture")
    wide = {"COLUMNS": "400"}
    table = CliRunner(env=wide).invoke(app, ["score", str(tmp_path / "in"), "--reward", "piqe"])
    assert table.exit_code == 0
    messages = CliRunner(env=wide).invoke(
        app, ["score", str(tmp_path / "broken"), "--reward", "piqe", "--format", "csv"]
    )
    for text in (table.stdout, messages.stderr):
        assert [name for name in shown if name not in text] == []
        assert "\x1b" not in text


SEVERAL_COMMANDS = """
import sys
from iqareward.cli import app
for command in sys.argv[1].split("|"):
    try:
        app(command.split())
    except SystemExit as end:
        if end.code:
            raise
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems allow fewer names")
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_any_locale(tmp_path: Path, encoding: str) -> None:
    """Whatever the locale can encode, tables are printed, and files and pipes are UTF-8 with the bytes of the names."""
    for index, odd in enumerate(ODD_NAMES):
        noise(tmp_path / "in" / odd, index)
    job = f"score {tmp_path}/in --reward piqe"
    commands = f"{job}|{job} --output {tmp_path}/scores.csv|list|--help|{job} --format csv"
    plain = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONIOENCODING": encoding,
        "COLUMNS": "400",
    }
    found = subprocess.run(
        [sys.executable, "-c", SEVERAL_COMMANDS, commands], env=os.environ | plain, capture_output=True, timeout=300
    )
    assert (found.returncode, b"Traceback" in found.stderr) == (0, False)
    assert rb"latin\udce9.png" in found.stdout
    assert os.fsencode(ODD_NAMES[-1]) in (tmp_path / "scores.csv").read_bytes()
    assert found.stdout.endswith((tmp_path / "scores.csv").read_bytes())


@pytest.mark.parametrize("command", ["score {} --reward piqe --format csv --batch-size 1", "list"])
def test_a_reader_that_has_seen_enough(tmp_path: Path, command: str) -> None:
    """`| head`: the command ends without a word about the pipe."""
    for index in range(20):
        noise(tmp_path / f"{index}.png", index)
    arguments = [sys.executable, "-u", "-m", "iqareward", *command.format(tmp_path).split()]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""


def test_version() -> None:
    """`--version` says the version, also of `python -m iqareward`."""
    assert run("--version") == f"iqareward {iqareward.__version__}\n"
    module = subprocess.run(
        [sys.executable, "-m", "iqareward", "--version"], capture_output=True, text=True, timeout=300
    )
    assert module.stdout == f"iqareward {iqareward.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}", "--reward", "nique"], "niqe"),
        (["{photos}", "--reward", "ssim"], "pass --reference"),
        (["{photos}", "--reward", "ssim", "--reference", "{photos}/deep"], "none of 5 images has a reference in"),
        (["{photos}", "--reward", "piqe", "--reward", "piqe"], "given twice"),
        (["no/such/folder", "--reward", "piqe"], "no/such/folder: there is no such file or folder."),
        (["{photos}/notes.txt/*", "--reward", "piqe"], "matches no images"),
        (["{photos}", "--reward", "piqe", "--format", "table", "--output", "x.csv"], "a table is for reading"),
        (
            ["{photos}", "--reward", "piqe", "--output", "{photos}/notes.txt", "--format", "csv"],
            "was not written by this command",
        ),
        (["{photos}", "--reward", "piqe", "--summary", "x.txt"], "give it the suffix"),
        (["{photos}", "--reward", "piqe", "--summary", "x.csv", "--output", "./x.csv"], "two kinds of results"),
        (["{photos}", "--reward", "piqe", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["{photos}", "--reward", "piqe", "--device", "nonsense"], "--device nonsense cannot be used"),
    ],
)
def test_mistakes_in_the_command(photos: Path, arguments: list[str], message: str) -> None:
    """A mistake is one line that says what to do, with exit code 2 and no traceback; nothing is written."""
    filled = [argument.format(photos=photos) for argument in arguments]
    text = run("score", *filled, code=2)
    assert message in text
    assert text.count("\n") == 1
    assert (photos / "notes.txt").read_text() == "no image"


@pytest.mark.parametrize(
    "arguments",
    [
        ["score", "", "--reward", "piqe"],
        ["score", ".", "--reward", "piqe", "--reference="],
        ["compare", ".", "", "--reward", "piqe"],
        ["check", "psnr", "--images", ""],
    ],
)
def test_an_empty_argument_is_refused(photos: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    """An unset shell variable is no name of the current folder, in any command."""
    monkeypatch.chdir(photos / "deep")
    assert "An argument is empty" in run(*arguments, code=2)


def test_a_table_in_a_pipe_is_not_folded(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many columns there are, names and numbers stay in one line each."""
    monkeypatch.delenv("COLUMNS", raising=False)
    sums = [f"{factor}*piqe[-100, 0]" for factor in (0.25, 0.5, 0.75, 1.5)]
    text = run("score", str(photos / "deep"), *(word for spec in sums for word in ("--reward", spec)))
    assert any(all(spec in line for spec in sums) for line in text.splitlines())


def test_weights_that_cannot_be_fetched_are_one_line(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward without its weights is an error that names them, without an empty table before it."""

    def unreachable(*arguments: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    text = run("score", str(photos), "--reward", "qalign", code=2)
    assert "hf download q-future/one-align" in text
    assert text.count("\n") == 1


REWARD_MODULE = """
from iqareward import NoReference

def contrast(images):
    return images.var(dim=(1, 2, 3))

good = NoReference(contrast, higher_is_better=True)
wrong = NoReference(contrast, higher_is_better=False)

class Plain:
    def __new__(cls):
        return good
"""


def test_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's reward is found by module:object or class; a broken one costs exit code 1 and says why."""
    (tmp_path / "their_rewards.py").write_text(REWARD_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "0 failed" in run("check", "their_rewards:good", "--size", 64)
    assert "0 failed" in run("check", "their_rewards:Plain", "--size", 64)
    assert "0 failed" in run("check", "psnr", "--size", 32)
    assert "is the sign right" in run("check", "their_rewards:wrong", "--size", 64, code=1)
    assert "no 'bad'" in run("check", "their_rewards:bad", code=2)
    assert "shorter than 96 pixels" in run("check", "niqe", "--size", 64, code=2).replace("\n", " ")
    assert "no_such_module" in run("check", "no_such_module:reward", code=2)


ODD_MODULE = """
import sys

import torch

def contrast(images):
    return images.var(dim=(1, 2, 3))

class NeedsArguments:
    def __init__(self, path):
        pass

class Ends:
    def __init__(self):
        sys.exit(0)

class Plain:
    name, needs_references, needs_prompts, differentiable, bounds = "plain", False, False, False, (None, None)

    def __call__(self, images, references=None, prompts=None, **ignored):
        sys.exit(0)

bare, nothing, anonymous = object(), None, lambda images: contrast(images)
"""


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("odd:contrast", "NoReference(contrast"),
        ("odd:NeedsArguments", "missing 1 required positional argument: 'path'. If it needs arguments, write reward ="),
        ("odd:Ends", "it raised SystemExit: 0"),
        ("odd:Plain", "it raised SystemExit: 0"),
        ("odd:bare", "it is of type object and lacks name"),
        ("odd:nothing", "it is None and lacks name"),
        ("odd:anonymous", "the function <lambda> and has none of name"),
        ("odd:torch", "the module torch and lacks name"),
        ("fails:reward", "it raised RuntimeError: no [weights]"),
        ("lacks:reward", "it raised ModuleNotFoundError: No module named 'a_package_that_is_not_there'"),
        ("ends:reward", "it raised SystemExit: 0"),
        ("typo:reward", "it raised SyntaxError: "),
    ],
)
def test_check_reports_whatever_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, complaint: str
) -> None:
    """What is not a reward, or ends the program, is a failure in one line with exit code 1, never a traceback."""
    modules = {
        "odd": ODD_MODULE,
        "fails": "raise RuntimeError('no [weights]')",
        "lacks": "import a_package_that_is_not_there",
        "ends": "import sys; sys.exit(0)",
        "typo": "def reward(:",
    }
    for module, code in modules.items():
        (tmp_path / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    line = next(line for line in run("check", name, "--size", 64, code=1).splitlines() if "FAIL" in line)
    assert complaint in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["odd:"], "expected module:object"),
        ([":reward"], "expected module:object"),
        (["psnr", "--degraded", "{photos}"], "--degraded goes with --images"),
        (["psnr", "--images", "{photos}", "--degraded", "{photos}", "--no-direction"], "--degraded goes with --images"),
        (["psnr", "--images", "{photos}/deep"], "has 2 images; the check needs 3"),
        (["psnr", "--images", "{photos}", "--degraded", "{photos}/deep", "--size", "32"], "deep has no version of"),
        (["psnr", "--images", "{photos}", "--degraded", "{other}", "--size", "32"], "a.png is 50x50"),
    ],
)
def test_mistakes_in_the_check(photos: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    """Options and folders that do not fit together are named, with exit code 2."""
    (photos / "broken.png").unlink()
    (tmp_path / "other").mkdir()
    Image.new("RGB", (50, 50)).save(tmp_path / "other" / "a.png")
    filled = [argument.format(photos=photos, other=tmp_path / "other") for argument in arguments]
    assert message in run("check", *filled, code=2)


def test_the_page_on_own_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of the page pass for its own code; colourfulness fails for noise, which it takes for colour."""
    page = (Path(iqareward.__file__).parents[1] / "docs/how-to/own-reward.md").read_text()
    code = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "my_rewards.py").write_text("\n".join(code))
    rng = np.random.default_rng(0)
    for index in range(4):
        colors = np.kron(rng.integers(112, 144, (8, 8, 3)), np.ones((32, 32, 1))).astype(np.uint8)
        for folder, picture in {
            "photos": Image.fromarray(colors),
            "gray": Image.fromarray(colors).convert("L"),
        }.items():
            (tmp_path / folder).mkdir(exist_ok=True)
            picture.save(tmp_path / folder / f"{index}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    commands = re.findall(r"^iqareward (check .*)$", page, re.M)
    assert len(commands) == 2
    for command in commands:
        assert "0 failed" in run(*command.split())
    assert "is the sign right" in run(*commands[0].replace("--degraded gray/", "").split(), code=1)


def test_check_on_photographs(photos: Path) -> None:
    """The check runs on a folder of one's own, and says when its images are too small."""
    (photos / "broken.png").unlink()
    assert "0 failed" in run("check", "psnr", "--images", photos, "--size", 32)
    assert "smaller than --size 64" in run("check", "psnr", "--images", photos, "--size", 64, code=2)


def test_scores_of_a_batch_do_not_depend_on_its_size(photos: Path) -> None:
    """The batch size is a matter of memory only."""
    job = ["score", photos / "deep", "--reward", "piqe", "--format", "csv"]
    assert run(*job, "--batch-size", 1) == run(*job, "--batch-size", 8)
