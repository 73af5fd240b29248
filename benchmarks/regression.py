"""Has anything become slower, compared with the last committed result? By hand or weekly, never in tests.

    python -m benchmarks.bench_classical --json new.json
    python -m benchmarks.regression new.json                      # against the newest result of the same theme
    python -m benchmarks.regression new.json --against old.json --tolerance 0.15

Compares ratios to peers and targets, each measured within one run, so that another machine or a busy one does not look
like a change. Exit code 1 if one is worse by more than the tolerance.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks._results import newest

KEYS = ("metric", "reward", "mode", "size", "batch")


def figures(document: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """name -> (value, which way is better): ratios of rows by setting, and targets."""
    found = {}
    for row in document["rows"]:
        if row.get("ratio") is not None:
            name = " ".join(str(row[key]) for key in KEYS if key in row)
            found[f"ratio {name}"] = (float(row["ratio"]), "higher")
    for target in document["targets"]:
        found.setdefault(target["name"], (float(target["value"]), target["better"]))
    return found


def worse(new: dict[str, Any], old: dict[str, Any], tolerance: float) -> tuple[list[str], int]:
    """Lines about figures that became worse by more than `tolerance` (relative), and how many were compared."""
    before, after = figures(old), figures(new)
    shared = [name for name in after if name in before]
    lines = []
    for name in shared:
        (then, better), (now, _) = before[name], after[name]
        loss = (then - now if better == "higher" else now - then) / abs(then) if then else 0.0
        if loss > tolerance:
            lines.append(f"{name}: {then:.3g} -> {now:.3g} ({better} is better)")
    return lines, len(shared)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("new", type=Path)
    parser.add_argument("--against", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.1)
    options = parser.parse_args()
    new = json.loads(options.new.read_text())
    old = json.loads(options.against.read_text()) if options.against else newest(new["theme"])
    lines, compared = worse(new, old, options.tolerance)
    print(f"{compared} figures compared with {old['date']}, {old['hardware']}, {old['commit']}.")
    print("\n".join(lines) if lines else "None is worse.")
    if not compared:
        print("Nothing in common: is this the right result?", file=sys.stderr)
    return 1 if lines or not compared else 0


if __name__ == "__main__":
    sys.exit(main())
