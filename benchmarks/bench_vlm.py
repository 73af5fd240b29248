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
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import ByteLevelBPETokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor, smart_resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from benchmarks._harness import document, finish, medians, target
from benchmarks.bench_qalign import matmul_ceiling
from iqareward.rewards.vlm.answers import DigitReadout
from iqareward.rewards.vlm.inputs import digit_ids, render, tokenize
from iqareward.rewards.vlm.presets import VISUALQUALITY_R1, ZERO_SHOT_LEVELS, RatingPreset, Ratings
from iqareward.rewards.vlm.rewards import LevelReward, RatingReward

_SPECIAL = {
    "image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
}  # fmt: skip
_OTHER_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{% for part in message.content %}{% if part.type == 'image' %}"
    "{% if add_vision_id %}Picture 1: {% endif %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# All texts that are tokenised, so that a learned vocabulary holds their words whole, as the real one does.
_TEXTS = [
    VISUALQUALITY_R1.question,
    VISUALQUALITY_R1.thinking_question,
    f"{ZERO_SHOT_LEVELS.question} {ZERO_SHOT_LEVELS.stem}",
    *(f"is{level}" for level in ZERO_SHOT_LEVELS.levels),
    "system You are a helpful assistant. user Picture assistant",
]


def random_pair(config: Any, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A frozen model in eval mode, made where it will run, and its processor."""
    processor = make_processor()
    for name, token in _SPECIAL.items():
        setattr(config, f"{name}_token_id", processor.tokenizer.convert_tokens_to_ids(token))
    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config = transformers.GenerationConfig(pad_token_id=processor.tokenizer.pad_token_id)
    return model.requires_grad_(False).eval(), processor


def make_processor() -> Any:
    """The family's image processor, and a byte-level tokenizer that was trained on the prompts."""
    learned = ByteLevelBPETokenizer()
    spaced = " ".join(" ".join(text) if text.isdigit() else text for text in _TEXTS)
    learned.train_from_iterator([spaced] * 4, vocab_size=4096, min_frequency=2, show_progress=False)
    vocabulary, merges = learned.get_vocab(), _merges(learned)
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": [*_SPECIAL.values(), *_OTHER_SPECIAL]})
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    tokenizer.padding_side = "left"
    images = Qwen2VLImageProcessor(patch_size=14, size={"shortest_edge": 4 * 28**2, "longest_edge": 16384 * 28**2})
    return transformers.Qwen2_5_VLProcessor(images, tokenizer, Qwen2VLVideoProcessor(), chat_template=_TEMPLATE)


def _merges(learned: ByteLevelBPETokenizer) -> Any:
    return [tuple(pair) for pair in json.loads(learned._tokenizer.to_str())["model"]["merges"]]


def qwen_config(*, share: int = 1, layers: int = 28, depth: int = 32, vocabulary: int = 152064) -> Any:
    """Qwen2.5-VL-7B's configuration, or one with `1 / share` of its widths and heads of the same size."""
    full = sorted({depth * quarter // 4 - 1 for quarter in range(1, 5)})
    text = {
        "hidden_size": 3584 // share, "intermediate_size": 18944 // share, "num_hidden_layers": layers,
        "num_attention_heads": 28 // share, "num_key_value_heads": max(1, 4 // share), "vocab_size": vocabulary,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 128000,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    vision = {
        "hidden_size": 1280 // share, "intermediate_size": 3420 // share // 4 * 4, "depth": depth,
        "num_heads": 16 // share, "out_hidden_size": 3584 // share, "patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": full,
    }  # fmt: skip
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def published_texts(model: Any, processor: Any, pictures: list[Image.Image], question: str, tokens: int) -> list[str]:
    """Generate answers of `tokens` tokens about a batch of images.

    Random weights would never end an answer, and a trained model ends it after a length of its own; so the length is
    set, and everything else is as in the authors' README.
    """
    factor = processor.image_processor.patch_size * processor.image_processor.merge_size
    resized = []
    for picture in pictures:
        height, width = smart_resize(picture.height, picture.width, factor)
        resized.append(picture.resize((width, height)))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, add_vision_id=True)
    inputs = processor(text=[text] * len(resized), images=resized, padding=True, return_tensors="pt").to(model.device)
    sampling = VISUALQUALITY_R1.sampling
    with torch.no_grad():
        written = model.generate(
            **inputs,
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            use_cache=True,
        )
    return processor.batch_decode(written[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def image_tokens(config: Any, side: int) -> int:
    """Tokens of a square image after the vision tower."""
    vision = config.vision_config
    factor = vision.patch_size * vision.spatial_merge_size
    return round(side / factor) ** 2


def tflop_per_image(config: Any, side: int, *, text_tokens: int, read: int) -> tuple[float, float, float]:
    """Multiply and add counted apart, matmuls and attention only: vision tower, decoder, head.

    Args:
        config: configuration of a Qwen2.5-VL.
        side: side of a square image in pixels.
        text_tokens: number of tokens of the prompt and of the branches of the answer.
        read: number of positions whose logits are computed.
    """
    vision, text = config.vision_config, config.text_config
    merged = image_tokens(config, side)
    merge = vision.spatial_merge_size**2
    patches, width = merged * merge, vision.hidden_size
    window = (vision.window_size // vision.patch_size) ** 2
    whole = len(vision.fullatt_block_indexes)
    layer = 2 * patches * (4 * width**2 + 3 * width * vision.intermediate_size)
    attention = 4 * patches * width * (whole * patches + (vision.depth - whole) * window)
    embed = 2 * patches * 2 * 3 * vision.patch_size**2 * width
    merger = 2 * merged * (merge * width) * (merge * width + vision.out_hidden_size)
    tower = vision.depth * layer + attention + embed + merger

    tokens, hidden = merged + text_tokens, text.hidden_size
    keys = hidden * text.num_key_value_heads // text.num_attention_heads
    row = 2 * (2 * hidden**2 + 2 * hidden * keys + 3 * hidden * text.intermediate_size)
    decoder = text.num_hidden_layers * (tokens * row + 2 * tokens**2 * hidden)  # half of the square is visible
    head = 2 * read * hidden * text.vocab_size
    return tower / 1e12, decoder / 1e12, head / 1e12


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
    parser.add_argument("--side", type=int, default=512, help="side of the square images")
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
