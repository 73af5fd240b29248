"""A bar on a terminal, plain lines elsewhere; both say what matters, and alarms stay on the screen."""

import io
import sys

import pytest

from iqareward.diffusion.progress import progress_bar

RECORD = {
    "update": 2,
    "rl_loss": -0.02,
    "sft_loss": 0.031,
    "reward": 0.1234,
    "scored": 0.5,
    "skipped": 1,
    "difficulty": 0.05,
    "sft_share": 0.75,
    "has_signal": 1.0,
}


class Terminal(io.StringIO):
    """An error stream that a person looks at."""

    def isatty(self) -> bool:
        return True


def test_a_terminal_has_a_bar(monkeypatch):
    """In 80 columns: how far it is, the figures of the last update, every alarm."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress_bar("RL", 2) as advance:
        advance(RECORD | {"update": 1, "has_signal": 0.5})
        advance(RECORD | {"alarms": "psnr fell"})
    shown = sys.stderr.getvalue()
    assert "update 2: psnr fell" in shown
    assert "\x1b" in shown
    last = next(line for line in reversed(shown.splitlines()) if "2/2" in line)
    for text in ("RL", "reward 0.123", "difficulty 0.05", "sft 0.75", "signal 1"):
        assert text in last


@pytest.mark.parametrize("force_color", [None, "1"])
def test_a_log_has_plain_lines(capsys, monkeypatch, force_color):
    """The first and the last update at least, each on one line without control characters, however narrow it is."""
    monkeypatch.setenv("COLUMNS", "20")
    if force_color:
        monkeypatch.setenv("FORCE_COLOR", force_color)
    with progress_bar("RL", 12, done=2, every=1e9) as advance:
        for update in range(3, 8):
            advance(RECORD | {"update": update, "alarms": "psnr fell [low]" if update == 4 else ""})
    out, err = capsys.readouterr()
    assert out == ""
    first, alarm, last = err.splitlines()
    assert alarm == "update 4: psnr fell [low]"
    assert first.startswith("RL 3/12  rl_loss -0.02  sft_loss 0.031  reward 0.123  scored 50%  skipped 1  ")
    assert last.startswith("RL 7/12  ")
    assert "skipped 5" in last
    assert "s each" in last
    assert last.endswith("left")
    assert not {"\x1b", "\r"} & set(err)


def test_a_log_has_a_line_as_often_as_asked(capsys):
    """With 0 seconds between two lines each update has one, also of SFT, and none comes twice."""
    with progress_bar("SFT", 3, every=0) as advance:
        for _ in range(3):
            advance({"sft_loss": 0.5})
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:2] for line in lines] == [[f"SFT {n}/3", "sft_loss 0.5"] for n in (1, 2, 3)]


def test_nothing_is_shown_where_it_should_not(capsys):
    """On all processes but one."""
    with progress_bar("SFT", 1, shown=False) as advance:
        advance({"sft_loss": 1.0})
    assert capsys.readouterr() == ("", "")
