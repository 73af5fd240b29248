"""The tables of a result of `bench_classical`."""

from typing import Any


def ratios(document: dict[str, Any]) -> str:
    """Ours against the fastest peer of the same definition, settings across."""
    rows = [row for row in document["rows"] if "ratio" in row]
    settings = list(dict.fromkeys((row["size"], row["batch"]) for row in rows))
    lines = ["| metric | " + " | ".join(f"{size}² b{batch}" for size, batch in settings) + " |"]
    lines.append("|---|" + "--:|" * len(settings))
    for metric in dict.fromkeys(row["metric"] for row in rows):
        cells = {(row["size"], row["batch"]): row for row in rows if row["metric"] == metric}
        values = [f"{cells[key]['ratio']:.1f}x {cells[key]['fastest_peer']}" for key in settings]
        lines.append(f"| `{metric}` | " + " | ".join(values) + " |")
    return "\n".join(lines)


def speeds(document: dict[str, Any]) -> str:
    """Images per second of every library, and its largest difference from ours."""
    rows = [row for row in document["rows"] if "images_per_second" in row]
    settings = list(dict.fromkeys((row["size"], row["batch"]) for row in rows))
    lines = ["| metric | library | " + " | ".join(f"{size}² b{batch}" for size, batch in settings) + " | difference |"]
    lines.append("|---|---|" + "--:|" * (len(settings) + 1))
    for metric, library in dict.fromkeys((row["metric"], row["library"]) for row in rows):
        cells = [row for row in rows if (row["metric"], row["library"]) == (metric, library)]
        gaps = [row["max_difference"] for row in cells if row["max_difference"] is not None]
        gap = f"{max(gaps):.0e}" if gaps and not library.startswith("iqareward") else ""
        label = library if cells[0]["same"] else f"{library} (other definition)"
        found = {(row["size"], row["batch"]): f"{row['images_per_second']:.4g}" for row in cells}
        values = " | ".join(found.get(setting, "too slow") for setting in settings)
        lines.append(f"| `{metric}` | {label} | {values} | {gap} |")
    return "\n".join(lines)


def peaks(document: dict[str, Any]) -> str:
    """Peak memory of one call."""
    rows = [row for row in document["rows"] if row.get("peak_mb") is not None]
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    lines = ["| metric | " + " | ".join(libraries) + " |", "|---|" + "--:|" * len(libraries)]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        cells = {row["library"]: f"{row['peak_mb']:.0f}" for row in rows if row["metric"] == metric}
        lines.append(f"| `{metric}` | " + " | ".join(cells.get(library, "") for library in libraries) + " |")
    return "\n".join(lines)


def busy(document: dict[str, Any]) -> str:
    """Images per second beside busy processes, by number of threads."""
    rows = document["rows"]
    numbers = sorted({row["threads"] for row in rows}, reverse=True)
    lines = ["| metric | library | " + " | ".join(f"threads: {number}" for number in numbers) + " |"]
    lines.append("|---|---|" + "--:|" * len(numbers))
    for metric, library in dict.fromkeys((row["metric"], row["library"]) for row in rows):
        cells = {row["threads"]: row["images_per_second"] for row in rows
                 if (row["metric"], row["library"]) == (metric, library)}  # fmt: skip
        lines.append(f"| `{metric}` | {library} | " + " | ".join(f"{cells[number]:.3g}" for number in numbers) + " |")
    return "\n".join(lines)
