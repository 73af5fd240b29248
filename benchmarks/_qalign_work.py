"""How much work one image is, how fast this device can work, and how long a call takes."""

import time
from collections.abc import Callable

import torch

from iqareward.rewards.owl2.network import Owl2Config
from iqareward.rewards.owl2.preprocess import PROMPTS


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
