"""Diffusion on pixels with a UNet of diffusers that sees the degraded image beside the noisy one."""

import torch
from torch import Tensor, nn

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.policies.colours import resized
from iqareward.diffusion.policies.core import DiffusionPolicy, dtype_of
from iqareward.diffusion.processes import NoiseProcess


class PixelPolicy(DiffusionPolicy):
    """A `diffusers.UNet2DModel` with 6 input channels, noisy and degraded image, both in [-1, 1].

    Args:
        model: The network: 3 output channels.
        process: How noise is added and taken away.
        residual: The network predicts the change to the degraded image. For models that predict the sample: they then
            start from doing nothing and learn in a fraction of the time.
        scale: How many times larger than the degraded images the restored ones are; the network sees the degraded
            image enlarged by bicubic interpolation.
        num_steps: Steps of its sampler.
        eta: Noise of each step.

    Raises:
        ValueError: `residual` with a model that predicts noise or v.

    Example:
        >>> import diffusers, torch
        >>> from iqareward.diffusion import DDIM, Batch, Noise
        >>> unet = diffusers.UNet2DModel(16, 6, 3, block_out_channels=(8, 8), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> policy = PixelPolicy(unet, DDIM(diffusers.DDIMScheduler()), scale=2)
        >>> condition = policy.condition(Batch((0,), torch.rand(1, 3, 16, 16)), Noise((0,)))
        >>> policy.start(condition, Noise((0,))).shape
        torch.Size([1, 3, 32, 32])

    References:
        Saharia et al., Image Super-Resolution via Iterative Refinement, 2021, https://arxiv.org/abs/2104.07636
    """

    def __init__(
        self,
        model: nn.Module,
        process: NoiseProcess,
        *,
        residual: bool = False,
        scale: int = 1,
        num_steps: int = 50,
        eta: float = 0.0,
    ) -> None:
        if residual and process.prediction_type != "sample":
            raise ValueError(
                "PixelPolicy with residual=True expected a process whose prediction_type is 'sample', got "
                f"{process.prediction_type!r}: noise is not a change to the degraded image. Change the scheduler, or "
                "leave residual out."
            )
        self.model, self.process, self.residual, self.scale = model, process, residual, scale
        self.num_steps, self.eta = num_steps, eta

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """The degraded images in [-1, 1], in the size of the restored ones."""
        size = [self.scale * side for side in batch.degraded.shape[-2:]]
        return {"latents": 2 * resized(batch.degraded, size) - 1}

    def anchor(self, condition: Condition) -> Tensor | None:
        """The degraded images, for processes that end there."""
        return condition["latents"] if self.process.anchored else None

    def encode(self, images: Tensor, condition: Condition) -> Tensor:
        """Scale [0, 1] to [-1, 1]."""
        return 2 * images - 1

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The output of the UNet, added to the degraded image if it is residual."""
        degraded = condition["latents"].to(latents)
        inputs = torch.cat([self.process.scale_input(latents, times), degraded], 1)
        output = self.model(inputs.to(dtype_of(self.model)), times).sample
        return degraded + output if self.residual else output

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Scale [-1, 1] to [0, 1]."""
        return (latents.float() + 1) / 2
