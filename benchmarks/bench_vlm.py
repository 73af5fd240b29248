"""Speed of the expected rating against the published protocol, on the same random weights.

    python -m benchmarks.bench_vlm --threads 2        # Qwen2.5-VL at a quarter of the width and depth, CPU
    python -m benchmarks.bench_vlm --size 7b          # Qwen2.5-VL-7B, needs a GPU with 24 GB
    python -m benchmarks.bench_vlm --quick            # smoke run

Ours: `expected` reads the rating to its second decimal in one forward pass, `expected, one decimal` to its first,
`levels` reads level words. Published: VisualQuality-R1's protocol on the same network, rebuilt from public parts, in
batches of the same size: Pillow, the processor, then sampling with a key-value cache. `answer only` writes the 11
tokens of `<answer>4.25</answer>` and the end; `thinking` writes `--thinking-tokens`, which is an assumption: the
authors' examples have some 100 to 300. Speed does not depend on the weights, but the length of an answer does.

All modes are timed in the same run, in turn; figures are medians. The last line is JSON.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks._harness import document, finish, medians, target
from benchmarks._qalign_work import matmul_ceiling
from benchmarks._vlm_models import qwen_config, random_pair
from benchmarks._vlm_published import published_texts
from benchmarks._vlm_work import tflop_per_image
from iqareward.rewards.vlm.answers import DigitReadout
from iqareward.rewards.vlm.inputs import digit_ids, render, tokenize
from iqareward.rewards.vlm.presets import VISUALQUALITY_R1, RatingPreset, Ratings
from iqareward.rewards.vlm.rewards import LevelReward, RatingReward

ANSWER_TOKENS = 11  # <answer>4.25</answer> is 10 tokens of Qwen's vocabulary, and the end
TARGET = 5.0
ONE_DECIMAL = replace(VISUALQUALITY_R1, ratings=Ratings(1, 5, decimals=1))
EXPECTED = {"expected": VISUALQUALITY_R1, "expected, one decimal": ONE_DECIMAL}

Call = Callable[[], object]


def build_calls(model: Any, processor: Any, images: torch.Tensor, thinking_tokens: int) -> dict[str, Call]:
    """Every mode on the same batch."""
    pictures = [Image.fromarray((row.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8)) for row in images]
    pair, batch = (model, processor), len(pictures)
    calls: dict[str, Call] = {}
    for name, preset in EXPECTED.items():
        reward = RatingReward(pair, preset, scale="mos", batch_size=batch)
        calls[name] = lambda reward=reward: reward(images)
    level = LevelReward(pair, batch_size=batch)
    calls["levels"] = lambda: level(images)
    preset = VISUALQUALITY_R1
    lengths = {"answer only": (preset.question, ANSWER_TOKENS), "thinking": (preset.thinking_question, thinking_tokens)}
    for name, (question, tokens) in lengths.items():
        calls[f"published, {name}"] = lambda q=question, t=tokens: published_texts(model, processor, pictures, q, t)
    return calls


def work(processor: Any, config: Any, preset: RatingPreset, side: int) -> float:
    """TFLOP of one expected rating."""
    text = render(processor, preset, preset.question, preset.answer_prefix)
    prompt = tokenize(processor, text)
    branches = DigitReadout(preset.ratings, *digit_ids(processor, text)).branches
    text_tokens = len(prompt.before) + len(prompt.after) + len(branches.ids)
    # the whole head once, for the first digit; the decimals read ten of its rows
    return sum(tflop_per_image(config, side, text_tokens=text_tokens, read=1))


def table_rows(
    seconds: dict[str, float], batch: int, tflop: dict[str, float], ceiling: float
) -> list[dict[str, object]]:
    """One row per mode; work and share of the ceiling where the work is known."""
    rows = []
    for mode, median in seconds.items():
        speed = batch / median
        known = mode in tflop
        rows.append(
            {
                "mode": mode,
                "batch": batch,
                "images_per_s": round(speed, 3),
                "p50_ms": round(1e3 * median, 2),
                "tflop_per_image": round(tflop[mode], 4) if known else None,
                "share_of_ceiling": round(speed * tflop[mode] / ceiling, 3) if known else None,
            }
        )
    return rows


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed-ups over the published protocol at every batch size."""
    speed = {(row["mode"], row["batch"]): row["images_per_s"] for row in rows}
    return [
        target(f"expected against {mode}, batch {batch}", speed["expected", batch] / images_per_s, TARGET)
        for (mode, batch), images_per_s in speed.items()
        if mode.startswith("published")
    ]


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "7b"), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--side", type=int, default=512, help="of the square images")
    parser.add_argument("--thinking-tokens", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="tiny network, small images, one round")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    full = options.size == "7b"
    side, thinking = (112, 20) if options.quick else (options.side, options.thinking_tokens)
    batches = [2] if options.quick else options.batches or ([1, 8, 32] if full else [1, 4])
    if options.quick:
        config = qwen_config(share=4, layers=2, depth=4, vocabulary=4864)
    else:
        config = qwen_config() if full else qwen_config(share=4, layers=7, depth=8, vocabulary=152064 // 4)
    model, processor = random_pair(config, device, dtype)
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(max(batches), 3, side, side, generator=generator).to(device)
    ceiling = matmul_ceiling(device, dtype)
    tflop = {name: work(processor, config, preset, side) for name, preset in EXPECTED.items()}
    rows = []
    for batch in batches:
        calls = build_calls(model, processor, images[:batch], thinking)
        seconds = medians(calls, rounds=1 if options.quick else options.rounds, slow=float("inf"), device=device)
        found = table_rows(seconds, batch, tflop, ceiling)
        for row in found:  # as they come, so that a run that is cut short has shown them
            print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        rows += found
    record = document("vlm", rows, [] if options.quick else targets(rows), ["transformers", "pillow"], device) | {
        "size": "quick" if options.quick else options.size,
        "side": side,
        "dtype": str(dtype),
        "thinking_tokens": thinking,
        "answer_tokens": ANSWER_TOKENS,
        "matmul_ceiling_tflop_per_s": round(ceiling, 3),
    }
    finish(record, options.output)


if __name__ == "__main__":
    main()
