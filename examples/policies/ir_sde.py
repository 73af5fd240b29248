"""IR-SDE: a stochastic differential equation in pixels that reverts to the degraded image.

The network predicts the noise, from the noisy image minus the degraded one and the degraded one.

References:
    Luo et al., Image Restoration with Mean-Reverting Stochastic Differential Equations, 2023,
    https://arxiv.org/abs/2301.11699
"""

import diffusers
import torch

from iqareward.diffusion import IRSDE, DiffusionPolicy


class IRSDEPolicy(DiffusionPolicy):
    """Mean reversion on images in [0, 1]."""

    num_steps, eta = 100, 1.0

    def __init__(self, unet):
        self.model = unet
        self.process = IRSDE(steps=100, max_sigma=10 / 255)

    def condition(self, batch, noise):
        return {"latents": batch.degraded}

    def anchor(self, condition):
        return condition["latents"]

    def encode(self, images, condition):
        return images

    def predict(self, latents, times, condition):
        degraded = condition["latents"]
        return self.model(torch.cat([latents - degraded, degraded], 1), times).sample

    def decode(self, latents, condition):
        return latents


def build(folder: str) -> IRSDEPolicy:
    """The policy of a `UNet2DModel` with 6 input channels that diffusers saved."""
    return IRSDEPolicy(diffusers.UNet2DModel.from_pretrained(folder))
