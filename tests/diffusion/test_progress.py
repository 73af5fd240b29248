"""The bar says what matters, and alarms stay on the screen."""

from iqareward.diffusion.progress import progress_bar


def test_figures_and_alarms_are_shown(capsys, monkeypatch):
    """In 80 columns, on the error stream: how far it is, the figures of the last update, every alarm."""
    monkeypatch.setenv("COLUMNS", "80")
    record = {
        "update": 2,
        "reward": 0.1234,
        "difficulty": 0.05,
        "sft_share": 0.75,
        "active": 1.0,
        "alarms": "psnr fell",
    }
    with progress_bar("RL", 2) as advance:
        advance({"update": 1, "reward": 0.0, "difficulty": 1.0, "sft_share": 0.0, "active": 0.5})
        advance(record)
    out, err = capsys.readouterr()
    assert out == ""
    assert "update 2: psnr fell" in err
    last = err.splitlines()[-1]
    for text in ("RL", "2/2", "reward 0.123", "difficulty 0.05", "sft 0.75", "active 1"):
        assert text in last
    assert len(last) <= 80


def test_nothing_is_shown_where_it_should_not(capsys):
    """On all processes but one."""
    with progress_bar("SFT", 1, shown=False) as advance:
        advance({"sft_loss": 1.0})
    assert capsys.readouterr() == ("", "")
