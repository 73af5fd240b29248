"""The autoencoders of diffusers behind one interface, from images to the latents of a diffusion model and back."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iqareward.diffusion.policies.core import dtype_of, frozen
from iqareward.functional._chunks import constant, rows_at_once


class Autoencoder(nn.Module):
    """An autoencoder of diffusers whose latents are shifted and scaled as its diffusion models expect.

    It takes `AutoencoderKL`, `AutoencoderTiny`, `AutoencoderKLQwenImage`, `AutoencoderKLFlux2` (whose latents are 2x2
    patches), `AutoencoderDC` and `VQModel`. It runs on as many images at a time as fit a budget of memory: 4 GiB, or
    an eighth of a smaller GPU. A gradient is recorded where one is wanted.

    Args:
        vae: The autoencoder, e.g. `pipeline.vae`. Its weights are frozen here; to train some of them, unfreeze them or
            add adapters afterwards.
        checkpointed: Work under activation checkpointing when a gradient is wanted, for less memory: the activations
            of one part of the images are kept at a time.

    Raises:
        TypeError: The autoencoder is of another kind.

    Example:
        >>> import diffusers
        >>> vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
        >>> autoencoder = Autoencoder(vae)
        >>> autoencoder.encode(torch.rand(1, 3, 16, 16)).shape
        torch.Size([1, 4, 16, 16])
    """

    vae: Any

    def __init__(self, vae: Any, *, checkpointed: bool = True) -> None:
        super().__init__()
        config: Any = getattr(vae, "config", {})
        channels = config.get("vq_embed_dim") or config.get("latent_channels") or config.get("z_dim")
        if not channels or not hasattr(vae, "encode"):
            raise TypeError(
                "Autoencoder expected an AutoencoderKL, AutoencoderTiny, AutoencoderKLQwenImage, AutoencoderKLFlux2, "
                f"AutoencoderDC or VQModel, got {type(vae).__name__}. Write `encode` and `decode` of your own policy."
            )
        self.vae, self.checkpointed = frozen(vae), checkpointed
        widths = config.get("block_out_channels") or config.get("decoder_block_out_channels")
        widths = widths or [config.base_dim * factor for factor in config.dim_mult]
        layers = config.get("layers_per_block") or config.get("num_res_blocks")
        self._width, self._layers = max(widths[:2]), layers if isinstance(layers, int) else 3
        self._patch = 2 if hasattr(vae, "bn") else 1  # Flux2
        self._is_video = "temperal_downsample" in config  # diffusers spells it so; a picture is a video of one frame
        self.factor = self._patch * 2 ** (len(widths) - 1)
        self.channels = self._patch**2 * channels
        self._mean = tuple(config.get("latents_mean") or [config.get("shift_factor") or 0.0])
        scale = config.get("scaling_factor") or 1.0
        self._scale = tuple(scale / std for std in config.get("latents_std") or [1.0])

    def latent_shape(self, images: Tensor) -> tuple[int, ...]:
        """Shape of one row of latents; a ValueError if a side is not a multiple of the autoencoder's factor."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"Autoencoder expected images whose sides are multiples of {self.factor}, got {height}x{width}. "
                "Crop or pad them."
            )
        return (self.channels, height // self.factor, width // self.factor)

    def forward(self, images: Tensor) -> Tensor:
        """The same as `encode`, for an encoder that trains inside of a distributed wrapper."""
        return self.encode(images)

    def encode(self, images: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` fp32 of images `[B, 3, H, W]` in [0, 1]; the mean, without sampling."""
        self.latent_shape(images)
        return self._in_parts(self._latents, images, images.shape[2:])

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` fp32, in [0, 1] up to overshoots."""
        return self._in_parts(self._pixels, latents, [side * self.factor for side in latents.shape[2:]])

    def _latents(self, images: Tensor) -> Tensor:
        images = (2 * images - 1).to(dtype_of(self.vae))
        found = self.vae.encode(images[:, :, None] if self._is_video else images)
        if hasattr(found, "latent_dist"):
            latents = found.latent_dist.mode()
        else:
            latents = found.latents if hasattr(found, "latents") else found.latent  # AutoencoderDC
        latents = latents[:, :, 0] if self._is_video else latents
        if self._patch > 1:
            latents = nn.functional.pixel_unshuffle(latents, self._patch)
        mean, scale = self._statistics(latents.device)
        return (latents.float() - mean) * scale

    def _pixels(self, latents: Tensor) -> Tensor:
        mean, scale = self._statistics(latents.device)
        latents = latents / scale + mean
        if self._patch > 1:
            latents = nn.functional.pixel_shuffle(latents, self._patch)
        latents = latents.to(dtype_of(self.vae))
        images = self.vae.decode(latents[:, :, None] if self._is_video else latents).sample
        return ((images[:, :, 0] if self._is_video else images).float() + 1) / 2

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Mean of each channel of the autoencoder's own latents and the factor that follows, `[C, 1, 1]` fp32."""
        if self._patch > 1:
            mean, variance = self.vae.bn.running_mean.float(), self.vae.bn.running_var.float()
            scale = (variance + self.vae.config.batch_norm_eps).rsqrt()
        else:
            mean, scale = (constant(values, torch.float32, device) for values in (self._mean, self._scale))
        return mean[:, None, None], scale[:, None, None]

    def _in_parts(self, function: Any, rows: Tensor, size: Sequence[int]) -> Tensor:
        """Apply `function` to as many rows at a time as fit, whose images have (height, width) = `size`."""
        trains = rows.requires_grad or any(weight.requires_grad for weight in self.vae.parameters())
        wanted = torch.is_grad_enabled() and trains
        # Of full size are maps as wide as the second block. Three of them live at once (and 30 GiB were measured for 64
        # images of 512x512, nearly four), or for a gradient 25 with the usual two layers in a block.
        maps = 9 * (self._layers + 1) + 1 if wanted else 4
        if self._is_video:  # its convolutions see two more frames, which are zero
            maps *= 2.5
        width = self._width * dtype_of(self.vae).itemsize
        parts = rows.split(rows_at_once(size, rows.device, bytes_per_pixel=maps * width))
        if wanted and self.checkpointed:
            done: list[Any] = [checkpoint(function, part, use_reentrant=False) for part in parts]
        else:
            done = [function(part) for part in parts]
        return torch.cat(done)
