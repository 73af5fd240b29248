"""Tables of results in Markdown."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks._harness import newest
from benchmarks.gpu.targets import FORMULAS, QALIGN, SETTINGS, fastest_peer, finding
from benchmarks.gpu.targets import targets as gpu_promises

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


_COMPARES = {"ahiq": "ground truth", "lpips_vgg": "ground truth", "stlpips_vgg": "ground truth",
             "pieapp": "ground truth", "psnr": "ground truth", "ssim": "ground truth",
             "lpips_vgg_bicubic": "enlarged input", "mean of method": "method alone"}  # fmt: skip


def _interval(figure: Sequence[float | None]) -> str:
    return "" if figure[0] is None else "{:.2f} [{:.2f}, {:.2f}]".format(*figure)


def agreement_qualisr(document: Document) -> str:
    """Each metric against people on super-resolved images: over all, within each method, and pairs of one input."""
    rows = [row for row in document["rows"] if row["set"] == "qualisr"]
    within = {(row["within"], row["metric"]): row["spearman"][0] for row in rows}
    methods = [method for method in dict.fromkeys(row["within"] for row in rows) if method]
    cells: list[tuple[str, ...]] = []
    for row in rows:
        if not row["within"]:
            values = [within.get((method, row["metric"])) for method in methods]
            inside = ["" if value is None else f"{value:.2f}" for value in values]
            sees = _COMPARES.get(row["metric"], "image")
            pairs = _interval(row["pair_accuracy"])
            cells.append((f"`{row['metric']}`", sees, _interval(row["spearman"]), *inside, pairs))
    header = ("metric", "sees", "Spearman", *(f"within {method}" for method in methods), "pairs in groups of three")
    return table(header, cells, text_columns=2)


def agreement_noise(document: Document) -> str:
    """Each reward against people on white noise."""
    cells = [
        (f"`{row['metric']}`", _interval(row["spearman"]), _interval(row["pair_accuracy"]), str(row["score_ties"]))
        for row in document["rows"] if row["set"] == "white noise"
    ]  # fmt: skip
    return table(("reward", "Spearman", "pairs of one reference", "tied pairs"), cells)


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
        return sum(
            count
            for place, count in row["places"].items()
            if not any(file in place for file in ("_classical_peers", "bench_classical"))
        )

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


def classical_ratios(document: Document) -> str:
    """Ours against the fastest peer of the same definition, settings across."""
    rows = [row for row in document["rows"] if "ratio" in row]
    settings = list(dict.fromkeys((row["size"], row["batch"]) for row in rows))
    cells = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        found = {(row["size"], row["batch"]): row for row in rows if row["metric"] == metric}
        cells.append((f"`{metric}`", *(f"{found[key]['ratio']:.1f}x {found[key]['fastest_peer']}" for key in settings)))
    return table(("metric", *_titles(settings)), cells)


def _titles(settings: Sequence[tuple[int, int]]) -> list[str]:
    return [f"{size}² b{batch}" for size, batch in settings]


def classical_speeds(document: Document) -> str:
    """Images per second of every library, and its largest difference from ours."""
    rows = [row for row in document["rows"] if "images_per_second" in row]
    settings = list(dict.fromkeys((row["size"], row["batch"]) for row in rows))
    cells = []
    for metric, library in dict.fromkeys((row["metric"], row["library"]) for row in rows):
        here = [row for row in rows if (row["metric"], row["library"]) == (metric, library)]
        gaps = [row["max_difference"] for row in here if row["max_difference"] is not None]
        gap = f"{max(gaps):.0e}" if gaps and not library.startswith("iqareward") else ""
        label = library if here[0]["same"] else f"{library} (other definition)"
        found = {(row["size"], row["batch"]): f"{row['images_per_second']:.4g}" for row in here}
        cells.append((f"`{metric}`", label, *(found.get(setting, "too slow") for setting in settings), gap))
    return table(("metric", "library", *_titles(settings), "difference"), cells, text_columns=2)


def classical_peaks(document: Document) -> str:
    """Peak memory of one call."""
    rows = [row for row in document["rows"] if row.get("peak_mb") is not None]
    libraries = list(dict.fromkeys(row["library"] for row in rows))
    cells = []
    for metric in dict.fromkeys(row["metric"] for row in rows):
        found = {row["library"]: f"{row['peak_mb']:.0f}" for row in rows if row["metric"] == metric}
        cells.append((f"`{metric}`", *(found.get(library, "") for library in libraries)))
    return table(("metric", *libraries), cells)


def classical_busy(document: Document) -> str:
    """Images per second beside busy processes, by number of threads."""
    rows = document["rows"]
    numbers = sorted({row["threads"] for row in rows}, reverse=True)
    speed = {(row["metric"], row["library"], row["threads"]): row["images_per_second"] for row in rows}
    cells = [
        (f"`{metric}`", library, *(f"{speed[metric, library, number]:.3g}" for number in numbers))
        for metric, library in dict.fromkeys((row["metric"], row["library"]) for row in rows)
    ]
    return table(("metric", "library", *(f"threads: {number}" for number in numbers)), cells, text_columns=2)


def datasets(document: Document) -> str:
    """Ray Data against plain loops."""
    cells = [
        (f"{row['side']}², " + " + ".join(f"`{name}`" for name in row["rewards"]), number(row["loop"]["rate"]),
         number(row["ray"]["rate"]), f"{row['ratio']:.0%}",
         number(row["ray"]["startup"]), number(row["loop"]["startup"]))
        for row in document["rows"]
    ]  # fmt: skip
    header = ("JPEG files", "loop, images/s", "`score_dataset`", "ratio", "first shard after, s", "loop: start, s")
    return table(header, cells)


def cluster_failures(document: Document) -> str:
    """What clients got while something was done to a cluster of two nodes."""
    cells = [
        (row["scenario"], *(str(row[key]) for key in ("sent", "lost", "wrong")), number(row["longest_wait_s"]))
        for row in document["failures"]
        if "sent" in row
    ]
    return table(("event", "images sent", "lost", "wrong", "longest wait, s"), cells)


def cluster_rates(document: Document) -> str:
    """Images per second of one process and of one on each of two nodes."""
    cells = [
        (f"{row['reward'].replace('double, ', 'waits ')}, {row['side']}²", str(row["processes"]), str(row["fronts"]),
         number(row["images_per_s"]), "" if row["of_ideal"] is None else f"{row['of_ideal']:.0%}",
         number(row["client_cpu_ms_per_image"]))
        for row in document["rows"]
    ]  # fmt: skip
    return table(
        ("reward, side", "processes", "fronts", "images/s", "of the ideal", "client's CPU, ms per image"),
        cells,
    )


def datasets_cost(document: Document) -> str:
    """What numbers of images would take, predicted from measured rates."""
    gpu = newest("gpu/qalign")
    rates = [
        (f"{' + '.join(row['rewards'])}, {row['side']}², one core", row["ray"]["rate"] / row["processes"])
        for row in document["rows"]
    ]
    for mode in ("eager, images on the host", "`compiled=True`"):
        if row := finding(gpu, QALIGN[mode], 32):
            rates.append((f"qalign, {mode}, one {gpu['hardware'].split()[1]} (in process)", row["images_per_s"]))
    cells = [
        (name, number(rate), *(f"{_time(n / rate)}; {_time(n / rate / 64)}" for n in (1e6, 1e8, 1e9)))
        for name, rate in rates
    ]
    return table(("reward", "images/s", "10⁶ images: on one; on 64", "10⁸", "10⁹"), cells)


def _time(seconds: float) -> str:
    for unit, length in (("y", 365 * 86400), ("d", 86400), ("h", 3600)):
        if seconds >= length:
            return f"{number(seconds / length, 2)} {unit}"
    return f"{number(seconds / 60, 2)} min"


def gpu_qalign(document: Document) -> str:
    """Every mode and batch size of Q-Align."""
    found = [
        (mode, batch, finding(document, steps, batch))
        for mode, steps in QALIGN.items()
        for batch in ((1, 8, 32, 64) if "{}" in steps[0] else (4 if "protocol" in mode else 32,))
    ]
    return _speeds(found, ("share_of_ceiling", "first_call_s", "peak_gib"))


def gpu_vlm(document: Document) -> str:
    """Both models and the published protocol."""
    names = {"7b level": "Qwen2.5-VL-7B, levels", "7b rating": "Qwen2.5-VL-7B, expected rating",
             "qwen3-vl-2b level": "Qwen3-VL-2B, levels"}  # fmt: skip
    found = [
        (name, batch, finding(document, (f"vlm/{step} b{batch}",)))
        for step, name in names.items()
        for batch in (1, 8, 32)
    ]
    for step, tokens in (("published, 11 tokens, warm", 11), ("published, 150 tokens", 150)):
        if row := finding(document, (f"vlm/{step}",)):
            speed = {"images_per_s": row["images"] / row["seconds"], "wall_ms": 1e3 * row["seconds"]}
            found.append((f"Qwen2.5-VL-7B, published protocol, {tokens} tokens", row["images"], speed))
    return _speeds(found, ("peak_gib",))


def _speeds(found: list[tuple[str, int, Row]], others: tuple[str, ...]) -> str:
    columns = ("images_per_s", "wall_ms", *others)
    titles = {"images_per_s": "images per s", "wall_ms": "ms", "share_of_ceiling": "share of ceiling",
              "first_call_s": "first call, s", "peak_gib": "memory, GiB"}  # fmt: skip
    rows = [[mode, str(batch), *(number(row.get(key)) for key in columns)] for mode, batch, row in found if row]
    return table(("mode", "batch", *(titles[key] for key in columns)), rows)


def gpu_classical(document: Document) -> str:
    """Images per second of each formula, and in brackets how many times that is of the fastest peer."""

    def cell(name: str, setting: str) -> str:
        row = finding(document, (f"classical/{name} {setting}",))
        if not row:
            return ""
        speed, peer = 1e3 * int(setting.split(" b")[1]) / row["iqareward"], fastest_peer(row)
        ratio = peer[1] / row["iqareward"] if peer else 0.0
        shown = f"{ratio:.2g}" if ratio >= 1 else f"**{ratio:.2g}**"
        return number(float(f"{speed:.3g}")) + (f" ({shown} {peer[0]})" if peer else "")

    rows = [(f"`{name}`", *(cell(name, setting) for setting in SETTINGS)) for name in FORMULAS]
    return table(("metric", *(setting.replace(" ", "² ") for setting in SETTINGS)), rows)


def gpu_features(document: Document) -> str:
    """Time and memory of LPIPS and DISTS, and of gradients of the formulas."""
    rows = []
    for name in ("lpips alex", "lpips vgg", "dists", *(f"{name} gradient" for name in FORMULAS)):
        for batch in (32, 128):
            if row := finding(document, (f"classical/{name} 512 b{batch}",)):
                rows.append((f"`{name}`", str(batch), number(row["ms"]), number(row["peak_gib"])))
    return table(("512²", "batch", "ms", "memory, GiB"), rows)


def gpu_trainer(document: Document) -> str:
    """Seconds of an update of the reference loop, where they go, and its memory."""
    names = {"calibrate_s": "calibrating", "update_s": "updates", "collect_s": "one taken apart: restoring and scoring",
             "decode_s": "of which decoding", "reward_s": "of which the reward", "learn_s": "learning",
             "peak_gib": "memory at the peak, GiB"}  # fmt: skip
    whole, overlapped = (document["train"].get(f"sd1.5 controlnet{way}", {}) for way in ("", ", overlap"))
    rows = [
        (name, *(_listed(run.get(key)) for run in (whole, overlapped)))
        for key, name in names.items()
    ]  # fmt: skip
    return table(("seconds", "plain", "`overlap=True`"), rows)


def _listed(value: Any) -> str:
    return ", ".join(number(item) for item in (value if isinstance(value, list) else [value]))


def gpu_targets(document: Document) -> str:
    """Targets on one GPU; those of the formulas are the ratios of `gpu_classical`."""
    shown = tuple(f"{name} {setting}, times" for name in FORMULAS for setting in SETTINGS)
    return targets({"targets": [row for row in gpu_promises(document) if not row["name"].startswith(shown)]})
