"""The frozen autoencoder of latent models, between pixels in [0, 1] and latents of unit size."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(eq=False)
class Autoencoder:
    """A `diffusers.AutoencoderKL` with its scaling and shift, its weights frozen.

    Args:
        vae: the autoencoder, e.g. `pipeline.vae`.
        checkpointed: decode under activation checkpointing when a gradient is wanted, for less memory.

    Example:
        >>> import diffusers
        >>> vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
        >>> autoencoder = Autoencoder(vae)
        >>> autoencoder.encode(torch.rand(1, 3, 16, 16)).shape
        torch.Size([1, 4, 16, 16])
    """

    vae: Any
    checkpointed: bool = True

    def __post_init__(self) -> None:
        self.vae.requires_grad_(False).eval()
        config = self.vae.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels, self.scale = config.latent_channels, config.scaling_factor
        self.shift = getattr(config, "shift_factor", None) or 0.0

    def latent_shape(self, images: Tensor) -> tuple[int, ...]:
        """Shape of one row of latents.

        Raises:
            ValueError: a side is no multiple of the autoencoder's factor.
        """
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"Autoencoder expected images whose sides are multiples of {self.factor}, got {height}x{width}. "
                "Crop or pad them."
            )
        return (self.channels, height // self.factor, width // self.factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` fp32 of images `[B, 3, H, W]` in [0, 1]; the mean, without sampling."""
        dtype = next(self.vae.parameters()).dtype
        latents = self.vae.encode((2 * images - 1).to(dtype)).latent_dist.mode()
        return (latents.float() - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` fp32, in [0, 1] up to overshoots."""
        latents = (latents / self.scale + self.shift).to(next(self.vae.parameters()).dtype)
        if self.checkpointed and latents.requires_grad:
            pixels = checkpoint(self._pixels, latents, use_reentrant=False)
            assert isinstance(pixels, Tensor), "checkpoint returns what the function returns"
        else:
            pixels = self._pixels(latents)
        return (pixels.float() + 1) / 2

    def _pixels(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents).sample
