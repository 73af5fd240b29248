"""DiffBIR: a network removes degradations, then Stable Diffusion with a ControlNet adds detail.

The ControlNet sees what the first network restored, and the result takes its colours. Inputs may have captions.

References:
    Lin et al., DiffBIR: Towards Blind Image Restoration with Generative Diffusion Prior, 2023,
    https://arxiv.org/abs/2308.15070
"""

import diffusers
import torch

from iqareward.diffusion import ControlNetPolicy, FeedForwardPolicy

PROMPTS = {
    "prompt": "a clean, sharp photograph, high quality",
    "negative_prompt": "blurry, dotted, noise, raster lines, unclear, low resolution, over-smoothed",
}


class DiffBIR(ControlNetPolicy):
    """A ControlNet policy on images that a feed-forward network has cleaned."""

    def __init__(self, *, cleaner, **options):
        super().__init__(**options)
        self.cleaner = cleaner

    def condition(self, batch, noise):
        condition = super().condition(batch, noise)
        with torch.no_grad():
            return condition | {"degraded": self.cleaner.restore(condition["degraded"]).clamp(0, 1)}


def build(folder: str, cleaner: str) -> DiffBIR:
    """The policy of a `StableDiffusionControlNetPipeline` and of a checkpoint of SwinIR or the like."""
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(folder)
    network = FeedForwardPolicy.from_checkpoint(cleaner)
    network.model.requires_grad_(False).eval()
    options = {"guidance_scale": 4.0, "colour_fix": "wavelet", "num_steps": 50, "eta": 1.0}
    return DiffBIR.from_pipeline(pipeline, cleaner=network, **PROMPTS, **options)
