"""List the rewards that have a name, one line each."""

from collections.abc import Iterator, Mapping
from typing import Any

from iqareward.cli.doctor import rewards_here
from iqareward.rewards.catalog import CATALOG, PYIQA

COLUMNS = ("name", "here", "refs", "grad", "range", "sign", "a score says", "licence")
LEGEND = """
here   yes; download: the first call fetches the weights;
       [vlm]: pip install "iqareward[vlm]"
refs   it compares with references
grad   differentiable=True can be asked for
range  of most photographs; higher is better
sign   negated: minus the published metric

Sums: "0.7*qalign + 0.3*ssim"; where scores leave [-1, 1], with a range:
"0.7*ssim + 0.3*psnr[10, 50]". More names: iqareward list --pyiqa"""


def facts(*, pyiqa: bool) -> dict[str, dict[str, Any]]:
    """What is known of each reward, and whether it works here, without loading any.

    Args:
        pyiqa: list pyiqa's metrics instead of the catalogue.
    """
    entries = PYIQA if pyiqa else CATALOG
    here = rewards_here(entries)
    rows = {name: entry._asdict() for name, entry in entries.items()}
    for name, row in rows.items():
        del row["build"]
        found = here[name]
        row |= {"works_here": found.state != "missing", "state": found.state, "detail": found.detail, "fix": found.fix}
    return rows


def lines(rows: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """A header and a line per reward, in columns."""
    cells: list[tuple[str, ...]] = [COLUMNS]
    for name, row in rows.items():
        low, high = row["usual"]
        missing = f"[{row['extra'] or 'core'}]" if row["fix"] else row["detail"]
        cells.append((
            name,
            {"ok": "yes", "note": "download"}.get(row["state"], missing),
            "refs" if row["needs_references"] else "-",
            "grad" if row["differentiable"] else "-",
            f"{low:g}..{high:g}",
            "-" if row["higher_is_better"] else "negated",
            row["summary"],
            row["licence"],
        ))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for texts in cells:
        yield "  ".join(f"{text:{width}}" for text, width in zip(texts, widths, strict=True)).rstrip()
