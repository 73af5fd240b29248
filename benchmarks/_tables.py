"""Tables of results in Markdown; the classical ones are in `_classical_tables`."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks._results import newest
from iqareward.rewards.catalog import CATALOG, load
from iqareward.types import Reward

Document = dict[str, Any]
Row = dict[str, Any]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """A Markdown table; the first columns are text, the others numbers."""
    rule = ["---"] * text_columns + ["--:"] * (len(header) - text_columns)
    lines = [header, rule, *rows]
    return "\n".join(["| " + " | ".join(lines[0]) + " |", "|" + "|".join(rule) + "|"]
                     + ["| " + " | ".join(cells) + " |" for cells in lines[2:]])  # fmt: skip


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits; empty where there is nothing."""
    if value is None or value != value:
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def caption(document: Document, command: str) -> str:
    """Where the figures come from."""
    return f"`{command}`, {document['hardware']}, {document['date'][:10]}, commit {document['commit']}."


def overhead(document: Document) -> str:
    """Microseconds per call at the largest number of rows."""
    most = max(row["rows"] for row in document["rows"])
    cells = [
        (row["call"], f"{row['microseconds']:.0f}", f"{row['median']:.0f}")
        for row in document["rows"]
        if row["rows"] == most
    ]
    return table((f"call, {most} rows", "best, µs", "median, µs"), cells)


def correlation(document: Document) -> str:
    """Mean correlation with damage per reward and kind of damage."""
    rows = [row for row in document["rows"] if row["set"] == "photographs"]
    kinds = [key for key in rows[0] if key not in ("set", "reward", "spearman", "above_original", "damaged")]
    cells = [
        (f"`{row['reward']}`", *(f"{row[key]:.2f}" for key in ("spearman", *kinds)), f"{row['above_original']:.0%}")
        for row in rows
    ]
    return table(("reward", "all", *kinds, "damaged above original"), cells)


def light_noise(document: Document) -> str:
    """On how many photographs light noise raises a score without a reference, and the mean change."""
    rows = [row for row in document["rows"] if row["set"] == "light noise"]
    cells = [
        (f"`{row['reward']}`", *(f"{count} of {row['images']} ({gain:+.2f})"
                                 for count, gain in zip(row["raised"], row["gain"], strict=True)))
        for row in rows
    ]  # fmt: skip
    return table(("reward", *(f"{sigma}/255" for sigma in rows[0]["sigma"])), cells)


def round_trip(document: Document) -> str:
    """How many photographs a reward prefers after a latent autoencoder, and the mean change."""
    cells = [
        (f"`{row['reward']}`", f"{row['raised']} of {row['images']}", f"{row['gain']:+.2f}")
        for row in document["rows"] if row["set"] == "round trip"
    ]  # fmt: skip
    return table(("reward", "prefers the round trip", "mean change"), cells)


def jpeg(document: Document) -> str:
    """Kendall's tau and mean shift of every reward after each transport."""
    rows = {(row["reward"], row["transport"]): row for row in document["rows"]}
    rewards, transports = (list(dict.fromkeys(key[place] for key in rows)) for place in (0, 1))
    cells = [
        (f"`{reward}`", *(f"{rows[reward, way]['tau']:.2f} ({rows[reward, way]['shift']:+.2f})" for way in transports))
        for reward in rewards
    ]
    return table(("reward", *(way.replace("jpeg", "JPEG").replace("png", "PNG") for way in transports)), cells)


def preprocessing(document: Document) -> str:
    """Pixel differences of every way, and what they do to the order and height of two judges' scores."""
    cells = [
        (row["way"], f"{row['mean']:.3f}", f"{row['largest']:.0f}",
         *(f"{row[f'{judge}_tau']:.2f} ({row[f'{judge}_shift']:+.2f})" for judge in ("piqe", "niqe")))
        for row in document["rows"]
    ]  # fmt: skip
    return table(("pixels made by", "mean", "largest", "PIQE", "NIQE"), cells)


def latency(document: Document) -> str:
    """Every setting of every reward."""
    cells = []
    for row in document["rows"]:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}x {row['fastest_peer']}"
        figures = (number(row[key]) for key in ("images_per_second", "p50_ms", "p95_ms", "peak_mb"))
        cells.append((f"`{row['reward']}`", f"{row['size']}² b{row['batch']}", *figures, ratio))
    return table(("reward", "setting", "images/s", "p50 ms", "p95 ms", "peak MB", "against"), cells, text_columns=2)


def meter(document: Document) -> str:
    """What a warm call costs on a GPU by the meter, at an earlier commit and now where that differs."""
    earlier = {(row["name"], row["mode"], row["batch"]): row for row in newest("meter-before")["rows"]}

    def waits(row: Row) -> int:
        """Without those that the benchmark adds to a peer: it makes the weights of luma for it."""
        return sum(count for place, count in row["places"].items() if "_classical_peers" not in place)

    columns: list[Callable[[Row], str]] = [
        lambda row: f"{row['kernels']:,}",
        lambda row: number(row["gigabytes"]),
        lambda row: str(waits(row)),
        lambda row: number(row["peak_gib"], 2),
        lambda row: number(row["device_ms"]),
        lambda row: number(row["predicted_ms"]),
        lambda row: number(row["images_per_s"]),
    ]

    def both(row: Row, column: Callable[[Row], str]) -> str:
        before = earlier.get((row["name"], row["mode"], row["batch"]), row)
        old, new = ("" if "error" in found else column(found) for found in (before, row))
        return new if old == new else f"{old} → {new}"

    cells = [
        (row["name"], row["mode"], str(row["batch"]), *(both(row, column) for column in columns))
        for row in document["rows"]
    ]
    header = ("metric or network", "", "batch", "kernels", "GB", "waits", "peak GiB", "kernels, ms", "ms", "images/s")
    return table(header, cells, text_columns=2)


def targets(document: Document) -> str:
    """What was promised, what was found."""
    cells = [
        (
            entry["name"],
            f"{entry['value']:g}",
            f"{'≥' if entry['better'] == 'higher' else '≤'} {entry['target']:g}",
            "yes" if entry["ok"] else "**no**",
        )
        for entry in document["targets"]
    ]
    return table(("target", "measured", "bound", "reached"), cells)


def plain(*columns: str, text_columns: int = 1) -> Callable[[Document], str]:
    """A table of these columns of the rows, for results whose rows are ready to be read."""

    def build(document: Document) -> str:
        rows = [[_cell(row.get(column)) for column in columns] for row in document["rows"]]
        return table([column.replace("_", " ") for column in columns], rows, text_columns=text_columns)

    return build


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value)


qalign = plain("mode", "batch", "images_per_s", "cpu_s_per_image", "p50_ms", "share_of_ceiling")
vlm = plain("mode", "batch", "images_per_s", "p50_ms", "share_of_ceiling")
batching = plain("reward", "calling", "images_per_s", "share", "images_per_batch", text_columns=2)
serving = plain("arm", "concurrency", "images_per_s", "p50_ms", "p95_ms", "p99_ms", "images_per_batch")

requests = plain(
    "side", "concurrency", "requests_per_s", "p50_ms", "front_ms", "reward_ms", "ray_ms", "client_ms", text_columns=2
)


def rewards(speeds: Document) -> str:
    """The catalogue with what was measured: speed of a call at 256² batch 8 and correlation with damage."""
    ranks = {row["reward"]: row["spearman"] for row in newest("correlation")["rows"] if row["set"] == "photographs"}
    speed = {
        row["reward"]: row["images_per_second"] for row in speeds["rows"] if (row["size"], row["batch"]) == (256, 8)
    }
    cells = []
    for name, entry in CATALOG.items():
        needs = ", ".join(
            what for what, flag in (("reference", entry.needs_references), ("weights", entry.weights)) if flag
        )
        extra, graph = f"`{entry.extra}`" if entry.extra else "", "yes" if entry.differentiable else ""
        rank = f"{ranks[name]:.2f}" if name in ranks else ""
        cells.append(
            (f"`{name}`", needs, _range(load(name)), graph, entry.licence, extra, number(speed.get(name)), rank)
        )
    header = ("name", "needs", "range", "gradient", "licence", "extra", "images/s", "correlation")
    return table(header, cells, text_columns=6)


def _range(reward: Reward) -> str:
    low, high = reward.bounds
    if low is None:
        return "" if high is None else f"≤ {high:g}"
    return f"≥ {low:g}" if high is None else f"{low:g} to {high:g}"
