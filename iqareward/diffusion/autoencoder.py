"""The frozen autoencoder of latent models, between pixels in [0, 1] and latents of unit size."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from iqareward.functional._chunks import rows_at_once


@dataclass(eq=False)
class Autoencoder:
    """A `diffusers.AutoencoderKL` with its scaling and shift, its weights frozen.

    It runs on as many images at a time as fit a budget of memory: 4 GiB, or an eighth of a smaller GPU.

    Args:
        vae: the autoencoder, e.g. `pipeline.vae`.
        checkpointed: decode under activation checkpointing when a gradient is wanted, for less memory: the activations
            of one part of the images are kept at a time.

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
        size = self._rows_at_once(images.shape[2:], images.device)
        return torch.cat([self._latents(part) for part in images.split(size)])

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` fp32, in [0, 1] up to overshoots."""
        wanted = torch.is_grad_enabled() and latents.requires_grad
        sides = [side * self.factor for side in latents.shape[2:]]
        parts = latents.split(self._rows_at_once(sides, latents.device, gradient=wanted))
        if self.checkpointed and wanted:
            pixels: list[Any] = [checkpoint(self._pixels, part, use_reentrant=False) for part in parts]
        else:
            pixels = [self._pixels(part) for part in parts]
        return torch.cat(pixels)

    def _latents(self, images: Tensor) -> Tensor:
        dtype = next(self.vae.parameters()).dtype
        latents = self.vae.encode((2 * images - 1).to(dtype)).latent_dist.mode()
        return (latents.float() - self.shift) * self.scale

    def _pixels(self, latents: Tensor) -> Tensor:
        latents = (latents / self.scale + self.shift).to(next(self.vae.parameters()).dtype)
        return (self.vae.decode(latents).sample.float() + 1) / 2

    def _rows_at_once(self, size: Sequence[int], device: torch.device, *, gradient: bool = False) -> int:
        """How many images of (height, width) to run on at a time."""
        config = self.vae.config
        # Of full size are maps as wide as the second block. Three of them live at once (and 30 GiB were measured for 64
        # images of 512x512, nearly four), or for a gradient 25 with the usual two layers in a block.
        maps = 9 * (config.layers_per_block + 1) + 1 if gradient else 4
        width = max(config.block_out_channels[:2]) * next(self.vae.parameters()).element_size()
        return rows_at_once(size, device, bytes_per_pixel=maps * width)
