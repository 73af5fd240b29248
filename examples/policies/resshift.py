"""ResShift, x4: a diffusion that shifts the residual between the degraded image and the restored one.

Its latents are four times smaller than the restored image, so they have the size of the degraded one, which the network
sees beside them; the network predicts the clean latents.

References:
    Yue, Wang, Loy, ResShift: Efficient Diffusion Model for Image Super-resolution by Residual Shifting, 2023,
    https://arxiv.org/abs/2307.12348
"""

import diffusers
import torch
from torch.nn.functional import interpolate

from iqareward.diffusion import Autoencoder, DiffusionPolicy, ResShift


class ResShiftPolicy(DiffusionPolicy):
    """Residual shifting in the latents of an autoencoder with factor 4."""

    num_steps, eta = 15, 1.0

    def __init__(self, unet, autoencoder):
        self.model, self.autoencoder = unet, autoencoder
        self.process = ResShift(steps=15, kappa=2.0)

    def condition(self, batch, noise):
        enlarged = interpolate(batch.degraded, scale_factor=4, mode="bicubic").clamp(0, 1)
        return {"degraded": 2 * batch.degraded - 1, "latents": self.autoencoder.encode(enlarged)}

    def anchor(self, condition):
        return condition["latents"]

    def encode(self, images, condition):
        return self.autoencoder.encode(images)

    def predict(self, latents, times, condition):
        latents = self.process.scale_input(latents, times)
        return self.model(torch.cat([latents, condition["degraded"]], 1), times).sample

    def decode(self, latents, condition):
        return self.autoencoder.decode(latents)


def build(folder: str) -> ResShiftPolicy:
    """The policy of a folder with `unet/` and `vqvae/` as diffusers saves them."""
    unet = diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet")
    vqvae = diffusers.VQModel.from_pretrained(folder, subfolder="vqvae")
    return ResShiftPolicy(unet, Autoencoder(vqvae))
