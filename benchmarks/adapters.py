"""Run the tests of the adapters, and write what was run against each trainer into the documentation.

    python -m benchmarks.adapters          # run them, and write the table of docs/reference/adapters.md
    python -m benchmarks.adapters --check  # collect them, and fail if the page lists other rows

A test says by `@pytest.mark.trainer(name, version, *exercised)` which trainer it stands for, the commit or release that
was read, and which of `EXERCISED` it runs.
"""

import argparse
import sys
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/reference/adapters.md"
BEGIN, END = "<!-- table: python -m benchmarks.adapters -->", "<!-- end of table -->"
HEADER = "| trainer | version read | exercised | tests |\n|---|---|---|---|"
EXERCISED = {
    "run": "the installed trainer itself",
    "caller": "the code that calls our function",
    "reader": "the code that uses what it returned",
    "configuration": "the keys that select our function",
    "threads": "calls from several threads",
    "processes": "several processes, or a pickled copy",
    "async": "an event loop",
    "gradients": "a loss through the reward",
    "weights": "the SFT/RL weights in the trainer's loss",
    "http": "requests over the network",
}


class Table:
    """A pytest plugin that counts what was collected and run for each trainer."""

    def __init__(self) -> None:
        self.marks: dict[str, list[tuple[str, ...]]] = {}
        self.exercised: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        self.outcomes: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            self.marks[item.nodeid] = [mark.args for mark in item.iter_markers("trainer")]
            for name, version, *exercised in self.marks[item.nodeid]:
                if unknown := set(exercised) - set(EXERCISED):
                    raise pytest.UsageError(
                        f"{item.nodeid}: expected some of {list(EXERCISED)}, got {sorted(unknown)}."
                    )
                self.exercised[name, version] |= set(exercised)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            for name, version in {mark[:2] for mark in self.marks.get(report.nodeid, [])}:
                self.outcomes[name, version][report.outcome] += 1

    def rows(self) -> list[tuple[str, str, str]]:
        """Trainer, version, and what was exercised."""
        keys = sorted(self.exercised, key=lambda key: key[0].lower())
        return [(*key, ", ".join(word for word in EXERCISED if word in self.exercised[key])) for key in keys]

    def text(self) -> str:
        """The table, with the outcome of the run."""
        lines = [HEADER]
        for name, version, exercised in self.rows():
            outcome = ", ".join(f"{count} {word}" for word, count in sorted(self.outcomes[name, version].items()))
            lines.append(f"| {name} | {version} | {exercised} | {outcome} |")
        words = "; ".join(f"*{word}*: {meaning}" for word, meaning in EXERCISED.items())
        return "\n".join([*lines, "", f"{words}. Run on {datetime.now(UTC):%Y-%m-%d}, on a CPU."])


def listed() -> list[tuple[str, ...]]:
    """The rows of the page, without the outcome."""
    table = PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    lines = [line for line in table.splitlines() if line.startswith("| ")][1:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")[:3]) for line in lines]


def main() -> None:
    """Run or collect the tests, and write or check the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="collect only, and compare with the page")
    options = parser.parse_args()
    table = Table()
    arguments: list[Any] = ["-q", "-p", "no:cacheprovider", str(ROOT / "tests/adapters")]
    status = pytest.main([*arguments, "--collect-only", "-qq"] if options.check else arguments, plugins=[table])
    if options.check:
        different = set(table.rows()) ^ set(listed())
        sys.exit(f"{PAGE} lists other rows: {sorted(different)}; run python -m benchmarks.adapters" if different else 0)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table.text()}\n{END}{after}", encoding="utf-8")
    sys.exit(int(status))


if __name__ == "__main__":
    main()
