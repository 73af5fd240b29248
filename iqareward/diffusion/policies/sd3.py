"""Policies on the transformer of Stable Diffusion 3."""

from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.policies.autoencoders import Autoencoder
from iqareward.diffusion.policies.core import dtype_of, frozen, trainable
from iqareward.diffusion.policies.prompts import PipelinePrompts, PromptedPolicy, Prompts
from iqareward.diffusion.processes import FlowSDE, NoiseProcess


class SD3ControlNetPolicy(PromptedPolicy):
    """Stable Diffusion 3 steered by a `diffusers.SD3ControlNetModel` that sees the degraded image.

    It samples as `diffusers.StableDiffusion3ControlNetPipeline` does, except that the autoencoder's latents of the
    degraded image are their mean instead of a sample.

    Args:
        transformer: The `SD3Transformer2DModel`.
        controlnet: The ControlNet. What is frozen may be in bfloat16.
        autoencoder: The frozen autoencoder.
        process: `FlowSDE` or `FlowCPS` of the model's scheduler.
        prompts: Gives "prompt" `[B, L, D]` and "pooled" `[B, P]` for a batch, e.g. a `FixedPrompt`.
        negative: The same for what guidance leads away from.
        train: "controlnet" or "transformer": the network that trains, or of one with adapters only these.
        conditioning_scale: Factor of the ControlNet's residuals.
        options: Those of `PromptedPolicy`: `guidance_scale`, `num_steps`, `eta`, `exploration`.

    Example:
        >>> def build(folder):
        ...     import diffusers
        ...     controlnet = diffusers.SD3ControlNetModel.from_pretrained(f"{folder}/controlnet")
        ...     pipeline = diffusers.StableDiffusion3ControlNetPipeline.from_pretrained(folder, controlnet=controlnet)
        ...     return SD3ControlNetPolicy.from_pipeline(pipeline, prompt="a sharp photograph", guidance_scale=7.0)

    References:
        Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024,
        https://arxiv.org/abs/2403.03206
        Zhang, Rao, Agrawala, Adding Conditional Control to Text-to-Image Diffusion Models, 2023,
        https://arxiv.org/abs/2302.05543
    """

    def __init__(
        self,
        transformer: nn.Module,
        controlnet: nn.Module,
        autoencoder: Autoencoder,
        process: NoiseProcess,
        prompts: Prompts,
        negative: Prompts | None = None,
        *,
        train: Literal["controlnet", "transformer"] = "controlnet",
        conditioning_scale: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(autoencoder, process, prompts, negative, **options)
        model, other = (controlnet, transformer) if train == "controlnet" else (transformer, controlnet)
        self.model, self.other, self.train = model, frozen(other), train
        self.conditioning_scale = conditioning_scale
        config: Any = controlnet.config
        # The ControlNets of SD3.5 read no prompt; those of InstantX no pooled one, and latents without a shift.
        self._reads_prompt = config.joint_attention_dim is not None
        self._plain = config.force_zeros_for_pooled_projection

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        *,
        prompt: str = "",
        negative_prompt: str = "",
        train: Literal["controlnet", "transformer"] = "controlnet",
        lora_rank: int | None = None,
        lora_targets: str | list[str] = "all-linear",
        checkpointing: bool = False,
        guidance_scale: float = 7.0,
        **options: Any,
    ) -> Self:
        """The policy of a `diffusers.StableDiffusion3ControlNetPipeline`, with its networks and scheduler.

        Args:
            pipeline: The pipeline, with one ControlNet.
            prompt: For inputs without a prompt of their own.
            negative_prompt: What guidance leads away from.
            train: "controlnet" or "transformer".
            lora_rank: Rank of LoRA adapters on what trains; None trains all of its weights.
            lora_targets: Names of the layers that get adapters, or "all-linear".
            checkpointing: Recompute activations in the backward pass, for less memory.
            guidance_scale: Scale of classifier-free guidance in sampling; 1 is none.
            options: The policy's own.
        """
        parts = {"transformer": pipeline.transformer, "controlnet": pipeline.controlnet}
        if checkpointing:
            for part in parts.values():  # the gradient passes through the frozen one as well
                part.enable_gradient_checkpointing()
        parts[train] = trainable(parts[train], lora_rank=lora_rank, lora_targets=lora_targets)
        return cls(
            **parts,
            autoencoder=Autoencoder(pipeline.vae),
            process=FlowSDE(pipeline.scheduler, linspace_sigmas=False),
            prompts=PipelinePrompts(pipeline, _encoded, prompt),
            negative=None if guidance_scale == 1 else PipelinePrompts(pipeline, _encoded, negative_prompt).fixed,
            train=train,
            guidance_scale=guidance_scale,
            **options,
        )

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """Latents of the degraded images as the ControlNet knows them, and the embeddings of the prompts."""
        condition = super().condition(batch, noise)
        if self._plain:
            config = self.autoencoder.vae.config
            condition["latents"] = condition["latents"] + (config.shift_factor or 0.0) * config.scaling_factor
        return condition

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The velocity."""
        controlnet, transformer = (self.model, self.other)[:: 1 if self.train == "controlnet" else -1]
        prompt, pooled = condition["prompts"]["prompt"], condition["prompts"]["pooled"]
        # What trains is usually float32, what is frozen bfloat16.
        own, other = dtype_of(controlnet), dtype_of(transformer)
        residuals = controlnet(
            hidden_states=latents.to(own),
            timestep=times,
            encoder_hidden_states=prompt.to(own) if self._reads_prompt else None,
            pooled_projections=torch.zeros_like(pooled, dtype=own) if self._plain else pooled.to(own),
            controlnet_cond=condition["latents"].to(own),
            conditioning_scale=self.conditioning_scale,
            return_dict=False,
        )[0]
        return transformer(
            hidden_states=latents.to(other),
            timestep=times,
            encoder_hidden_states=prompt.to(other),
            pooled_projections=pooled.to(other),
            block_controlnet_hidden_states=[residual.to(other) for residual in residuals],
            return_dict=False,
        )[0]


class FlowPolicy(PromptedPolicy):
    """A `diffusers.SD3Transformer2DModel` with twice the latent channels as input: noisy and degraded image.

    Args:
        model: The transformer: `in_channels = 2 * latent channels`, `out_channels = latent channels`.
        autoencoder: The frozen autoencoder.
        process: `FlowSDE` or `FlowCPS` of the model's scheduler.
        prompts: Gives "prompt" `[B, L, D]` and "pooled" `[B, P]` for a batch, e.g. a `FixedPrompt`.
        negative: The same for what guidance leads away from.
        options: Those of `PromptedPolicy`: `guidance_scale`, `num_steps`, `eta`, `exploration`.

    Example:
        >>> def build(folder):
        ...     import diffusers
        ...     return FlowPolicy.from_pipeline(diffusers.StableDiffusion3Pipeline.from_pretrained(folder))

    References:
        Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, 2024,
        https://arxiv.org/abs/2403.03206
        Brooks, Holynski, Efros, InstructPix2Pix, 2022, https://arxiv.org/abs/2211.09800 (extra input channels)
    """

    def __init__(
        self,
        model: nn.Module,
        autoencoder: Autoencoder,
        process: NoiseProcess,
        prompts: Prompts,
        negative: Prompts | None = None,
        **options: Any,
    ) -> None:
        super().__init__(autoencoder, process, prompts, negative, **options)
        self.model = model

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        *,
        prompt: str = "",
        negative_prompt: str = "",
        checkpointing: bool = False,
        guidance_scale: float = 1.0,
        **options: Any,
    ) -> Self:
        """The policy of a `diffusers.StableDiffusion3Pipeline`; its transformer is made to see the degraded image.

        The new input channels begin with zero weights, so that the model first ignores the degraded image. All of its
        weights train.

        Args:
            pipeline: The pipeline; its transformer is changed, unless it has the channels already.
            prompt: For inputs without a prompt of their own.
            negative_prompt: What guidance leads away from.
            checkpointing: Recompute activations in the backward pass, for less memory.
            guidance_scale: Scale of classifier-free guidance in sampling; 1 is none.
            options: The policy's own.
        """
        autoencoder = Autoencoder(pipeline.vae)
        if pipeline.transformer.config.in_channels == autoencoder.channels:
            _widen(pipeline.transformer)
        if checkpointing:
            pipeline.transformer.enable_gradient_checkpointing()
        return cls(
            trainable(pipeline.transformer, lora_rank=None),
            autoencoder,
            FlowSDE(pipeline.scheduler, linspace_sigmas=False),
            PipelinePrompts(pipeline, _encoded, prompt),
            None if guidance_scale == 1 else PipelinePrompts(pipeline, _encoded, negative_prompt).fixed,
            guidance_scale=guidance_scale,
            **options,
        )

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The velocity."""
        dtype = dtype_of(self.model)
        return self.model(
            hidden_states=torch.cat([latents, condition["latents"]], 1).to(dtype),
            timestep=times,
            encoder_hidden_states=condition["prompts"]["prompt"].to(dtype),
            pooled_projections=condition["prompts"]["pooled"].to(dtype),
            return_dict=False,
        )[0]


def _widen(transformer: Any) -> None:
    """Give a transformer twice the input channels, the new ones with zero weights."""
    old, channels = transformer.pos_embed.proj, transformer.config.in_channels
    new = nn.Conv2d(2 * channels, old.out_channels, old.kernel_size, old.stride, bias=old.bias is not None)
    new = new.to(old.weight)
    with torch.no_grad():
        new.weight.zero_()[:, :channels] = old.weight
        if new.bias is not None:
            new.bias.copy_(old.bias)
    transformer.pos_embed.proj = new
    transformer.register_to_config(in_channels=2 * channels, out_channels=transformer.out_channels)


def _encoded(pipeline: Any, prompts: list[str], device: Any) -> Condition:
    prompt, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device=device, do_classifier_free_guidance=False)
    return {"prompt": prompt, "pooled": pooled}
