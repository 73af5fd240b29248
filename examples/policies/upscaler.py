"""Stable Diffusion's upscaler, x4, with adapters: it sees the degraded image with noise of a level that it is told."""

import diffusers

from iqareward.diffusion import UpscalePolicy


def build(folder: str = "stabilityai/stable-diffusion-x4-upscaler") -> UpscalePolicy:
    """The policy of a `StableDiffusionUpscalePipeline`."""
    pipeline = diffusers.StableDiffusionUpscalePipeline.from_pretrained(folder)
    return UpscalePolicy.from_pipeline(pipeline, lora_rank=16, guidance_scale=9.0, noise_level=20, num_steps=75)
