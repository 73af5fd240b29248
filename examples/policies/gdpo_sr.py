"""GDPO-SR, x4: restoration in one step from noised latents of the degraded image.

The noise is that of another timestep than the one that the network is told, so that results differ enough to learn
from and yet keep to the degraded image.

References:
    Yi et al., GDPO-SR: Group Direct Preference Optimization for One-Step Generative Image Super-Resolution, 2026,
    https://arxiv.org/abs/2603.16769
"""

import diffusers

from iqareward.diffusion import OneStepPolicy


def build(folder: str = "stabilityai/stable-diffusion-2-1-base") -> OneStepPolicy:
    """The policy of a Stable Diffusion pipeline, whose adapters train."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    noise = {"timestep": 999, "noise_timestep": 250}
    return OneStepPolicy.from_pipeline(pipeline, lora_rank=4, scale=4, colour_fix="adain", **noise)
