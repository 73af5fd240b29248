"""A policy on Flux Kontext, the edit model of Flux.1."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from iqareward.diffusion.conditions import Condition
from iqareward.diffusion.policies.autoencoders import Autoencoder
from iqareward.diffusion.policies.core import trainable
from iqareward.diffusion.policies.prompts import PipelinePrompts, Prompts
from iqareward.diffusion.policies.tokens import TokenPolicy
from iqareward.diffusion.processes import FlowSDE, NoiseProcess


class FluxKontextPolicy(TokenPolicy):
    """Flux Kontext, told by a prompt to restore the degraded image; it samples as `diffusers.FluxKontextPipeline`.

    Degraded images keep their size, as with the pipeline's `_auto_resize=False`.

    Args:
        model: The `FluxTransformer2DModel`, usually with LoRA adapters.
        autoencoder: The frozen autoencoder.
        process: `FlowSDE` or `FlowCPS` of the model's scheduler.
        prompts: Gives "prompt" `[B, L, D]` and "pooled" `[B, P]` for a batch, e.g. a `FixedPrompt`.
        negative: The same, of the same length L, for what guidance leads away from.
        embedded_guidance: Guidance that the model knows by distillation, one of its inputs; the pipeline's
            `guidance_scale`. It is told in training as well.
        options: Those of `PromptedPolicy`: `guidance_scale` (the pipeline's `true_cfg_scale`), `num_steps`, `eta`,
            `exploration`.

    Example:
        >>> def build(folder):
        ...     import diffusers
        ...     pipeline = diffusers.FluxKontextPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        ...     options = {"lora_rank": 16, "checkpointing": True}
        ...     return FluxKontextPolicy.from_pipeline(pipeline, prompt="remove noise and blur", **options)

    References:
        Black Forest Labs, FLUX.1 Kontext: Flow Matching for In-Context Image Generation and Editing in Latent Space,
        2025, https://arxiv.org/abs/2506.15742
    """

    def __init__(
        self,
        model: nn.Module,
        autoencoder: Autoencoder,
        process: NoiseProcess,
        prompts: Prompts,
        negative: Prompts | None = None,
        *,
        embedded_guidance: float = 3.5,
        **options: Any,
    ) -> None:
        super().__init__(autoencoder, process, prompts, negative, **options)
        config: Any = model.config
        self.model, self.embedded_guidance = model, embedded_guidance if config.guidance_embeds else None

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        *,
        prompt: str = "",
        negative_prompt: str = "",
        lora_rank: int | None = None,
        lora_targets: str | list[str] = "all-linear",
        checkpointing: bool = False,
        guidance_scale: float = 1.0,
        **options: Any,
    ) -> Self:
        """The policy of a `diffusers.FluxKontextPipeline`, with its transformer, autoencoder and scheduler.

        Args:
            pipeline: The pipeline.
            prompt: For inputs without a prompt of their own.
            negative_prompt: What guidance leads away from.
            lora_rank: Rank of LoRA adapters; None trains all weights of the transformer.
            lora_targets: Names of the layers that get adapters, or "all-linear".
            checkpointing: Recompute activations in the backward pass, for less memory.
            guidance_scale: Scale of classifier-free guidance in sampling; 1 is none.
            options: The policy's own.
        """
        if checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        return cls(
            trainable(pipeline.transformer, lora_rank=lora_rank, lora_targets=lora_targets),
            Autoencoder(pipeline.vae),
            FlowSDE(pipeline.scheduler, linspace_sigmas=True),
            PipelinePrompts(pipeline, _encoded, prompt),
            None if guidance_scale == 1 else PipelinePrompts(pipeline, _encoded, negative_prompt).fixed,
            guidance_scale=guidance_scale,
            **options,
        )

    def velocity(self, tokens: Tensor, times: Tensor, condition: Condition, size: tuple[int, int]) -> Tensor:
        """The transformer's output."""
        prompt, pooled = condition["prompts"]["prompt"].to(tokens), condition["prompts"]["pooled"].to(tokens)
        guidance = self.embedded_guidance
        return self.model(
            hidden_states=tokens,
            timestep=times,
            guidance=None if guidance is None else torch.full_like(times, guidance),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            txt_ids=tokens.new_zeros(prompt.shape[1], 3),
            img_ids=_places(size, tokens),
            return_dict=False,
        )[0]


def _places(size: tuple[int, int], like: Tensor) -> Tensor:
    """Where each token is: image (0 the noisy, 1 the degraded one), row and column; `[2 * T, 3]`."""
    sides = [torch.arange(side, device=like.device, dtype=torch.float32) for side in (2, *size)]
    return torch.cartesian_prod(*sides)


def _encoded(pipeline: Any, prompts: list[str], device: Any) -> Condition:
    prompt, pooled, _ = pipeline.encode_prompt(prompts, device=device)
    return {"prompt": prompt, "pooled": pooled}
