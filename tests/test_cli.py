"""The command line as a person uses it: lists, scores with interruptions and broken files, checks."""

import csv
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import iqareward
from iqareward.cli import app
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
    return {Path(row["path"]).name: row for row in csv.DictReader(text.splitlines())}


def test_list_shows_the_whole_catalogue() -> None:
    """Every name is listed, as a table and as JSON with its facts."""
    table = run("list")
    rows = json.loads(run("list", "--json"))
    assert set(rows) == set(CATALOG)
    assert all(name in table for name in ("psnr", "piqe", "niqe"))
    assert rows["ssim"]["needs_references"] is True


def test_scores_equal_the_api(photos: Path) -> None:
    """A folder is searched recursively, and each score is what `load(...)` gives for that file."""
    rows = rows_of(run("score", photos, "--reward", "piqe", "--format", "csv", code=1))
    assert set(rows) == {"a.png", "b.jpg", "c.webp", "d.png"}
    expected = iqareward.load("piqe")(iqareward.to_images(photos / "deep/d.png")).item()
    assert float(rows["d.png"]["piqe"]) == expected


def test_broken_files_are_reported_and_the_rest_is_scored(photos: Path) -> None:
    """An unreadable file is named on standard error and costs exit code 1, not the run."""
    result = CliRunner().invoke(app, ["score", str(photos), "--reward", "piqe"])
    assert result.exit_code == 1
    assert "broken.png" in result.stderr
    assert "1 of 5 files" in result.stderr
    assert all(name in result.stdout for name in ("a.png", "c.webp"))


@pytest.mark.filterwarnings("ignore::iqareward.rewards.scoring.UnscoredWarning")
def test_globs_json_and_several_rewards(photos: Path, tmp_path: Path) -> None:
    """Globs work, JSON has one object a line, NaN becomes null, and rewards can be repeated and summed."""
    Image.new("RGB", (4, 4)).save(tmp_path / "tiny.png")
    rewards = ["--reward", "piqe", "--reward", "0.5*piqe[-100, 0] + 0.5*niqe[-12, 0]"]
    lines = run("score", photos / "deep/*.png", tmp_path / "tiny.png", *rewards, "--format", "json").splitlines()
    rows = [json.loads(line) for line in lines]
    assert [Path(row["path"]).name for row in rows] == ["d.png", "tiny.png"]
    assert list(rows[0]["scores"]) == ["piqe", "0.5*piqe[-100, 0] + 0.5*niqe[-12, 0]"]
    assert rows[1]["scores"]["piqe"] is None


def test_references(photos: Path, tmp_path: Path) -> None:
    """References are found by relative name with any suffix; missing ones and other sizes are reported."""
    truth = tmp_path / "truth"
    (truth / "deep").mkdir(parents=True)
    for name in ("a.png", "b.jpg", "deep/c.webp"):
        image = Image.open(photos / name).convert("RGB")
        image = image.resize((8, 8)) if name == "b.jpg" else image
        image.save((truth / name).with_suffix(".png"))
    result = CliRunner().invoke(
        app, ["score", str(photos), "--reward", "psnr", "--reference", str(truth), "--format", "csv"]
    )
    rows = rows_of(result.stdout)
    assert result.exit_code == 1
    assert {name: row["psnr"] for name, row in rows.items()} == {"a.png": "100.0", "c.webp": "100.0"}
    assert "its reference 8x8" in result.stderr.replace("\n", "")
    assert "no reference" in result.stderr


@pytest.mark.parametrize("format", ["csv", "json"])
def test_an_interrupted_run_goes_on(photos: Path, tmp_path: Path, format: str) -> None:
    """With --output, the same command scores only what is missing, and a half-written line is repaired."""
    output = tmp_path / "results" / f"scores.{format}"
    job = ["score", photos, "--reward", "piqe", "--output", output, "--format", format]
    run(*job, code=1)
    whole = output.read_text()
    output.write_text(whole[: whole.rindex("\n") - 4])
    run(*job, code=1)
    assert output.read_text() == whole
    run("score", photos / "a.png", "--reward", "piqe", "--output", output, "--format", format)
    assert output.read_text() == whole
    message = run("score", photos, "--reward", "niqe", "--output", output, "--format", format, code=2)
    assert "holds scores of ['piqe']" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{photos}", "--reward", "nique"], "did you mean niqe"),
        (["{photos}", "--reward", "ssim"], "pass --reference"),
        (["no/such/folder", "--reward", "piqe"], "brings no image"),
        (["{photos}", "--reward", "piqe", "--format", "table", "--output", "x.csv"], "a table is for reading"),
        (["{photos}", "--reward", "piqe", "--output", "{photos}/notes.txt"], "no results file"),
    ],
)
def test_mistakes_in_the_command(photos: Path, arguments: list[str], message: str) -> None:
    """A mistake is one line that says what to do, with exit code 2 and no traceback; nothing is written."""
    filled = [argument.format(photos=photos) for argument in arguments]
    text = run("score", *filled, code=2)
    assert message in text.replace("\n", " ")
    assert "Traceback" not in text
    assert (photos / "notes.txt").read_text() == "no image"


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
    """What is no reward, or ends the program, is a failure in one line with exit code 1, never a traceback."""
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
        (["psnr", "--images", "{photos}/deep"], "brings 2 images; the check needs 3"),
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
