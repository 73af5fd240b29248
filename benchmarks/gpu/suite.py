"""The suite's own GPU tests: as they are, then what failed with warnings that are no errors."""

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.run import ROOT, Clock, Results

OUTCOME = re.compile(r"(?P<test>\S+\.py(?:::.+?)?) (?P<what>PASSED|FAILED|ERROR|SKIPPED)\b")
MARK = re.compile(r"mark\.gpu|on_devices")  # the mark, or the parameter of tests.gpu that carries it
REASON = re.compile(r"(?:FAILED|ERROR) (?P<test>\S+\.py(?:::.+?)?)(?: - .*)?$")


def run(clock: Clock) -> None:
    files = gpu_tests(ROOT / "tests")
    files = [min(files, key=lambda file: Path(file).stat().st_size)] if clock.tiny else files
    found: Results = {}

    def tests(selected: Sequence[str], limit: float, *options: str) -> Results:
        found.update(pytest_on(selected, limit, clock.out / "pytest.log", *options))
        return found

    clock.step("as they are", lambda: tests(files, max(clock.left() - 20, 10)), need=10, most=clock.left() + 5)
    if again := [line.split(" - ")[0] for line in found.get("failed", [])]:
        clock.step(
            "warnings allowed",
            lambda: tests(again, max(clock.left(), 10), "-o", "filterwarnings=default"),
            need=10,
            most=clock.left() + 12,
        )


def gpu_tests(folder: Path) -> list[str]:
    """Files of tests that have the mark, so that no other file has to be imported; found by their text."""
    return sorted(str(file) for file in folder.rglob("test_*.py") if MARK.search(file.read_text()))


def pytest_on(selected: Sequence[str], limit: float, log: Path, *options: str, root: Path = ROOT) -> Results:
    """Run the GPU tests of these files, at most `limit` seconds; a file that cannot be imported fails alone."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-p", "no:cacheprovider", "-p", "no:benchmark",
               "--continue-on-collection-errors", "--no-header", "--tb=short", "--durations=12", *options,
               *selected]  # fmt: skip
    late, began, start = False, time.monotonic(), log.stat().st_size if log.exists() else 0
    with log.open("ab") as stream:  # a file, not a pipe: children that outlive a kill cannot hold it open
        made = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=root)
        try:
            made.wait(limit)
        except subprocess.TimeoutExpired:
            made.send_signal(signal.SIGINT)  # pytest then still says why tests failed, and which were slow
            late = True
            try:
                made.wait(8)
            except subprocess.TimeoutExpired:
                made.kill()
                made.wait()
    lines = [line.rstrip() for line in log.read_bytes()[start:].decode(errors="replace").splitlines() if line.strip()]
    outcomes = [match for line in lines if (match := OUTCOME.match(line))]
    failed = {match["test"]: match["test"] for match in outcomes if match["what"] in ("FAILED", "ERROR")}
    reasons = {match["test"]: line.split(" ", 1)[1] for line in lines if (match := REASON.match(line))}
    row: Results = {
        "seconds": round(time.monotonic() - began, 1), "exit": -signal.SIGINT if late else made.returncode,
        "passed": sum(match["what"] == "PASSED" for match in outcomes),
        "skipped": sum(match["what"] == "SKIPPED" for match in outcomes),
        "failed": [line[:300] for line in (failed | reasons).values()], "last": lines[-1][:200] if lines else "",
        "slow": [line.strip()[:120] for line in lines if "s call " in line or "s setup " in line],
    }  # fmt: skip
    if row["exit"]:
        why = "out of time" if late else f"exit code {made.returncode}"
        row["FAILED"] = f"{why}, {len(row['failed'])} failed, {row['passed']} passed; {row['last']}"
    return row
