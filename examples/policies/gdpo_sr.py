"""GDPO-SR, x4: restoration in one step from noised latents of the degraded image.

The noise is that of another timestep than the one that the network is told, so that results differ enough to learn
from and yet keep to the degraded image.

References:
    Yi et al., GDPO-SR: Group Direct Preference Optimization for One-Step Generative Image Super-Resolution, 2026,
    https://arxiv.org/abs/2603.16769
"""

from iqareward.diffusion import OneStepPolicy, add_lora


def build(folder: str = "stabilityai/stable-diffusion-2-1-base", rank: int = 4) -> OneStepPolicy:
    """The policy of a Stable Diffusion pipeline, whose adapters train."""
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.unet = add_lora(pipeline.unet, rank=rank, targets=["to_q", "to_k", "to_v", "to_out.0"])
    return OneStepPolicy.from_pipeline(pipeline, scale=4, timestep=999, noise_timestep=250, colour_fix="adain")
