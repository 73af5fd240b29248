"""The committed results, by theme."""

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
_DATED = re.compile(r".*_(\d{4}-\d{2}-\d{2})(_\w+)?\.json")


def newest_file(theme: str, folder: Path = FOLDER) -> Path:
    """The file of the newest result of a theme; of `theme/part`, the newest that has measured this part.

    Raises:
        FileNotFoundError: there is none.
    """
    found = []
    name, _, part = theme.partition("/")
    for file in folder.glob(f"{name}_*.json"):
        dated, document = _DATED.fullmatch(file.name), json.loads(file.read_text())
        if dated and document["theme"] == name and (not part or document.get(part)):
            found.append((dated[1], document.get("date", ""), file.name, file))
    if not found:
        raise FileNotFoundError(
            f"no result of {theme!r} in {folder}; run the benchmark with --json {theme}_<hardware>_<date>.json"
        )
    return max(found)[3]


def newest(theme: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The newest result of a theme."""
    return json.loads(newest_file(theme, folder).read_text())
