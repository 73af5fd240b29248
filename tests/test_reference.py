"""The pages of the reference name things that exist, and the site shows their docstrings well."""

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

import iqareward

ROOT = Path(iqareward.__file__).parents[1]
BLOCK = re.compile(r"^::: (?P<name>[\w.]+)\n(?:    options: \{(?P<options>[^\n]*)\}\n)?", re.M)
MEMBERS = re.compile(r"members: \[(?P<names>[^\]]*)\]")
PAGES = sorted((ROOT / "docs" / "reference").rglob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_of_the_reference_resolve(page: Path) -> None:
    """Every `:::` block, and every member that it lists, is an object of the package."""
    for block in BLOCK.finditer(page.read_text()):
        thing = pkgutil.resolve_name(block["name"])
        members = MEMBERS.search(block["options"] or "")
        for name in members["names"].split(",") if members else ():
            assert hasattr(thing, name.strip()), f"{block['name']}.{name.strip()}"


def test_site_shows_examples_as_code_and_papers_as_links() -> None:
    """griffe knows `Examples:` only; an address becomes a link, each paper a line."""
    spec = importlib.util.spec_from_file_location("site_docstrings", ROOT / "docs" / "_docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    docstring = (
        "Say.\n\nExample:\n    >>> 1\n\nReferences:\n    A, 2001, https://a.org/1 (b)\n    C,\n    https://d.org/2."
    )
    expected = docstring.replace("Example:", "Examples:").replace("https://a.org/1 (b)", "<https://a.org/1> (b)  ")
    assert module.shown(docstring) == expected.replace("https://d.org/2.", "<https://d.org/2>.  ")
    assert "<" not in module.shown("See https://a.org.\n\nReturns:\n    https://a.org")
