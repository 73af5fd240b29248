"""Stable Diffusion 3 with a ControlNet that sees the degraded image; captions and guidance."""

import diffusers

from iqareward.diffusion import SD3ControlNetPolicy


def build(folder: str, controlnet: str) -> SD3ControlNetPolicy:
    """The policy of a pipeline and of a ControlNet, which trains."""
    network = diffusers.SD3ControlNetModel.from_pretrained(controlnet)
    pipeline = diffusers.StableDiffusion3ControlNetPipeline.from_pretrained(folder, controlnet=network)
    return SD3ControlNetPolicy.from_pipeline(pipeline, negative_prompt="blurry, noisy", guidance_scale=7.0)
