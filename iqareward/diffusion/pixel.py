"""A UNet in pixel space that sees the degraded image beside the noisy one: the smallest restoration model."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iqareward.diffusion.policy import Condition, denoising_loss, dtype_of
from iqareward.diffusion.transition import Process


@dataclass(eq=False)
class PixelPolicy:
    """A `diffusers.UNet2DModel` with 6 input channels, noisy and degraded image, both in [-1, 1].

    Args:
        model: the network: 3 output channels.
        process: how noise is added and taken away.
        residual: the network answers the change to the degraded image; for models that predict the sample, which then
            start from doing nothing and learn in a fraction of the time.

    Raises:
        ValueError: `residual` with a model that predicts noise or v.

    Example:
        >>> import diffusers, torch
        >>> from iqareward.diffusion.ddim import DDIM
        >>> unet = diffusers.UNet2DModel(16, 6, 3, block_out_channels=(8, 8), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> policy = PixelPolicy(unet, DDIM(diffusers.DDIMScheduler()))
        >>> policy.latent_shape(torch.rand(2, 3, 16, 16))
        (3, 16, 16)

    References:
        Saharia et al., Image Super-Resolution via Iterative Refinement, 2021, https://arxiv.org/abs/2104.07636
    """

    model: nn.Module
    process: Process
    residual: bool = False

    def __post_init__(self) -> None:
        scheduler = getattr(self.process, "scheduler", None)
        if self.residual and getattr(getattr(scheduler, "config", None), "prediction_type", None) != "sample":
            raise ValueError(
                "PixelPolicy with residual=True expected a scheduler with prediction_type='sample': noise is no change "
                "to the degraded image. Change the scheduler, or leave residual out."
            )

    def latent_shape(self, degraded: Tensor) -> tuple[int, ...]:
        """That of the images."""
        return tuple(degraded.shape[1:])

    def condition(self, degraded: Tensor) -> Condition:
        """The degraded image in [-1, 1]."""
        return {"degraded": self.encode(degraded)}

    def encode(self, images: Tensor) -> Tensor:
        """[0, 1] to [-1, 1]."""
        return 2 * images - 1

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The UNet's answer, added to the degraded image if it is residual."""
        degraded = condition["degraded"].to(latents)
        answer = self.model(torch.cat([latents, degraded], 1).to(dtype_of(self.model)), times).sample
        return degraded + answer if self.residual else answer

    def decode(self, latents: Tensor) -> Tensor:
        """[-1, 1] to [0, 1]."""
        return (latents.float() + 1) / 2

    def sft_loss(self, references: Tensor, condition: Condition, noise: Tensor, times: Tensor) -> Tensor:
        """The denoising loss."""
        return denoising_loss(self, self.encode(references), condition, noise, times)
