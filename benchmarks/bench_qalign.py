"""Speed of QAlignReward against the published protocol, on seeded random weights (speed does not depend on them).

    python -m benchmarks.bench_qalign --threads 1    # medium network, CPU
    python -m benchmarks.bench_qalign --size full    # 8.2 billion parameters, needs a GPU with 24 GB
    python -m benchmarks.bench_qalign --quick        # smoke run

Modes: `eager`, `graph` (CUDA graphs of it), `compiled` (layers, as CUDA graphs on a GPU), `shared` (quality and
aesthetics in one pass), `reference`. The reference is the protocol of the authors' scorer, rebuilt here from public
parts on the same network: one image at a time, padded and resized by Pillow on the CPU, the whole prompt, every row of
every layer, materialised attention, the full vocabulary at every position. It leaves out what would only slow it down
further: the authors' gather and scatter by modality, which waits for the device 256 times, and their splicing loop.

Modes of one batch size are timed in turn, the reference beside the largest; figures are medians. Each mode prints a
line when it is warm, and its row when its batch size is done, so that a run that is stopped loses little. Seconds of
CPU time are given beside wall time: on a CPU that others use too, only they can be compared, and only with
`--threads 1` (waiting threads spin). The last line is JSON.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks._harness import document, finish, target
from iqareward.rewards.owl2.checkpoints import quantize_decoder
from iqareward.rewards.owl2.network import Layout, Owl2, Owl2Config
from iqareward.rewards.owl2.preprocess import CLIP_MEAN, CLIP_STD, LEVEL_IDS, PAD_LEVELS, PROMPTS
from iqareward.rewards.owl2.rewards import QAlignReward

# In a process of its own: importing pyiqa's scorer replaces classes of transformers. Two patches make it run at all on
# transformers 5: a stand-in for the undeclared dependency icecream, and the method that transformers removed.
_PYIQA = """
import sys, time, types
try:
    import icecream
except ModuleNotFoundError:
    sys.modules["icecream"] = types.SimpleNamespace(ic=lambda *values: None)
import torch
from pyiqa.archs.q_align import visual_encoder
visual_encoder.MplugOwlVisualAbstractorModel.invert_attention_mask = (
    lambda self, mask: (1.0 - mask[:, None, None, :].to(self.dtype)) * torch.finfo(self.dtype).min
)
import pyiqa
metric = pyiqa.create_metric("qalign", device="cuda" if torch.cuda.is_available() else "cpu")
image = torch.rand(1, 3, 512, 512)
metric(image)
start = time.perf_counter()
for _ in range(3):
    metric(image)
print("images_per_s", 3 / (time.perf_counter() - start))
"""


def reference_scores(model: Owl2, images: list[Image.Image]) -> Tensor:
    """The published protocol: see the module's docstring."""
    weight = model.lm_head.weight
    prompt = PROMPTS["quality"]
    embed, scores = model.model.embed_tokens, []
    worth = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0], device=weight.device)
    for image in images:
        pixels = torch.from_numpy(pillow_pixels(image, model.config.image_size))[None].to(weight.device, weight.dtype)
        with sdpa_kernel(SDPBackend.MATH):
            rows = model.encode_images(pixels)
            before, after = (embed(torch.tensor(ids, device=weight.device))[:, None] for ids in prompt)
            start = before.shape[0]
            image_rows = (start, start + rows.shape[1])
            rows = torch.cat([before, rows.transpose(0, 1), after])
            layout = Layout.build(model.config, rows, image=image_rows, past=0)
            for layer in model.model.layers:
                rows = layer(rows, layout)
        logits = model.lm_head(model.model.norm(rows))[-1][:, LEVEL_IDS]
        scores.append(logits.float().softmax(-1) @ worth)
    return torch.cat(scores)


def pillow_pixels(image: Image.Image, size: int) -> np.ndarray:
    """Pad with the mean colour, resize, normalise, on the CPU."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(level) for level in PAD_LEVELS))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    levels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    scaled = (levels / 255 - np.array(CLIP_MEAN, np.float32)) / np.array(CLIP_STD, np.float32)
    return np.ascontiguousarray(scaled.transpose(2, 0, 1))


def pyiqa_status(timeout: float = 240.0) -> str:
    """Images per second of pyiqa's qalign with its own weights, or why it could not be measured."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PYIQA], capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not measured: no result within {timeout:.0f} s (it downloads 16 GB of weights first)"
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no message"]
        return f"not measured: {lines[-1][:200]}"
    return done.stdout.strip().splitlines()[-1]


def tflop_per_image(config: Owl2Config) -> float:
    """What ours computes for one image and one prompt, multiply and add counted apart, matmuls and attention only."""
    tokens, width = config.num_patches + 1, config.vision_hidden
    vision_layer = 2 * tokens * (4 * width**2 + 2 * width * config.vision_ffn) + 4 * tokens**2 * width
    patches = 2 * config.num_patches * 3 * config.patch_size**2 * width
    queries, keys = config.num_queries, config.num_queries + tokens
    abstractor_layer = 2 * width**2 * (2 * queries + 2 * keys) + 4 * queries * keys * width
    abstractor_layer += 6 * queries * width * config.abstractor_ffn
    prompt = PROMPTS["quality"]
    rows, hidden = queries + 1 + len(prompt.suffix), config.hidden
    kv_width = config.kv_heads * hidden // config.heads
    row_flops = 4 * hidden**2 + 6 * hidden * config.ffn
    decoder = (config.layers - 1) * rows * row_flops + row_flops + config.layers * rows * 4 * hidden * kv_width
    decoder += 4 * (config.layers - 1) * rows * (rows + len(prompt.prefix)) * hidden
    fully = config.vision_layers * vision_layer + patches + config.abstractor_layers * abstractor_layer + decoder
    return (fully + 2 * queries * width * hidden) / 1e12


def matmul_ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of one large square matmul, the best that this device does in this run."""
    side = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = min(timed(lambda: left @ right, device) for _ in range(20))
    return 2 * side**3 / best / 1e12


def timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including the wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


# A quarter of the width and of the depth, with the same head sizes, tokens and vocabulary: the parts keep their shares.
MEDIUM = Owl2Config(
    vision_hidden=256,
    vision_ffn=1024,
    vision_layers=6,
    vision_heads=4,
    abstractor_hidden=256,
    abstractor_ffn=704,
    abstractor_layers=2,
    abstractor_heads=4,
    hidden=1024,
    ffn=2752,
    layers=8,
    heads=8,
    kv_heads=8,
)
TINY = Owl2Config(
    **dict.fromkeys(("vision_hidden", "vision_ffn", "abstractor_hidden", "abstractor_ffn", "hidden", "ffn"), 64),
    **dict.fromkeys(("vision_layers", "abstractor_layers", "layers"), 2),
    **dict.fromkeys(("vision_heads", "abstractor_heads", "heads", "kv_heads"), 2),
)

STATIC = {"graph": "graph", "compiled": True}  # names of modes, and what `compiled` is for them
OURS = ("eager", *STATIC)
HALF = "bfloat16"  # on a CPU: not the default there, and only some processors have instructions for it


@dataclass
class Mode:
    """Something to time."""

    name: str
    batch: int
    call: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    first_s: float = 0.0
    peak_gib: float | None = None


def random_model(config: Owl2Config, device: torch.device, dtype: torch.dtype) -> Owl2:
    """Seeded random weights, made where they are used."""
    with torch.device("meta"):
        model = Owl2(config)
    model = model.to(dtype).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for key, value in model.state_dict().items():
        if "norm" in key and key.endswith("weight"):
            value.fill_(1.0)
        else:
            value.normal_(0.0, 0.02, generator=generator)
    return model


def build_modes(model: Owl2, batches: list[int], quick: bool, compiled: bool, half: Owl2 | None = None) -> list[Mode]:
    """Every mode at every batch size on 512x512 noise, one batch of mixed sizes, and `half`, a bfloat16 network."""
    device = model.lm_head.weight.device
    generator = torch.Generator().manual_seed(0)
    side = 96 if quick else 512
    images = torch.rand(max(batches), 3, side, side, generator=generator)
    pictures = [Image.fromarray((row.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for row in images]
    images = images.to(device)
    mixed = [torch.rand(3, side - 8 * (i % 4), side, device=device) for i in range(max(batches))]
    most = max(batches)
    static = {} if not compiled else STATIC if device.type == "cuda" else {"compiled": True}
    rewards = {"eager": QAlignReward(model, scale="mos", batch_size=most)}
    rewards["shared"] = QAlignReward(model, task=("quality", "aesthetics"), scale="mos", batch_size=most)
    for name, value in static.items():
        rewards[name] = QAlignReward(model, scale="mos", batch_size=most, compiled=value)
    modes = [
        Mode(name, batch, lambda r=reward, x=images[:batch]: r(x))
        for batch in batches
        for name, reward in rewards.items()
    ]
    modes.append(Mode("eager, mixed sizes", most, lambda r=rewards["eager"]: r(mixed)))
    if half is not None:
        for name, options in {HALF: {}, f"compiled, {HALF}": {"compiled": True}}.items():
            if compiled or not options:
                reward = QAlignReward(half, scale="mos", batch_size=most, **options)
                modes.append(Mode(name, most, lambda r=reward: r(images)))
    few = min(4, len(pictures))
    modes.append(Mode("reference", few, lambda: reference_scores(model, pictures[:few])))
    return modes


def measure(modes: list[Mode], device: torch.device, rounds: int) -> None:
    """Warm every mode up, then time them in turn, so that drift of the machine hits all of them."""
    for mode in modes:
        mode.first_s = timed(mode.call, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        once = timed(mode.call, device)
        if device.type == "cuda":
            mode.peak_gib = torch.cuda.max_memory_allocated() / 2**30
        print(f"{mode.name} b{mode.batch}: first call {mode.first_s:.1f} s, second {1e3 * once:.1f} ms", flush=True)
    for _ in range(rounds):
        for mode in modes:
            start = time.process_time()
            mode.seconds.append(timed(mode.call, device))
            mode.cpu_seconds.append(time.process_time() - start)


def table_row(mode: Mode, tflop: float, ceiling: float) -> dict[str, object]:
    """Work and share of the ceiling only where the work is that of `tflop_per_image`."""
    median = statistics.median(mode.seconds)
    speed = mode.batch / median
    plain = mode.name in (*OURS, "eager, mixed sizes")
    return {
        "mode": mode.name,
        "batch": mode.batch,
        "images_per_s": round(speed, 3),
        "cpu_s_per_image": round(statistics.median(mode.cpu_seconds) / mode.batch, 4),
        "p50_ms": round(1e3 * median, 2),
        "p95_ms": round(1e3 * float(np.quantile(mode.seconds, 0.95)), 2),
        "first_call_s": round(mode.first_s, 2),
        "peak_gib": None if mode.peak_gib is None else round(mode.peak_gib, 2),
        "tflop_per_s": round(speed * tflop, 3) if plain else None,
        "share_of_ceiling": round(speed * tflop / ceiling, 3) if plain else None,
    }


def targets(rows: list[dict], size: str) -> list[dict[str, object]]:
    """What was promised, and what was found."""
    reference = next(row for row in rows if row["mode"] == "reference")

    def ours(batch: int) -> list[dict]:
        return [row for row in rows if row["batch"] == batch and row["mode"] in OURS]

    def speed_up(batch: int) -> float:
        return max(row["images_per_s"] for row in ours(batch)) / reference["images_per_s"]

    name = "speed-up over the reference protocol"
    if size != "full":
        batch = max(row["batch"] for row in rows)
        cpu = reference["cpu_s_per_image"] / min(row["cpu_s_per_image"] for row in ours(batch))
        found = [
            target(f"{name}, wall time, batch {batch}", speed_up(batch), 3.0),
            target(f"{name}, CPU time, batch {batch}", cpu, 3.0),
        ]
        if half := [row["images_per_s"] for row in rows if HALF in str(row["mode"])]:
            found.append(target(f"{name}, {HALF}, batch {batch}", max(half) / reference["images_per_s"], 3.0))
        return found
    found = []
    if ours(32):
        share = max(row["share_of_ceiling"] for row in ours(32))
        found += [target(f"{name}, batch 32", speed_up(32), 8.0)]
        found += [target("share of the bf16 matmul ceiling, batch 32", share, 0.6)]
    if ours(1):
        found += [target("single image p50 in ms", min(row["p50_ms"] for row in ours(1)), 12.0, "lower")]
    return found


def int8_drift(config: Owl2Config, device: torch.device, dtype: torch.dtype) -> float:
    """Largest change of a score in [1, 5] when the decoder's weights are held in int8; random weights."""
    model = random_model(config, device, dtype)
    images = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(1)).to(device)
    exact = QAlignReward(model, scale="mos")(images)
    quantize_decoder(model)
    return (QAlignReward(model, scale="mos")(images) - exact).abs().max().item()


def half_drift(config: Owl2Config, device: torch.device) -> float:
    """Largest change of a score in [1, 5] by computing in bfloat16; random weights."""
    images = torch.rand(16, 3, 128, 128, generator=torch.Generator().manual_seed(1)).to(device)
    exact, half = (
        QAlignReward(random_model(config, device, torch.float32).to(dtype), scale="mos")(images)
        for dtype in (torch.float32, torch.bfloat16)
    )
    return (exact - half).abs().max().item()


def main() -> None:
    """Measure, print a table, and end with one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("medium", "full"), default="medium")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tiny network, one round")
    parser.add_argument("--output", type=Path, help="also write the JSON here")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    full = options.size == "full"
    config = TINY if options.quick else Owl2Config() if full else MEDIUM
    batches = [2] if options.quick else options.batches or ([1, 8, 32, 64] if full else [1, 16])
    with torch.no_grad():
        ceiling = matmul_ceiling(device, dtype)
        half = random_model(config, device, torch.bfloat16) if device.type == "cpu" and not options.quick else None
        modes = build_modes(random_model(config, device, dtype), batches, options.quick, not options.no_compile, half)
        rows = []
        for batch in batches:
            of_batch = [
                mode for mode in modes if (batch == max(batches) if mode.name == "reference" else mode.batch == batch)
            ]
            measure(of_batch, device, 1 if options.quick else options.rounds)
            for mode in of_batch:
                rows.append(table_row(mode, tflop_per_image(config), ceiling))
                print("  ".join(f"{key}={value}" for key, value in rows[-1].items()), flush=True)
        drift = None if full else int8_drift(config, device, dtype)
        rounding = None if half is None else half_drift(config, device)
    found = [] if options.quick else targets(rows, options.size)
    record = document("qalign", rows, found, ["pillow", "torchao", "pyiqa"], device) | {
        "size": "quick" if options.quick else options.size,
        "dtype": str(dtype),
        "matmul_ceiling_tflop_per_s": round(ceiling, 3),
        "tflop_per_image": round(tflop_per_image(config), 4),
        "int8_largest_score_change": drift,
        "bfloat16_largest_score_change": rounding,
        "pyiqa": "not measured: smoke run" if options.quick else pyiqa_status(),
    }
    finish(record, options.output)


if __name__ == "__main__":
    main()
