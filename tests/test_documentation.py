"""What the documentation shows runs: every Python block of the README and docs, and every docstring example."""

import doctest
import importlib
import pkgutil
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import iqareward

ROOT = Path(iqareward.__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(iqareward.__path__, "iqareward.")
    if not module.name.endswith("__main__")
)
BLOCK = re.compile(r"(?P<note><!-- not run: [^\n]+-->\n+)?^```python[^\n]*\n(?P<code>.*?)^```$", re.M | re.S)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if "```python" in page.read_text()], ids=name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Python blocks of a page run one after the other; a block marked `<!-- not run: why -->` at least compiles."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("documentation_page")  # a module of its own, so that what a page defines can be pickled
    monkeypatch.setitem(sys.modules, module.__name__, module)
    text = page.read_text()
    for block in BLOCK.finditer(text):
        line = text[: block.start("code")].count("\n") + 1
        code = compile("\n" * (line - 1) + block["code"], name_of(page), "exec", optimize=0)  # with its assertions
        if block["note"] is None:
            exec(code, vars(module))
    assert text.count("```python") == len(BLOCK.findall(text))


@pytest.mark.parametrize("module", MODULES)
def test_docstring_examples(module: str) -> None:
    """Docstring examples print what they say."""
    results = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.failed == 0
