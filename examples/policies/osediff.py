"""OSEDiff, x4: Stable Diffusion restores in one step; adapters of its UNet and of its encoder train.

References:
    Wu et al., One-Step Effective Diffusion Network for Real-World Image Super-Resolution, 2024,
    https://arxiv.org/abs/2406.08177
"""

import diffusers

from iqareward.diffusion import OneStepPolicy


def build(folder: str = "stabilityai/stable-diffusion-2-1-base") -> OneStepPolicy:
    """The policy of a Stable Diffusion pipeline; load your adapters into it."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    return OneStepPolicy.from_pipeline(pipeline, train="both", lora_rank=4, scale=4, colour_fix="adain")
