"""Stable Diffusion with a ControlNet that sees the degraded image: the model class of arXiv 2511.01645."""

from dataclasses import dataclass

from torch import Tensor, nn

from iqareward.diffusion.autoencoder import Autoencoder
from iqareward.diffusion.policy import Condition, denoising_loss, dtype_of
from iqareward.diffusion.transition import Process


@dataclass(eq=False)
class ControlNetPolicy:
    """A frozen latent UNet steered by a trained `diffusers.ControlNetModel`, with one fixed prompt.

    Restoration needs no prompt of its own: encode an empty or a general one once, outside. There is no classifier-free
    guidance, whose two passes would make the policy another one than the one trained.

    Args:
        model: the ControlNet; the part that trains, usually in float32.
        unet: the `UNet2DConditionModel`; frozen, in any dtype.
        autoencoder: the frozen autoencoder.
        prompt: `[1, L, D]` embedding of the fixed prompt, e.g. from `pipeline.encode_prompt`; moved to the latents'
            device by the first call.
        process: `DDIM.from_scheduler(pipeline.scheduler)`.

    Example:
        >>> def policy_of(pipeline, prompt):  # a StableDiffusionControlNetPipeline
        ...     process = DDIM.from_scheduler(pipeline.scheduler)
        ...     parts = pipeline.controlnet, pipeline.unet, Autoencoder(pipeline.vae)
        ...     return ControlNetPolicy(*parts, pipeline.encode_prompt(prompt, "cpu", 1, False)[0], process)

    References:
        Zhang, Rao, Agrawala, Adding Conditional Control to Text-to-Image Diffusion Models, 2023,
        https://arxiv.org/abs/2302.05543
    """

    model: nn.Module
    unet: nn.Module
    autoencoder: Autoencoder
    prompt: Tensor
    process: Process

    def __post_init__(self) -> None:
        self.unet.requires_grad_(False).eval()

    def latent_shape(self, degraded: Tensor) -> tuple[int, ...]:
        """That of the autoencoder."""
        return self.autoencoder.latent_shape(degraded)

    def condition(self, degraded: Tensor) -> Condition:
        """The degraded pixels themselves: a ControlNet embeds them."""
        return {"degraded": degraded}

    def encode(self, images: Tensor) -> Tensor:
        """Latents of the autoencoder."""
        return self.autoencoder.encode(images)

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The UNet's answer with the ControlNet's residuals."""
        self.prompt = self.prompt.to(latents.device)  # once: a copy in every step would make the host wait
        prompt = self.prompt.expand(latents.shape[0], -1, -1)
        # The trained ControlNet is usually float32 (accelerate even makes its residuals so), the frozen UNet bfloat16.
        own, frozen = dtype_of(self.model), dtype_of(self.unet)
        down, middle = self.model(
            latents.to(own), times, prompt.to(own), controlnet_cond=condition["degraded"].to(own), return_dict=False
        )
        return self.unet(
            latents.to(frozen),
            times,
            prompt.to(frozen),
            down_block_additional_residuals=[residual.to(frozen) for residual in down],
            mid_block_additional_residual=middle.to(frozen),
        ).sample

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of the autoencoder."""
        return self.autoencoder.decode(latents)

    def sft_loss(self, references: Tensor, condition: Condition, noise: Tensor, times: Tensor) -> Tensor:
        """The denoising loss in latent space."""
        return denoising_loss(self, self.encode(references), condition, noise, times)
