"""The script that counts the package counts any checkout and names what cannot run there."""

from pathlib import Path

from benchmarks import house


def test_counts_of_a_small_checkout(tmp_path: Path) -> None:
    """Lines, docstring lines and names of two files; a task that the checkout lacks is reported with its reason."""
    files = {
        "__init__.py": '"""One."""\n\n__all__ = ["Shown", "shown"]\n',
        "rewards/core.py": '"""One.\n\nTwo.\n"""\n\n\nclass Shown:\n    """Three."""\n\n\ndef _hidden(): ...\n',
        "schedules/__init__.py": "from iqareward.schedules.inner import cosine as cosine\n",
        "schedules/inner.py": "def cosine(): ...\ndef helper(): ...\n",
    }
    for name, text in files.items():
        (tmp_path / "iqareward" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "iqareward" / name).write_text(text)
    rows = [{"commit": "now", **row} for row in house.rooms(tmp_path) + house.public_names(tmp_path)]
    found = {row.get("room") or row["names"]: row for row in rows}
    assert found["package"]["files"] == 4
    assert found["package"]["lines"] == 17
    assert found["package"]["docstring_lines"] == 6
    assert found["iqareward/rewards"]["lines"] == 11
    assert found["what users import"]["list"] == ["Shown", "cosine", "shown"]
    assert found["without underscore, whole package"]["count"] == 3
    (tmp_path / "iqareward" / "__init__.py").write_text("")
    rows += [{"commit": "broken", **row} for row in house.public_names(tmp_path)]
    report = house.report(rows)
    assert "| iqareward/rewards: lines, files, docstrings | 11 in 1, 45% |  |" in report
    assert "| public names: iqareward.__all__ | 2 | not run: AttributeError" in report
