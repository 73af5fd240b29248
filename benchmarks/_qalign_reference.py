"""The protocols that `bench_qalign.py` compares with: the published one on our network, and pyiqa's scorer."""

import subprocess
import sys

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from iqareward.rewards.owl2.network import Layout, Owl2
from iqareward.rewards.owl2.preprocess import CLIP_MEAN, CLIP_STD, LEVEL_IDS, PAD_LEVELS, PROMPTS

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
