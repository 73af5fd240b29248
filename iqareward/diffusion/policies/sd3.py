"""Policies on the transformer of Stable Diffusion 3."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.policies._old import Autoencoder
from iqareward.diffusion.policies.core import DiffusionPolicy, dtype_of, frozen, trainable
from iqareward.diffusion.policies.prompts import Prompts, prompts_of
from iqareward.diffusion.processes import FlowSDE, NoiseProcess


class SD3ControlNetPolicy(DiffusionPolicy):
    """Stable Diffusion 3 steered by a ControlNet that sees the degraded image; one of the two trains.

    It samples as `diffusers.StableDiffusion3ControlNetPipeline` does, with guidance away from a negative prompt.

    Args:
        transformer: The `SD3Transformer2DModel`.
        controlnet: The `SD3ControlNetModel`.
        autoencoder: The frozen autoencoder.
        process: `FlowSDE` or `FlowCPS` of the model's scheduler.
        prompts: Gives "prompt" `[B, L, D]` and "pooled" `[B, P]` for a batch, e.g. a `FixedPrompt`.
        negative: The same for the negative prompts; needed for guidance.
        trains: Which of the two trains, all of its weights that have `requires_grad`; the other is frozen.
        guidance_scale: Scale of classifier-free guidance in sampling; 1 is none.
        num_steps: Steps of the sampler.
        eta: Noise of each step, as the process takes it.

    Raises:
        ValueError: There is guidance, and there are no negative prompts.

    Example:
        >>> def policy_of(folder):
        ...     import diffusers
        ...     controlnet = diffusers.SD3ControlNetModel.from_pretrained(f"{folder}/controlnet")
        ...     pipeline = diffusers.StableDiffusion3ControlNetPipeline.from_pretrained(folder, controlnet=controlnet)
        ...     return SD3ControlNetPolicy.from_pipeline(pipeline, prompt="a sharp photograph")

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
        trains: Literal["controlnet", "transformer"] = "controlnet",
        guidance_scale: float = 7.0,
        num_steps: int = 28,
        eta: float = 0.0,
    ) -> None:
        if guidance_scale != 1 and negative is None:
            raise ValueError(
                f"SD3ControlNetPolicy expected negative prompts for guidance_scale={guidance_scale}, got none. "
                "Give `negative`, or guidance_scale=1."
            )
        model, other = (controlnet, transformer) if trains == "controlnet" else (transformer, controlnet)
        self.model, self.other, self.trains = model, frozen(other), trains
        self.autoencoder, self.process, self.prompts, self.negative = autoencoder, process, prompts, negative
        self.guidance_scale, self.num_steps, self.eta = guidance_scale, num_steps, eta

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        *,
        prompt: str | None = "",
        negative_prompt: str = "",
        trains: Literal["controlnet", "transformer"] = "controlnet",
        lora_rank: int | None = None,
        gradient_checkpointing: bool = False,
        guidance_scale: float = 7.0,
        num_steps: int = 28,
        eta: float = 0.0,
    ) -> "SD3ControlNetPolicy":
        """The policy of a loaded `diffusers.StableDiffusion3ControlNetPipeline`, made of its own parts.

        Args:
            pipeline: The pipeline, with one ControlNet.
            prompt: The prompt of all inputs; None if each input brings its own.
            negative_prompt: The prompt that guidance leads away from.
            trains: Which of the two trains.
            lora_rank: Rank of LoRA adapters on what trains; None trains all of its weights.
            gradient_checkpointing: Recompute activations in the backward pass, for less memory.
            guidance_scale: Scale of classifier-free guidance in sampling; 1 is none.
            num_steps: Steps of the sampler.
            eta: Noise of each step, as `FlowSDE` takes it.
        """
        parts = {"transformer": pipeline.transformer, "controlnet": pipeline.controlnet}
        if gradient_checkpointing:
            for part in parts.values():  # the gradient passes through the frozen one as well
                part.enable_gradient_checkpointing()
        parts[trains] = trainable(parts[trains], lora_rank=lora_rank)
        return cls(
            **parts,
            autoencoder=Autoencoder(pipeline.vae),
            process=FlowSDE(pipeline.scheduler),
            prompts=prompts_of(pipeline, _encoded, prompt),
            negative=None if guidance_scale == 1 else prompts_of(pipeline, _encoded, negative_prompt),
            trains=trains,
            guidance_scale=guidance_scale,
            num_steps=num_steps,
            eta=eta,
        )

    @property
    def transformer(self) -> Any:
        """The transformer."""
        return self.model if self.trains == "transformer" else self.other

    @property
    def controlnet(self) -> Any:
        """The ControlNet."""
        return self.model if self.trains == "controlnet" else self.other

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """Latents of the degraded images for the ControlNet, and the embeddings of the prompts."""
        latents = self.autoencoder.encode(batch.degraded)
        if self.controlnet.config.force_zeros_for_pooled_projection:  # such ControlNets know latents without the shift
            latents = latents + self.autoencoder.shift * self.autoencoder.scale
        negative = None if self.negative is None else self.negative(batch)
        return {"latents": latents, "prompts": self.prompts(batch), "negative": negative}

    def unconditional(self, condition: Condition) -> Condition:
        """The condition with the negative prompts."""
        return {**condition, "prompts": condition["negative"]}

    def encode(self, images: Tensor, condition: Condition) -> Tensor:
        """Latents of the autoencoder."""
        return self.autoencoder.encode(images)

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The velocity."""
        prompt, pooled = condition["prompts"]["prompt"], condition["prompts"]["pooled"]
        control, config = dtype_of(self.controlnet), self.controlnet.config
        residuals = self.controlnet(
            hidden_states=latents.to(control),
            timestep=times,
            # The ControlNets of SD3.5 read no prompt, those of InstantX read no pooled one.
            encoder_hidden_states=None if config.joint_attention_dim is None else prompt.to(control),
            pooled_projections=pooled.to(control) * (not config.force_zeros_for_pooled_projection),
            controlnet_cond=condition["latents"].to(control),
            return_dict=False,
        )[0]
        dtype = dtype_of(self.transformer)
        return self.transformer(
            hidden_states=latents.to(dtype),
            timestep=times,
            encoder_hidden_states=prompt.to(dtype),
            pooled_projections=pooled.to(dtype),
            block_controlnet_hidden_states=[residual.to(dtype) for residual in residuals],
        ).sample

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Images of the autoencoder."""
        return self.autoencoder.decode(latents)


class FlowPolicy(DiffusionPolicy):
    """A `diffusers.SD3Transformer2DModel` with twice the latent channels as input, with one fixed prompt.

    Args:
        model: The transformer: `in_channels = 2 * latent channels`, `out_channels = latent channels`. A published
            text-to-image one becomes such a model by widening its patch embedding with zeros.
        autoencoder: The frozen autoencoder.
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

    num_steps = 28

    def __init__(
        self, model: nn.Module, autoencoder: Autoencoder, prompt: Tensor, pooled_prompt: Tensor, process: NoiseProcess
    ) -> None:
        self.model, self.autoencoder, self.process = model, autoencoder, process
        self.prompt, self.pooled_prompt = prompt, pooled_prompt

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """Latents of the degraded images."""
        return {"latents": self.autoencoder.encode(batch.degraded)}

    def encode(self, images: Tensor, condition: Condition) -> Tensor:
        """Latents of the autoencoder."""
        return self.autoencoder.encode(images)

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The velocity."""
        dtype, count = dtype_of(self.model), latents.shape[0]
        return self.model(
            hidden_states=torch.cat([latents, condition["latents"]], 1).to(dtype),
            timestep=times,
            encoder_hidden_states=self.prompt.to(dtype).expand(count, -1, -1),
            pooled_projections=self.pooled_prompt.to(dtype).expand(count, -1),
        ).sample

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Images of the autoencoder."""
        return self.autoencoder.decode(latents)


def _encoded(pipeline: Any, prompts: list[str], images: Tensor) -> Condition:
    prompt, _, pooled, _ = pipeline.encode_prompt(
        prompts, None, None, device=images.device, do_classifier_free_guidance=False
    )
    return {"prompt": prompt, "pooled": pooled}
