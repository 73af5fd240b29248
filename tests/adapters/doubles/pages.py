"""The code that pages and module docstrings tell a reader to write."""

import inspect
import re
import textwrap
from pathlib import Path
from types import ModuleType

import iqareward

DOCS = Path(iqareward.__file__).parents[1] / "docs"


def blocks(source: ModuleType | str, language: str = "python") -> list[str]:
    """Fenced blocks of a module's docstring, or of a page below `docs/`."""
    text = (DOCS / source).read_text() if isinstance(source, str) else inspect.getdoc(source) or ""
    return [textwrap.dedent(code) for code in re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", text, re.M | re.S)]


def execute(code: str, scope: dict) -> None:
    """Run a block; its assertions count under `python -O` too."""
    exec(compile(code, "<block>", "exec", optimize=0), scope)


def package(monkeypatch, **modules: ModuleType) -> None:
    """Make modules importable under dotted names, given with `__` for the dot; parents are empty packages."""
    import sys

    for name, module in modules.items():
        parts = name.split("__")
        for depth in range(1, len(parts)):
            parent = ".".join(parts[:depth])
            if parent not in sys.modules:
                empty = ModuleType(parent)
                empty.__path__ = []
                monkeypatch.setitem(sys.modules, parent, empty)
        monkeypatch.setitem(sys.modules, ".".join(parts), module)
        if len(parts) > 1:
            monkeypatch.setattr(sys.modules[".".join(parts[:-1])], parts[-1], module, raising=False)
