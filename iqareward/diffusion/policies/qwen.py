"""A policy on Qwen-Image-Edit."""

import math
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition
from iqareward.diffusion.policies.autoencoders import Autoencoder
from iqareward.diffusion.policies.core import trainable
from iqareward.diffusion.policies.prompts import Prompts, move_text_encoders
from iqareward.diffusion.policies.tokens import TokenPolicy, from_tokens, to_tokens
from iqareward.diffusion.processes import FlowSDE, NoiseProcess


@dataclass(eq=False)
class QwenPrompts:
    """Prompts that the vision-language model of a `diffusers.QwenImageEditPipeline` reads with the degraded images.

    Args:
        pipeline: The pipeline; only its text encoder and image processor are used.
        text: The prompt of inputs without one of their own.
        own: Use the inputs' own prompts if they have any.
    """

    pipeline: Any
    text: str
    own: bool = True

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Condition:
        """Embeddings "prompt" `[B, L, D]` and "mask" `[B, L]`, None if all prompts have the same length."""
        given = self.own and batch.prompts is not None
        prompts = list(batch.prompts or ()) if given else [self.text] * len(batch)
        device = batch.degraded.device
        move_text_encoders(self.pipeline, device)
        # As the pipeline does it: a picture of about 1024x1024 pixels with sides that are multiples of 32.
        ratio = batch.degraded.shape[-1] / batch.degraded.shape[-2]
        height, width = (32 * round(1024 * side / 32) for side in (math.sqrt(1 / ratio), math.sqrt(ratio)))
        processor = self.pipeline.image_processor
        pictures = processor.numpy_to_pil(processor.pt_to_numpy(batch.degraded.clamp(0, 1)))
        pictures = [processor.resize(picture, height, width) for picture in pictures]
        prompt, mask = self.pipeline.encode_prompt(prompts, image=pictures, device=device)
        return {"prompt": prompt, "mask": mask}


class QwenImageEditPolicy(TokenPolicy):
    """Qwen-Image-Edit, told by a prompt to restore the degraded image; it samples as `diffusers.QwenImageEditPipeline`.

    Degraded images keep their size; the pipeline enlarges or reduces them to about 1024x1024 pixels, the size that the
    model was trained with.

    Args:
        model: The `QwenImageTransformer2DModel`, usually with LoRA adapters.
        autoencoder: The frozen autoencoder.
        process: `FlowSDE` or `FlowCPS` of the model's scheduler.
        prompts: Gives "prompt" `[B, L, D]` and "mask" `[B, L]` or None for a batch: `QwenPrompts`, or a function of
            your own that looks up what was computed before.
        negative: The same for what guidance leads away from.
        options: Those of `PromptedPolicy`: `guidance_scale` (the pipeline's `true_cfg_scale`), `num_steps`, `eta`,
            `exploration`.

    Example:
        >>> def build(folder):
        ...     import diffusers
        ...     pipeline = diffusers.QwenImageEditPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
        ...     options = {"lora_rank": 16, "checkpointing": True}
        ...     return QwenImageEditPolicy.from_pipeline(pipeline, prompt="remove noise and blur", **options)

    References:
        Wu et al., Qwen-Image Technical Report, 2025, https://arxiv.org/abs/2508.02324
    """

    def __init__(
        self,
        model: nn.Module,
        autoencoder: Autoencoder,
        process: NoiseProcess,
        prompts: Prompts,
        negative: Prompts | None = None,
        *,
        num_steps: int = 50,
        **options: Any,
    ) -> None:
        from diffusers.utils.versions import require_version

        # Before it, the length of prompts was given separately, and padding was attended to.
        require_version("diffusers>=0.37", "QwenImageEditPolicy needs it for prompts of different lengths.")
        super().__init__(autoencoder, process, prompts, negative, num_steps=num_steps, **options)
        self.model = model

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        *,
        prompt: str = "",
        negative_prompt: str = " ",
        lora_rank: int | None = None,
        lora_targets: str | list[str] = "all-linear",
        checkpointing: bool = False,
        guidance_scale: float = 4.0,
        **options: Any,
    ) -> Self:
        """The policy of a `diffusers.QwenImageEditPipeline`, with its transformer, autoencoder and scheduler.

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
            QwenPrompts(pipeline, prompt),
            None if guidance_scale == 1 else QwenPrompts(pipeline, negative_prompt, own=False),
            guidance_scale=guidance_scale,
            **options,
        )

    def velocity(self, tokens: Tensor, times: Tensor, condition: Condition, size: tuple[int, int]) -> Tensor:
        """The transformer's output."""
        prompt, mask = condition["prompts"]["prompt"].to(tokens), condition["prompts"]["mask"]
        return self.model(
            hidden_states=tokens,
            timestep=times,
            encoder_hidden_states=prompt,
            encoder_hidden_states_mask=mask,
            img_shapes=[[(1, *size), (1, *size)]] * tokens.shape[0],
            return_dict=False,
        )[0]

    def guided(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The guided velocity, in which each token is as long as in the one that is not guided."""
        given = self.predict(latents, times, condition)
        if self.guidance_scale == 1:
            return given
        # Not in one pass: the negative prompts have another length.
        without = self.predict(latents, times, self.unconditional(condition))
        given, without = to_tokens(given.float()), to_tokens(without.float())
        output = without + self.guidance_scale * (given - without)
        length, wanted = (torch.linalg.vector_norm(tokens, dim=-1, keepdim=True) for tokens in (output, given))
        return from_tokens(output * (wanted / length.clamp_min(1e-12)), latents.shape[2] // 2)
