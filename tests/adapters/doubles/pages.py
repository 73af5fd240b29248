"""The code that pages and module docstrings tell a reader to write."""

import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import iqareward

DOCS = Path(iqareward.__file__).parents[1] / "docs"


def blocks(source: ModuleType | str, language: str = "python", *, section: str = "") -> list[str]:
    """Fenced blocks of a module's docstring, or of a page below `docs/`, or of one `##` section of it."""
    text = (DOCS / source).read_text() if isinstance(source, str) else inspect.getdoc(source) or ""
    if section:
        text = next(part for part in text.split("\n## ") if part.partition("\n")[0] == section)
    return [textwrap.dedent(code) for code in re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", text, re.M | re.S)]


def execute(code: str, scope: dict) -> None:
    """Run a block; its assertions count under `python -O` too."""
    exec(compile(code, "<block>", "exec", optimize=0), scope)


def package(monkeypatch, **modules: ModuleType) -> None:
    """Make modules importable under dotted names, given with `__` for the dot; parents are empty packages."""
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


def changed(function: Callable[..., Any], diffs: Sequence[str], scope: dict[str, Any]) -> Callable[..., Any]:
    """A mock's function after the changes of a page's diff blocks, which sees the names of `scope`.

    Lines are compared without spaces, quotes and parentheses, and `...` in a line of a diff stands for anything.
    """
    lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    for hunk in re.split(r"\n\s*\n", "\n\n".join(diff.strip("\n") for diff in diffs)):
        before = [line[1:] for line in hunk.splitlines() if line[0] != "+"]
        patterns = [re.compile(".*".join(map(re.escape, _bare(line).split("...")))) for line in before]
        places = [
            start
            for start in range(len(lines) - len(before) + 1)
            if all(pattern.fullmatch(_bare(line)) for pattern, line in zip(patterns, lines[start:], strict=False))
        ]
        assert len(places) == 1, f"the mock has {len(places)} places like {before}"
        old = lines[places[0] : places[0] + len(before)]
        indent = old[0][: len(old[0]) - len(old[0].lstrip())]
        kept = iter(old)
        new = [(line[0], indent + line[1:] if line[0] == "+" else next(kept)) for line in hunk.splitlines()]
        lines[places[0] : places[0] + len(before)] = [line for sign, line in new if sign != "-"]
    names = {**vars(sys.modules[function.__module__]), **scope}
    execute("\n".join(lines), names)
    return names[function.__name__]


def _bare(line: str) -> str:
    return re.sub(r"[\s()'\"]", "", line).replace(",}", "}")
