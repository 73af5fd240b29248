"""A small run of the whole demo: its files, and that page, table and data say the same."""

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from iqareward.demo import Demo, measure, run
from iqareward.demo.files import write_scores
from iqareward.demo.summary import summarise
from iqareward.demo.training import TERCILES, TrainingSettings, train, training_summary
from iqareward.demo.wording import label, percent, signed

pytest.importorskip("skimage", reason="the photographs come with scikit-image")
pytest.importorskip("matplotlib", reason="the figures need matplotlib")
pytest.importorskip("diffusers", reason="the training part needs diffusers")
pytest.importorskip("accelerate", reason="the training part needs accelerate")

REWARDS = ("ssim", "gmsd", "piqe")
SMALL: dict[str, Any] = {"rewards": REWARDS, "num_photographs": 2, "short_side": 64, "num_levels": 2}
TRAINING = TrainingSettings(
    size=16, num_scenes=32, num_held_out=9, channels=(8, 8), sft_updates=4, judge_updates=4, rl_updates=4,
    inputs=4, group_size=2, num_steps=2,
)  # fmt: skip
PICTURES = {"curves.png", "samples.png", "weights.png", "handover.png", "restored.png", "training.png"}
ENTRIES = {"report.html", "scores.csv", "results.json", *PICTURES}


def small_run(folder: Path) -> tuple[Demo, str]:
    """Two photographs of 64 pixels at two levels, and what was printed on 80 columns."""
    stream = io.StringIO()
    console = Console(file=stream, width=80)
    return run(folder, console, **SMALL, training=TRAINING), stream.getvalue()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Demo, str]:
    """One run for all tests that only look."""
    return small_run(tmp_path_factory.mktemp("demo") / "new" / "folder")


class Page(HTMLParser):
    """Collects what the page loads, its table cells, and tags that were never closed."""

    VOID = frozenset({"meta", "img", "source", "input", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.resources: list[str] = []
        self.links: list[str] = []
        self.cells: dict[str, list[tuple[str, str]]] = {}
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "a":
            self.links.append(values["href"] or "")
        self.resources += [values[name] or "" for name in ("src", "srcset", "data", "poster") if name in values]
        if tag in ("script", "link", "iframe"):
            self.resources.append(tag)
        if tag == "tr":
            self.reward = values.get("data-reward")
        if tag == "td":
            self.cells.setdefault(self.reward or "", []).append((values["data-value"] or "", ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            number, text = self.cells[self.reward or ""][-1]
            self.cells[self.reward or ""][-1] = (number, text + data)


@pytest.fixture(scope="module")
def page(demo: tuple[Demo, str]) -> Page:
    return Page(demo[0].report.read_text(encoding="utf-8"))


def test_all_files_are_written(demo: tuple[Demo, str]) -> None:
    """Every file that is returned exists, is not empty, and is named in the printed list."""
    files, printed = demo[0].files, demo[1].replace("\n", "")
    assert {path.name for path in files} == ENTRIES
    for path in files:
        assert path.stat().st_size > 500
        assert path.name in printed


def test_page_is_self_contained(demo: tuple[Demo, str], page: Page) -> None:
    """Everything the page loads is inside it; the only addresses are links to papers."""
    assert page.resources
    assert all(resource.startswith("data:image/") for resource in page.resources)
    assert all(link.startswith("https://arxiv.org/") for link in page.links)
    style = re.findall(r"url\(|@import", demo[0].report.read_text(encoding="utf-8"))
    assert not style
    assert not page.open, "a tag was not closed"


def test_page_shows_the_figures_of_the_data_file(demo: tuple[Demo, str], page: Page) -> None:
    """Each cell of the table holds the number of results.json, and shows it rounded."""
    results = json.loads((demo[0].report.parent / "results.json").read_text(encoding="utf-8"))
    assert results == json.loads(json.dumps(demo[0].results))
    assert set(page.cells) == set(REWARDS)
    for reward, cells in page.cells.items():
        means = [cell["mean"] for cell in results["rank_correlation"][reward]["by_degradation"].values()]
        share = results["mistakes"][reward]["above_original_share"]
        assert [float(number) if number else None for number, _ in cells] == [*means, share]
        assert [text for _, text in cells] == [*(signed(mean) for mean in means), percent(share)]


def test_terminal_shows_every_figure(demo: tuple[Demo, str]) -> None:
    """The table fits on 80 columns with nothing cut off, and has the same figures."""
    results, printed = demo[0].results, demo[1]
    assert "…" not in printed
    for reward in REWARDS:
        line = next(line for line in printed.splitlines() if line.startswith(label(reward).title + " "))
        for cell in results["rank_correlation"][reward]["by_degradation"].values():
            assert signed(cell["mean"]) in line
    for row in results["handover"]:
        assert f"{signed(row['mean_rl'])} + {signed(row['mean_sft'])}" in printed


def test_scores_are_complete(demo: tuple[Demo, str]) -> None:
    """A row for each picture and level; originals have scores and no weights."""
    with demo[0].files[1].open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 4 * 3
    for row in rows:
        assert all(row[reward] for reward in REWARDS)
        if row["level"] == "0":
            assert row["ssim"] == "1.0"
            assert row["w_rl"] == row["w_sft"] == row["rmse"] == ""
        else:
            assert 0 <= float(row["w_sft"]) <= 1
            assert 0 <= float(row["w_rl"]) <= 1


def test_weights_follow_difficulty(demo: tuple[Demo, str]) -> None:
    """The nearer to the original, the more SFT and never the more RL; as errors shrink, SFT gains."""
    with demo[0].files[1].open(encoding="utf-8", newline="") as stream:
        rows = sorted((float(row["rmse"]), row) for row in csv.DictReader(stream) if row["rmse"])
    sft, rl = ([float(row[name]) for _, row in rows] for name in ("w_sft", "w_rl"))
    assert sft == sorted(sft, reverse=True)
    assert rl == sorted(rl)
    assert sft[-1] < 0.2 < 0.8 < sft[0]
    shares = [row["mean_sft"] for row in demo[0].results["handover"]]
    assert shares == sorted(shares)
    assert shares[0] == pytest.approx(0.5, abs=0.1)
    assert shares[-1] > 0.9


def without_environment(results: dict[str, Any]) -> dict[str, Any]:
    """What the photographs alone decide."""
    return {name: value for name, value in results.items() if name not in ("environment", "training")}


def test_two_runs_give_the_same_numbers(demo: tuple[Demo, str], tmp_path: Path) -> None:
    """Everything but duration and versions repeats, to the byte in the table of scores."""
    again = measure(Console(file=io.StringIO()), **SMALL)
    write_scores(again, tmp_path / "scores.csv")
    assert json.dumps(summarise(again)) == json.dumps(without_environment(demo[0].results))
    assert (tmp_path / "scores.csv").read_text() == demo[0].files[1].read_text()


@pytest.mark.filterwarnings("ignore::iqareward.rewards.scoring.UnscoredWarning")
def test_a_reward_that_cannot_score_leaves_gaps(tmp_path: Path) -> None:
    """Pictures too small for MS-SSIM give empty cells and a note, never a number."""
    console = Console(file=io.StringIO(), width=80)
    small = {"rewards": ("psnr", "ms_ssim"), "num_photographs": 1, "short_side": 48, "num_levels": 2}
    result = run(tmp_path, console, **small, training=TRAINING)
    correlations = result.results["rank_correlation"]
    assert all(cell["mean"] is None for cell in correlations["ms_ssim"]["by_degradation"].values())
    assert correlations["psnr"]["by_degradation"]["blur"]["mean"] == pytest.approx(-1)
    assert result.results["mistakes"]["ms_ssim"]["not_scored"] == 8
    assert "got no score" in result.report.read_text(encoding="utf-8")
    with result.files[1].open(encoding="utf-8", newline="") as stream:
        assert all(row["ms_ssim"] == "" for row in csv.DictReader(stream))


def test_training_repeats_and_is_told_whole(demo: tuple[Demo, str]) -> None:
    """The same seed gives the same figures, and the page has each tercile's numbers, good or bad, as they are."""
    trained = train(TRAINING)
    figures = training_summary(trained)
    assert json.dumps(figures) == json.dumps(demo[0].results["training"])
    page = demo[0].report.read_text(encoding="utf-8")
    for tercile in TERCILES:
        cells = figures["terciles"][tercile]
        for name, decimals, factor in (("judge", 2, 1), ("rmse", 1, 255), ("ssim", 3, 1), ("gmsd", 3, 1)):
            old, new = (signed(factor * cells[name][when], decimals) for when in ("before", "after"))
            assert f"{tercile} {old} → {new}" in page
    assert sorted(torch.cat(list(trained.terciles.values())).tolist()) == list(range(9))
    errors = [float(trained.scores["rmse"][0][rows].mean()) for rows in trained.terciles.values()]
    assert errors == sorted(errors)
    assert len(figures["updates"]["sft_share"]) == TRAINING.rl_updates
