"""How the site shows our docstrings: `Example:` as code, `References:` one paper a line, with links."""

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^Example:$", re.M)
_REFERENCES = re.compile(r"^References:\n(?:(?: +[^\n]*)?\n?)*", re.M)
_ADDRESS = re.compile(r"https?://[^\s;)]+(?<![.,])")
_LAST = re.compile(r"(https?://\S+(?: \([^)\n]*\))?)$", re.M)  # on its line: the end of an entry


def shown(docstring: str) -> str:
    """The docstring as griffe's Google parser and Markdown want it."""
    docstring = _EXAMPLE.sub("Examples:", docstring)  # griffe knows the plural only, and takes `>>>` for quotations
    return _REFERENCES.sub(lambda section: _linked(section[0]), docstring)


def _linked(section: str) -> str:
    return _ADDRESS.sub(lambda address: f"<{address[0]}>", _LAST.sub(r"\1  ", section))


class Docstrings(griffe.Extension):
    """Rewrites every docstring after it has been read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)
