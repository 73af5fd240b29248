"""A latent flow transformer (SD3 type) that sees the degraded image as extra latent channels."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from iqareward.diffusion.autoencoder import Autoencoder
from iqareward.diffusion.policy import Condition, denoising_loss, dtype_of
from iqareward.diffusion.transition import Process


@dataclass(eq=False)
class FlowPolicy:
    """A `diffusers.SD3Transformer2DModel` with twice the latent channels as input, with one fixed prompt.

    Args:
        model: the transformer: `in_channels = 2 * latent channels`, `out_channels = latent channels`. A published
            text-to-image one becomes such a model by widening its patch embedding with zeros.
        autoencoder: the frozen autoencoder.
        prompt: `[1, L, D]` embedding of the fixed prompt.
        pooled_prompt: `[1, P]` its pooled embedding.
        process: `FlowSDE` or `FlowCPS` of the model's scheduler.

    Example:
        >>> def policy_of(pipeline, widened):  # a StableDiffusion3Pipeline, and its transformer with twice the channels
        ...     prompt, _, pooled, _ = pipeline.encode_prompt("", "", "", do_classifier_free_guidance=False)
        ...     return FlowPolicy(widened, Autoencoder(pipeline.vae), prompt, pooled, FlowSDE(pipeline.scheduler))

    References:
        Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024,
        https://arxiv.org/abs/2403.03206
        Brooks, Holynski, Efros, InstructPix2Pix, 2022, https://arxiv.org/abs/2211.09800 (extra input channels)
    """

    model: nn.Module
    autoencoder: Autoencoder
    prompt: Tensor
    pooled_prompt: Tensor
    process: Process

    def latent_shape(self, degraded: Tensor) -> tuple[int, ...]:
        """That of the autoencoder."""
        return self.autoencoder.latent_shape(degraded)

    def condition(self, degraded: Tensor) -> Condition:
        """Latents of the degraded image."""
        return {"degraded": self.autoencoder.encode(degraded)}

    def encode(self, images: Tensor) -> Tensor:
        """Latents of the autoencoder."""
        return self.autoencoder.encode(images)

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The velocity."""
        # once: a copy in every step would make the host wait
        self.prompt, self.pooled_prompt = self.prompt.to(latents.device), self.pooled_prompt.to(latents.device)
        dtype, rows = dtype_of(self.model), latents.shape[0]
        return self.model(
            hidden_states=torch.cat([latents.to(dtype), condition["degraded"].to(dtype)], 1),
            timestep=times,
            encoder_hidden_states=self.prompt.to(dtype).expand(rows, -1, -1),
            pooled_projections=self.pooled_prompt.to(dtype).expand(rows, -1),
        ).sample

    def decode(self, latents: Tensor) -> Tensor:
        """Pixels of the autoencoder."""
        return self.autoencoder.decode(latents)

    def sft_loss(self, references: Tensor, condition: Condition, noise: Tensor, times: Tensor) -> Tensor:
        """The denoising loss in latent space: flow matching."""
        return denoising_loss(self, self.encode(references), condition, noise, times)
