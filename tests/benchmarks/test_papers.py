"""The papers page is what the docstrings say, and leads to files that exist."""

import inspect
import re
from pathlib import Path

from benchmarks.papers import PACKAGE, PAGE, citations, citations_of, page_tables, rendered


def test_page_says_what_the_docstrings_say() -> None:
    """Every reference of every docstring stands on the page; `python -m benchmarks.papers` writes it."""
    text = PAGE.read_text()
    assert rendered(text) == text, "run `python -m benchmarks.papers`"
    assert all(citation.url in text for citation in citations())


def test_files_exist() -> None:
    """Every file named on the page is there."""
    named = set(re.findall(r"`([^`]+\.py)` \|$", PAGE.read_text(), re.M))
    assert named
    assert all((PACKAGE / file).is_file() for file in named)


def test_entries_are_told_apart() -> None:
    """Two on a line, remarks in brackets, on the next line and after a full stop."""
    docstring = """First line.

    References:
        A, "Title, with comma", 2001, https://arxiv.org/abs/1 (a remark)
        (another remark, https://example.org)
        B, Other, 2002,
        https://arxiv.org/abs/2; C, Third, 2003, https://arxiv.org/abs/3. And so on.
    """
    assert list(citations_of(inspect.cleandoc(docstring))) == [
        ('A, "Title, with comma", 2001', "https://arxiv.org/abs/1"),
        ("B, Other, 2002", "https://arxiv.org/abs/2"),
        ("C, Third, 2003", "https://arxiv.org/abs/3"),
    ]


def test_a_new_reference_makes_the_page_stale(tmp_path: Path) -> None:
    """A docstring with a paper adds a row below the heading of its room."""
    file = tmp_path / "iqareward" / "functional" / "new.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        'def new():\n    """New.\n\n    References:\n        New, 2030, https://arxiv.org/abs/3001.00001\n    """\n'
    )
    tables = page_tables(citations(tmp_path / "iqareward"))
    assert "## Metrics" in tables
    assert "| `new` | [New, 2030](https://arxiv.org/abs/3001.00001) | `functional/new.py` |" in tables
