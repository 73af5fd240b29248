"""`iqareward monitor`: a folder of samples per step is compared with its first step, and alarms are found and shown."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import iqareward
from iqareward.cli import app
from iqareward.functional.statistics import STATISTICS

STEPS = (0, 50, 100, 150, 200)
NAMES = [f"deep/{index}.png" if index % 2 else f"{index}.png" for index in range(8)]


def scenes() -> torch.Tensor:
    """Eight smooth images."""
    coarse = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return 0.2 + 0.6 * torch.nn.functional.interpolate(coarse, size=64, mode="bicubic").clamp(0, 1)


def restored(step: int) -> torch.Tensor:
    """Brighter from step to step, which the trained reward likes, and from step 100 on with a checkerboard."""
    cells = torch.arange(64) // 4
    board = ((cells[:, None] + cells) % 2) - 0.5
    return scenes() * 0.9 + step / 4000 + (0.04 * board if step >= 100 else 0.0)


def save(folder: Path, images: torch.Tensor) -> None:
    for name, image in zip(NAMES, images, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = (image.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy()
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    """A folder per step, whose order by name is not that by number, beside one that is no step."""
    for step in STEPS:
        save(tmp_path / "samples" / f"checkpoint-2_step{step}", restored(step))
    save(tmp_path / "samples" / "truth", scenes())
    return tmp_path / "samples"


def run(folder: Path, *options: object, code: int) -> tuple[str, str]:
    """Standard output and messages of the command, which must end with `code`."""
    found = CliRunner().invoke(app, ["monitor", str(folder), *map(str, options)])
    assert found.exit_code == code, found.output
    return found.stdout, found.stderr


def test_alarms_and_the_steps_where_they_began(samples: Path) -> None:
    """Means are those of the library on the same files; the checkerboard is found at the step that has it first."""
    options = ("--held-out", "psnr", "--held-out", "ssim", "--reference", samples / "truth", "--format", "json")
    text, messages = run(samples, "--reward", "gmsd", *options, code=0)
    assert json.loads(text)["alarms"] == []  # that reward fell
    page = samples.parent / "page.html"
    text, messages = run(samples, "--reward", "gmsd", *options[:-2], "--output", page, code=0)
    for told in (" ".join(text.split()), page.read_text().replace("No", "no")):
        assert "no alarm; changes count only at steps where the trained reward has risen" in told
    text, messages = run(samples, *options, code=3)
    found = json.loads(text)
    assert "ignored: truth" in messages
    assert [each["step"] for each in found["steps"]] == list(STEPS)
    assert found["images"] == 8
    truth = iqareward.to_images([samples / "truth" / name for name in NAMES])
    for step, each in zip(STEPS, found["steps"], strict=True):
        images = iqareward.to_images([samples / f"checkpoint-2_step{step}" / name for name in NAMES])
        for name in ("psnr", "ssim"):
            expected = iqareward.load(name)(images, references=truth).mean().item()
            assert each["means"][name] == pytest.approx(expected, rel=1e-4)
        for name, statistic in STATISTICS.items():
            assert each["means"][name] == pytest.approx(statistic(images).mean().item(), rel=1e-4, abs=1e-6)
            assert found["ground_truth"][name] == pytest.approx(statistic(truth).mean().item(), rel=1e-4, abs=1e-6)
    since = {alarm["measure"]: alarm["since"] for alarm in found["alarms"]}
    assert since["periodic_grid"] == 100
    assert since["ssim"] == 100
    assert found["steps"][2]["alarms"] == []  # one step is not enough
    assert "periodic_grid" in found["steps"][3]["alarms"]
    assert "psnr" not in since or since["psnr"] > 0


def test_without_alarm_the_exit_code_is_0(samples: Path) -> None:
    """The same samples at every step; with one left out it is 1, and the file is named."""
    for step in STEPS[1:]:
        save(samples / f"checkpoint-2_step{step}", restored(0))
    text, _ = run(samples, "--held-out", "piqe", code=0)
    assert text.endswith("no alarm\n")
    broken = samples / "checkpoint-2_step100" / NAMES[3]
    broken.write_bytes(b"no image")
    (samples / "checkpoint-2_step50" / NAMES[5]).unlink()
    text, messages = run(samples, "--held-out", "piqe", "--format", "json", code=1)
    found = json.loads(text)
    assert found["images"] == 7
    assert any(str(broken) == each["file"] and "not read" in each["reason"] for each in found["left_out"])
    assert any(each["reason"] == "not in checkpoint-2_step50" for each in found["left_out"])
    assert broken.name in messages


def test_a_later_baseline_and_other_thresholds(samples: Path) -> None:
    """Earlier steps are left out; with a change that must be huge, or one more step to wait for, nothing alarms."""
    text, _ = run(samples, "--baseline", 100, "--format", "csv", code=0)
    rows = list(csv.DictReader(io.StringIO(text)))
    assert {row["step"] for row in rows} == {"100", "150", "200"}
    assert all(row["change"] == "" for row in rows if row["step"] == "100")
    assert {row["alarm"] for row in rows} == {"0"}  # all of them have the checkerboard
    run(samples, code=3)
    run(samples, "--effect", 1e6, code=0)


def test_the_trained_reward_gates_the_alarms(samples: Path) -> None:
    """A reward that rises with the checkerboard lets them through, and the sentence says from where to where."""
    options = ("--held-out", "ssim", "--reference", samples / "truth", "--format", "json")
    text, _ = run(samples, "--reward", "-1*gmsd[-0.35, 0]", *options, code=3)
    found = json.loads(text)
    assert found["measures"]["reward"] == "trained"
    assert [each["changes"].get("reward", 0) > 0.1 for each in found["steps"]] == [False, False, True, True, True]
    assert {alarm["measure"]: alarm["since"] for alarm in found["alarms"]}["ssim"] == 100
    assert all("while the reward rose from" in alarm["sentence"] for alarm in found["alarms"])


class Page(HTMLParser):
    """The charts and images of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_shows_every_measure_and_its_alarms(samples: Path, tmp_path: Path) -> None:
    """A chart for each measure with a point per step, alarms marked from where they began, and images without loss."""
    page = tmp_path / "page.html"
    run(samples, "--held-out", "ssim", "--reference", samples / "truth", "--output", page, code=3)
    text = page.read_text()
    tags = Page(text).tags
    charts = [attributes["aria-label"] for tag, attributes in tags if tag == "svg"]
    assert charts == ["ssim", *STATISTICS]
    assert sum(tag == "circle" for tag, _ in tags) == len(STEPS) * len(charts)
    svg = text[text.index('aria-label="periodic_grid"') :].partition("</svg>")[0]
    places = [(float(x), kind) for kind, x in re.findall(r'<circle class="(\w+)" r="\d" cx="([\d.]+)"', svg)]
    assert [kind for _, kind in places] == ["dot", "dot", "dot", "alarm", "alarm"]
    assert places == sorted(places)
    span = re.search(r'class="span" x="([\d.]+)"', svg)
    assert span is not None
    assert float(span[1]) == pytest.approx(places[2][0], abs=0.1)
    truth = re.search(r'class="truth"[^>]*y1="([\d.]+)"', svg)
    assert truth is not None
    assert "no-referrer" not in text
    assert not re.findall(r'(?:src|href)="(?!data:)', text)  # self-contained
    assert sum(tag == "img" for tag, _ in tags) == 4 * 4  # the first, the alarm's, the last, the ground truth
    assert "<script" not in text


def test_names_cannot_inject_anything(samples: Path, tmp_path: Path) -> None:
    """Names of files and folders are text on the page."""
    evil = "<b onclick=x>.png"
    for folder in samples.iterdir():
        (folder / NAMES[0]).rename(folder / evil)
    page = tmp_path / "page.html"
    run(samples, "--reference", samples / "truth", "--output", page, code=3)
    assert not any("onclick" in attributes for _, attributes in Page(page.read_text()).tags)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--held-out", "ssim"), "pass --reference"),
        (("--held-out", "psnrr"), "unknown reward"),
        (("--reward", "piqe", "--held-out", "piqe"), "cannot check itself"),
        (("--baseline", "7"), "is not a step with later ones"),
        (("--baseline", "200"), "is not a step with later ones"),
        (("--patience", "5"), "Pass --patience 4"),
    ],
)
def test_mistakes_in_the_command(samples: Path, options: tuple[str, ...], message: str) -> None:
    """Each is one line that says what to do."""
    _, messages = run(samples, *options, code=2)
    assert message in messages


def test_mistakes_in_the_folder(tmp_path: Path) -> None:
    """No folder, no steps, two of one number, no common image."""
    assert "no such folder" in run(tmp_path / "none", code=2)[1]
    save(tmp_path / "a" / "step_1", scenes())
    assert "a folder for each step" in run(tmp_path / "a", code=2)[1]
    save(tmp_path / "a" / "step_001", scenes())
    assert "are the same step" in run(tmp_path / "a", code=2)[1]
    save(tmp_path / "c" / "epoch_0.5", scenes())
    save(tmp_path / "c" / "epoch_0.25", scenes())
    assert "steps are whole numbers" in run(tmp_path / "c", code=2)[1]
    save(tmp_path / "b" / "1", scenes())
    (tmp_path / "b" / "2").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "b" / "2" / "other.png")
    assert "no image in common" in run(tmp_path / "b", "--patience", 1, code=2)[1]


def test_a_tiny_image_is_left_out_by_name(samples: Path) -> None:
    """One thumbnail among the samples does not end the command."""
    for step in STEPS:
        Image.fromarray(np.full((2, 9, 3), 99, np.uint8)).save(samples / f"checkpoint-2_step{step}" / "thumb.png")
    printed, messages = run(samples, "--format", "json", code=3)
    assert {Path(each["file"]).name for each in json.loads(printed)["left_out"]} == {"thumb.png"}
    assert "a side shorter than 3 pixels" in messages


@pytest.mark.parametrize("broken", [5, 8])
def test_too_few_images_are_no_success(tmp_path: Path, broken: int) -> None:
    """A script must not read "no alarm" where nothing could be compared."""
    for step in (0, 100):
        save(tmp_path / f"step_{step}", restored(step))
    for name in NAMES[:broken]:
        file = tmp_path / "step_0" / name
        file.write_bytes(file.read_bytes()[:500])
    _, messages = run(tmp_path, "--patience", 1, code=2)
    assert "needs at least 4 images" in messages
    assert "truncated" in messages


def test_a_reward_without_scores_is_no_success(samples: Path) -> None:
    """Whether it rose is unknown, so that no alarm could be raised."""
    _, messages = run(samples, "--reward", "niqe", code=2)
    assert "a later step that niqe scores" in messages
    assert "a side shorter than 96 pixels" in messages


def test_a_measure_without_a_change_shows_none(samples: Path) -> None:
    """NIQE has no value for small images: nothing is shown, and no zero."""
    printed, _ = run(samples, "--held-out", "niqe", "--format", "json", code=3)
    assert json.loads(printed)["steps"][-1]["changes"]["niqe"] is None
    row = next(line for line in run(samples, "--held-out", "niqe", code=3)[0].splitlines() if "niqe" in line)
    assert row.split() == ["niqe", "held", "out"]


@pytest.mark.parametrize("kept", [0, 3])
def test_few_references_do_not_silence_alarms(samples: Path, tmp_path: Path, kept: int) -> None:
    """Where most references are missing or broken, images are compared with the baseline, and the user is told."""
    truth = tmp_path / "gt"
    save(truth, scenes())
    for place, name in enumerate(NAMES):
        if place >= kept:
            (truth / name).rename(truth / f"other{place}.png")
    printed, messages = run(samples, "--reference", truth, code=3)
    assert f"{8 - kept} of 8 images have no reference" in messages
    assert "moved from" in printed
    for place in range(kept):
        (truth / NAMES[place]).write_bytes(b"broken")
    assert "moved from" in run(samples, "--reference", truth, code=3)[0]
