"""The committed results, by theme."""

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"
_DATED = re.compile(r".*_(\d{4}-\d{2}-\d{2})\.json")


def newest_file(theme: str, folder: Path = FOLDER) -> Path:
    """The file of the newest result of a theme.

    Raises:
        FileNotFoundError: there is none.
    """
    found = []
    for file in folder.glob(f"{theme}_*.json"):
        dated = _DATED.fullmatch(file.name)
        if dated and json.loads(file.read_text())["theme"] == theme:
            found.append((dated[1], file.name, file))
    if not found:
        raise FileNotFoundError(
            f"no result of {theme!r} in {folder}; run the benchmark with --json {theme}_<hardware>_<date>.json"
        )
    return max(found)[2]


def newest(theme: str, folder: Path = FOLDER) -> dict[str, Any]:
    """The newest result of a theme."""
    return json.loads(newest_file(theme, folder).read_text())
