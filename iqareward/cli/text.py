"""Print text from outside, such as file names and error messages, as it is: no markup, any bytes, any encoding."""

import re

from rich.console import Console
from rich.text import Text

# control characters, which move a terminal's cursor or turn the direction of text, and halves of surrogate pairs, which
# no encoding can write
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Text in one line, with escapes for control characters and for bytes of a file name that are not UTF-8."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def plain(text: object) -> Text:
    """Text for a cell or title of rich, in which `[red]` and `:b:` are not markup."""
    return Text(printable(text))


def say(console: Console, text: object, *, label: str = "", style: str = "") -> None:
    """Print one line that rich neither wraps nor interprets, after a label in a style such as "red"."""
    console.print(Text.assemble((label, style), " " if label else "", printable(text)), soft_wrap=True)
