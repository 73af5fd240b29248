"""The papers page: every formula with its paper and its file, from the `References` of the docstrings.

python -m benchmarks.papers            # write docs/papers.md
python -m benchmarks.papers --check    # exit code 1 if it is not what the docstrings say
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks._tables import table

ROOT = Path(__file__).parents[1]
PACKAGE, PAGE = ROOT / "iqareward", ROOT / "docs" / "papers.md"
MARK = re.compile(r"(?<=<!-- papers -->\n).*?(?=<!-- /papers -->)", re.S)
SECTION = re.compile(r"^References:\n(?P<text>(?:(?: +[^\n]*)?\n)*)", re.M)
URL = re.compile(r"https?://[^\s;)]+(?<![.,])")

# heading -> the rooms of the package whose formulas stand below it
HEADINGS = {
    "Metrics": ("functional",),
    "Rewards and judges": ("rewards",),
    "Difficulty, advantages, weights": ("difficulty", "advantages", "weighting", "schedules"),
    "Reference loop": ("diffusion",),
    "Everything else": ("adapters", "serving", "cli", "types", "images", "groups", "optional", "testing", "agreement"),
}


class Citation(NamedTuple):
    """A paper that a docstring names.

    Attributes:
        file: relative to the repository.
        name: name of the function or class.
        text: authors, title, year, as written.
        url: where to read it.
    """

    file: str
    name: str
    text: str
    url: str


def citations_of(docstring: str) -> Iterator[tuple[str, str]]:
    """Text and address of each entry under `References:`; what follows an address up to the next entry is a remark."""
    found = SECTION.search(docstring + "\n")
    text, remark = "", False
    for line in (found["text"] if found else "").splitlines():
        line = line.strip()
        if remark and line.startswith("("):
            continue
        remark = False
        while address := URL.search(line):
            yield f"{text} {line[: address.start()]}".strip(" ,.;"), address[0]
            text, remark, line = "", True, line[address.end() :]
            line = line.lstrip() if line.startswith(";") and URL.search(line) else ""
        text = f"{text} {line}"


def citations(package: Path = PACKAGE) -> list[Citation]:
    """All of them, file by file."""
    found = []
    for file in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (docstring := ast.get_docstring(node)):
                path = str(file.relative_to(package.parent))
                found += [Citation(path, node.name.lstrip("_"), *entry) for entry in citations_of(docstring)]
    return found


def page_tables(found: list[Citation]) -> str:
    """A table per heading: formulas, paper, file."""
    blocks = []
    for heading, rooms in HEADINGS.items():
        rows: dict[tuple[str, str], list[Citation]] = {}
        for citation in found:
            if Path(citation.file).parts[1].removesuffix(".py") in rooms:
                rows.setdefault((citation.file, citation.url), []).append(citation)
        cells = [
            (", ".join(f"`{name}`" for name in dict.fromkeys(entry.name for entry in entries)),
             f"[{max((entry.text for entry in entries), key=len)}]({url})", f"`{file.partition('/')[2]}`")
            for (file, url), entries in rows.items()
        ]  # fmt: skip
        if cells:
            blocks.append(f"## {heading}\n\n{table(('formula', 'paper', 'file'), cells, text_columns=3)}")
    return "\n" + "\n\n".join(blocks) + "\n\n"


def rendered(page: str) -> str:
    """The page with its tables filled in."""
    return MARK.sub(lambda _: page_tables(citations()), page)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    check, text = parser.parse_args().check, PAGE.read_text()
    if rendered(text) == text:
        return 0
    print(f"{'stale' if check else 'wrote'} {PAGE.relative_to(ROOT)}")
    if not check:
        PAGE.write_text(rendered(text))
    return 1 if check else 0


if __name__ == "__main__":
    sys.exit(main())
