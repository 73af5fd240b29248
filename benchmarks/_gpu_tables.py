"""The tables of a run of `benchmarks/gpu`."""

from typing import Any

from benchmarks._gpu_targets import FORMULAS, QALIGN, SETTINGS, Row, fastest_peer, finding, targets
from benchmarks._tables import number, table
from benchmarks._tables import targets as target_table

Document = dict[str, Any]


def qalign(document: Document) -> str:
    """Every mode and batch size of Q-Align."""
    found = [
        (mode, batch, finding(document, steps, batch))
        for mode, steps in QALIGN.items()
        for batch in ((1, 8, 32, 64) if "{}" in steps[0] else (4 if "protocol" in mode else 32,))
    ]
    return _speeds(found, ("share_of_ceiling", "first_call_s", "peak_gib"))


def vlm(document: Document) -> str:
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


def classical(document: Document) -> str:
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


def features(document: Document) -> str:
    """Time and memory of LPIPS and DISTS, and of gradients of the formulas."""
    rows = []
    for name in ("lpips alex", "lpips vgg", "dists", *(f"{name} gradient" for name in FORMULAS)):
        for batch in (32, 128):
            if row := finding(document, (f"classical/{name} 512 b{batch}",)):
                rows.append((f"`{name}`", str(batch), number(row["ms"]), number(row["peak_gib"])))
    return table(("512²", "batch", "ms", "memory, GiB"), rows)


def trainer(document: Document) -> str:
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


def promises(document: Document) -> str:
    """What was promised for one GPU, and what was measured; a missed one is marked."""
    return target_table({"targets": targets(document)})
