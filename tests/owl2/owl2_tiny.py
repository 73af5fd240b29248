"""A tiny seeded mPLUG-Owl2 and the images of the reference figures."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iqareward.rewards.owl2.network import Owl2, Owl2Config

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "owl2_tiny.json"

TINY = Owl2Config(
    vision_hidden=32,
    vision_ffn=64,
    vision_layers=3,
    vision_heads=4,
    abstractor_hidden=32,
    abstractor_ffn=48,
    abstractor_layers=2,
    abstractor_heads=4,
    hidden=64,
    ffn=96,
    layers=3,
    heads=4,
    kv_heads=4,
)

# 4 x 4 patches, so that tests that do not compare with the reference figures are fast
SMALL = Owl2Config(
    vision_hidden=16,
    vision_ffn=24,
    vision_layers=2,
    vision_heads=2,
    image_size=56,
    abstractor_hidden=16,
    abstractor_ffn=24,
    abstractor_layers=2,
    abstractor_heads=2,
    num_queries=4,
    hidden=32,
    ffn=48,
    layers=2,
    heads=4,
    kv_heads=2,
)


def seeded_state(model: Owl2) -> dict[str, Tensor]:
    """Weights that depend on nothing but their names and shapes; the recipe of the reference figures."""
    return {key: _seeded(key, value) for key, value in model.state_dict().items()}


def _seeded(key: str, value: Tensor) -> Tensor:
    if key.endswith("pos_embed"):
        return value
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    noise = np.random.default_rng(seed).standard_normal(tuple(value.shape)).astype(np.float32)
    if key.endswith("ffn_ln.weight") or (key.endswith("weight") and "norm" in key):
        return torch.from_numpy(1 + np.float32(0.2) * noise)
    return torch.from_numpy(noise * np.float32(0.3 if "lm_head" in key or "embed_tokens" in key else 0.12))


def seeded_model(config: Owl2Config) -> Owl2:
    """A model with seeded weights, frozen, in float32 on the CPU."""
    model = Owl2(config)
    model.load_state_dict(seeded_state(model))
    return model.requires_grad_(False).eval()


def reference_images() -> list[Tensor]:
    """The three images `[3, H, W]` in [0, 1] of the reference figures."""
    return [_reference_image(*size) for size in ((150, 101, 7), (101, 150, 8), (300, 300, 9))]


def _reference_image(width: int, height: int, seed: int) -> Tensor:
    generator = np.random.default_rng(seed)
    low = generator.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3)).astype(np.float32)
    blocks = np.kron(low, np.ones((8, 8, 1)))[:height, :width]
    image = np.clip(blocks + generator.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def golden() -> dict[str, Any]:
    """Outputs of the authors' code on the tiny seeded network; `tests/golden/README.md` says how they were made."""
    return json.loads(GOLDEN.read_text())
