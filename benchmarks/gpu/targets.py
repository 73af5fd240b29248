"""What the project promises on one H100 or H200, beside what a run of `benchmarks/gpu` has measured."""

from collections.abc import Iterator, Mapping
from typing import Any

Results = Row = Mapping[str, Any]

# Steps by what they measure; where there are two, the second is the name that the runs of 26 November 2026 gave it.
QALIGN = {
    "eager": ("qalign/eager b{}",),
    "eager, mixed sizes": ("qalign/mixed sizes",),
    "eager, images on the host": ("qalign/host images",),
    "eager, quality and aesthetics": ("qalign/both tasks",),
    '`compiled="graph"`': ("qalign/graph b{}",),
    "`compiled=True`": ("compile/compiled b{}", "compile/whole model b{}"),
    '`quant="int8"`': ("qalign/int8",),
    "the authors' protocol, one image at a time": ("qalign/reference protocol",),
}
FORMULAS = ("psnr", "ssim", "ssim_rgb", "ms_ssim", "gmsd", "haarpsi", "piqe", "niqe", "brisque")
SETTINGS = ("256 b32", "512 b8", "512 b32", "1024 b8")


def finding(results: Results, steps: tuple[str, ...], batch: int | str = "") -> Row:
    """The finding of the first of these steps that was measured; empty if none was."""
    for step in steps:
        stage, _, key = step.format(batch).partition("/")
        found = results.get(stage, {}).get(key)
        if isinstance(found, Mapping) and "FAILED" not in found:
            return found
    return {}


def fastest_peer(row: Row) -> tuple[str, float] | None:
    """The library with the same definition that took least, and its milliseconds."""
    same = [key.removesuffix(" gap") for key in row if key.endswith(" gap")]
    return min(((name, row[name]) for name in same), key=lambda pair: pair[1], default=None)


def targets(results: Results) -> list[dict[str, Any]]:
    """One row for each promise that the results say something about: `name`, `value`, `target`, `better`, `ok`."""
    rows = []
    for name, value, bound, better in _measured(results):
        ok = value >= bound if better == "higher" else value <= bound
        rows.append({"name": name, "value": round(value, 3), "target": bound, "better": better, "ok": ok})
    return rows


def _measured(results: Results) -> Iterator[tuple[str, float, float, str]]:
    """Name, value, bound, and which is better."""
    tests = results.get("tests", {}).get("as they are")
    if isinstance(tests, Mapping) and "failed" in tests:
        yield "GPU tests that failed", len(tests["failed"]), 0, "lower"
        yield "GPU tests, all of them had their turn", float(tests["exit"] >= 0), 1, "higher"
    alike = [found for found in results.get("parity", {}).values() if isinstance(found, dict) and "nan_alike" in found]
    if alike:
        wrong = sum(not (found["device_kept"] and found["nan_alike"] and found["repeatable"]) for found in alike)
        yield "rewards with another device or NaN than on the CPU, or not repeatable", wrong, 0, "lower"
    for stage in ("qalign", "classical", "vlm", "compile"):
        if (places := _places_of_waits(results.get(stage, {}))) is not None:
            yield f"places where a warm call waits, {stage}", places, 0, "lower"
    yield from _qalign(results)
    yield from _vlm(results)
    for name in ("dists", "lpips vgg"):
        if (peak := finding(results, (f"classical/{name} 512 b128",)).get("peak_gib")) is not None:
            yield f"{name}, 128 images of 512x512, peak GiB", peak, 8, "lower"
    slower, counted = 0, 0
    for setting in SETTINGS:
        for name in FORMULAS:
            row = finding(results, (f"classical/{name} {setting}",))
            if peer := fastest_peer(row):
                yield f"{name} {setting}, times {peer[0]}", peer[1] / row["iqareward"], 1, "higher"
                counted, slower = counted + 1, slower + (row.get("reward", 0) > peer[1])
    if counted:
        yield "metrics slower than the fastest library, with the checks of a reward", slower, 0, "lower"


def _qalign(results: Results) -> Iterator[tuple[str, float, float, str]]:
    modes = ("eager", '`compiled="graph"`', "`compiled=True`")
    batch, single = ([finding(results, QALIGN[mode], size) for mode in modes] for size in (32, 1))
    theirs = finding(results, QALIGN["the authors' protocol, one image at a time"])
    if best := max((found.get("images_per_s", 0.0) for found in batch), default=0.0):
        yield "Q-Align, batch 32, images per second", best, 270, "higher"
        if theirs:
            yield "Q-Align, batch 32, times the authors' protocol", best / theirs["images_per_s"], 8, "higher"
        if shares := [found["share_of_ceiling"] for found in batch if found.get("share_of_ceiling")]:
            yield "Q-Align, batch 32, share of the bf16 ceiling", max(shares), 0.6, "higher"
    if times := [found["wall_ms"] for found in single if "wall_ms" in found]:
        yield "Q-Align, one image, ms", min(times), 12, "lower"


def _vlm(results: Results) -> Iterator[tuple[str, float, float, str]]:
    rating = finding(results, ("vlm/7b rating b8",))
    for step, tokens in (("vlm/published, 11 tokens, warm", 11), ("vlm/published, 150 tokens", 150)):
        if rating and (theirs := finding(results, (step,))):
            gain = rating["images_per_s"] * theirs["seconds"] / theirs["images"]
            yield f"Qwen2.5-VL-7B, rating, batch 8, times {tokens} tokens of the published protocol", gain, 5, "higher"


def _places_of_waits(stage: Mapping[str, Any]) -> int | None:
    found = [value["waits"] for value in stage.values() if isinstance(value, dict) and "waits" in value]
    found += [value for key, value in stage.items() if key.endswith("waits") and isinstance(value, list)]
    return sum(len(places) for places in found) if found else None
