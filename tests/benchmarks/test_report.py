"""Documentation and results agree, and a new result makes the pages stale."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import _harness, report
from benchmarks._tables import number, table
from benchmarks.report import FIGURES, is_current


@pytest.mark.parametrize(
    "page", [page for page in report.PAGES if "<!-- results:" in page.read_text()], ids=lambda p: p.name
)
def test_pages_say_what_the_results_say(page: Path) -> None:
    """Every marked table is what the newest committed result gives (`python -m benchmarks.report` writes them)."""
    text = page.read_text()
    assert report.rendered(text) == text
    assert text.count("<!-- results:") == text.count("<!-- /results -->") == len(report.MARK.findall(text))


@pytest.mark.parametrize("file", FIGURES, ids=lambda file: file.name)
def test_figures_show_the_newest_result(file: Path) -> None:
    """Every figure drawn from results carries the digest of the newest one."""
    assert is_current(file, FIGURES[file][0])


def test_changed_result_makes_page_and_figure_stale(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another number in a newer file changes the page and disowns the figure."""
    newer = _harness.newest("classical")
    next(row for row in newer["rows"] if "ratio" in row)["ratio"] = 98.7
    (tmp_path / "classical_x_2027-01-01.json").write_text(json.dumps(newer))
    monkeypatch.setattr("benchmarks.report.newest", lambda theme: _harness.newest(theme, tmp_path))
    monkeypatch.setattr("benchmarks.report.newest_file", lambda theme: _harness.newest_file(theme, tmp_path))
    page = "<!-- results: classical ratios -->\n<!-- /results -->"
    assert "98.7x" in report.rendered(page)
    file, (theme, draw) = next(iter(FIGURES.items()))
    assert not is_current(file, theme)
    with pytest.raises(FileNotFoundError, match="run the benchmark"):
        _harness.newest("nothing", tmp_path)
    draw(tmp_path / "new.png", theme)
    assert is_current(tmp_path / "new.png", theme)
    with Image.open(tmp_path / "new.png") as figure:
        assert figure.width > 600


def test_newest_goes_by_date_then_name(tmp_path: Path) -> None:
    """The date in the name decides; a theme that begins alike is another theme."""
    for name, theme in (("a_x_2026-01-02", "a"), ("a_z_2026-01-01", "a"), ("a_b_y_2027-01-01", "a_b")):
        (tmp_path / f"{name}.json").write_text(json.dumps({"theme": theme, "name": name}))
    assert _harness.newest("a", tmp_path)["name"] == "a_x_2026-01-02"


def test_newest_of_a_part_has_measured_it(tmp_path: Path) -> None:
    """A later run that left a stage out does not hide the one that has it; on one day the time decides."""
    for name, date, stages in (
        ("g_x_2026-01-01", "2026-01-01T10:00+00:00", {"train": {"a": 1}}),
        ("g_w_2026-01-01_abc", "2026-01-01T12:00+00:00", {"train": {"a": 2}}),
        ("g_x_2026-01-02", "2026-01-02T09:00+00:00", {"train": {}, "vlm": {"a": 3}}),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps({"theme": "g", "date": date, **stages}))
    assert _harness.newest("g/train", tmp_path)["train"] == {"a": 2}
    assert _harness.newest("g", tmp_path)["vlm"] == {"a": 3}
    with pytest.raises(FileNotFoundError):
        _harness.newest("g/qalign", tmp_path)


def test_markdown() -> None:
    """Text left, numbers right, three significant digits."""
    assert table(("a", "b"), [("x", number(1234.5)), ("y", number(0.012345))]).splitlines() == [
        "| a | b |",
        "|---|--:|",
        "| x | 1,234 |",
        "| y | 0.0123 |",
    ]
