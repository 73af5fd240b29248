"""The reference is complete: every public name stands on a page, and what a user imports is explained."""

import ast
import importlib
import importlib.util
import inspect
import re
from pathlib import Path
from types import FunctionType

import pytest

import iqareward

ROOT = Path(iqareward.__file__).parents[1]
BLOCK = re.compile(r"^::: (?P<name>[\w.]+)\n(?:    options: \{(?P<options>[^\n]*)\}\n)?", re.M)
MEMBERS = re.compile(r"members: \[(?P<names>[^\]]*)\]")


def public_names(module: str) -> list[str]:
    """Classes and functions that a module defines, without a leading underscore."""
    if importlib.util.find_spec(module) is None:
        return []
    tree = ast.parse(Path(str(importlib.import_module(module).__file__)).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]


def exported(package: str) -> set[str]:
    """Full names of what a package lists in `__all__`; a block of the package shows those too."""
    module = importlib.import_module(package)
    things = [getattr(module, name) for name in getattr(module, "__all__", ())]
    return {f"{thing.__module__}.{thing.__qualname__}" for thing in things if hasattr(thing, "__qualname__")}


def offered(package: str) -> list[str]:
    """What users import from a package: its `__all__`, or what it imports under its own name."""
    module = importlib.import_module(package)
    tree = ast.parse(Path(str(module.__file__)).read_text())
    aliases = [alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    names = getattr(module, "__all__", [alias.asname for alias in aliases if alias.asname == alias.name])
    kinds = (type, FunctionType)
    return [name for name in names if not name.startswith("__") and isinstance(getattr(module, name), kinds)]


def documented() -> set[str]:
    """Dotted names that the reference pages show, through their module or directly."""
    found: set[str] = set()
    for page in (ROOT / "docs" / "reference").rglob("*.md"):
        for block in BLOCK.finditer(page.read_text()):
            members = MEMBERS.search(block["options"] or "")
            if members is not None:
                found |= {f"{block['name']}.{name.strip()}" for name in members["names"].split(",")}
                continue
            package, _, last = block["name"].rpartition(".")
            thing = getattr(importlib.import_module(package), last, None)
            if hasattr(thing, "__qualname__"):  # shown by the name that users import
                found.add(f"{thing.__module__}.{thing.__qualname__}")
            else:
                found |= {f"{block['name']}.{name}" for name in public_names(block["name"])} | exported(block["name"])
    return found


PACKAGES = ("iqareward", "iqareward.rewards", "iqareward.diffusion", "iqareward.schedules")
EXPORTED = [(package, name) for package in PACKAGES for name in offered(package)]


@pytest.mark.parametrize("package", sorted({package for package, _ in EXPORTED}))
def test_what_users_import_is_on_a_page(package: str) -> None:
    """Each class and function that a package offers is shown by a `:::` block."""
    things = {name: getattr(importlib.import_module(package), name) for name in offered(package)}
    shown = documented()
    missing = [name for name, thing in things.items() if f"{thing.__module__}.{thing.__qualname__}" not in shown]
    assert not missing, f"add to a page of docs/reference: {missing}"


@pytest.mark.parametrize(("module", "name"), EXPORTED)
def test_exported_names_are_explained(module: str, name: str) -> None:
    """What users import has an example, its arguments, and what a function returns."""
    thing = getattr(importlib.import_module(module), name)
    sections = set(re.findall(r"^(Args|Attributes|Returns|Yields|Example):", inspect.getdoc(thing) or "", re.M))
    if inspect.isclass(thing) and issubclass(thing, Exception | Warning):
        return
    assert "Example" in sections
    if inspect.isclass(thing):
        nothing = getattr(thing, "_is_protocol", False)
        takes = {} if nothing else inspect.signature(thing).parameters
        fields = getattr(thing, "__annotations__", {}) or takes
        assert not fields or sections & {"Args", "Attributes"}
    else:
        signature = inspect.signature(thing)
        assert not signature.parameters or "Args" in sections
        assert signature.return_annotation in (None, "None") or sections & {"Returns", "Yields"}


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
