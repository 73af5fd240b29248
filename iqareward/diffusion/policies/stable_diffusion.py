"""Policies on the networks of Stable Diffusion: a ControlNet, an upscaler, and restoration in one step."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.policies.autoencoders import Autoencoder
from iqareward.diffusion.policies.colours import match_colours, resized
from iqareward.diffusion.policies.core import DiffusionPolicy, TrainedTogether, dtype_of, frozen
from iqareward.diffusion.processes import DDIM, NoiseProcess, Step, Transition


class TextEncoder(nn.Module):
    """A frozen CLIP text encoder with its tokenizer, as the pipelines of Stable Diffusion use them.

    Args:
        tokenizer: For example `pipeline.tokenizer`.
        encoder: For example `pipeline.text_encoder`.

    Example:
        >>> def prompts_of(pipeline):
        ...     return TextEncoder(pipeline.tokenizer, pipeline.text_encoder)(["a clean photograph"])
    """

    def __init__(self, tokenizer: Any, encoder: Any) -> None:
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, frozen(encoder)

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Embeddings `[B, L, D]` of B texts."""
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(
            list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        device = next(self.encoder.parameters()).device
        masked = getattr(self.encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if masked else None
        return self.encoder(tokens.input_ids.to(device), attention_mask=mask)[0]


class StableDiffusionPolicy(DiffusionPolicy):
    """What the policies of this file share: prompts, guidance, a frozen autoencoder and colour correction.

    Derive from it for another network with the autoencoder and the text encoder of Stable Diffusion: write `condition`
    and `predict`, and call `use` for the networks.

    Args:
        autoencoder: The frozen autoencoder.
        prompt: `[1, L, D]` embedding of the prompt of inputs without one of their own.
        process: How noise is added and taken away, e.g. `DDIM.from_scheduler(pipeline.scheduler)`.
        negative_prompt: `[1, L, D]` embedding that guidance leads away from.
        text_encoder: Embeds the inputs' own prompts; without one all inputs have the fixed prompt.
        guidance_scale: Scale of classifier-free guidance in sampling; 1 is none.
        scale: How many times larger than the degraded images the restored ones are; the networks see the degraded
            image enlarged by bicubic interpolation.
        colour_fix: Give restored images the colours of the degraded ones: "adain" or "wavelet", see `match_colours`.
        num_steps: Steps of the sampler.
        eta: Noise of each step, as the process takes it.

    Raises:
        ValueError: There is guidance and no negative prompt.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        prompt: Tensor,
        process: NoiseProcess,
        *,
        negative_prompt: Tensor | None = None,
        text_encoder: TextEncoder | None = None,
        guidance_scale: float = 1.0,
        scale: int = 1,
        colour_fix: Literal["adain", "wavelet"] | None = None,
        num_steps: int = 50,
        eta: float = 0.0,
    ) -> None:
        if guidance_scale != 1 and negative_prompt is None:
            raise ValueError(
                f"{type(self).__name__} expected a negative_prompt for guidance_scale={guidance_scale}: guidance leads "
                "away from it. Give the embedding of an empty text."
            )
        self.autoencoder, self.prompt, self.process = autoencoder, prompt, process
        self.negative_prompt, self.text_encoder, self.guidance_scale = negative_prompt, text_encoder, guidance_scale
        self.scale, self.colour_fix, self.num_steps, self.eta = scale, colour_fix, num_steps, eta

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, prompt: str = "", negative_prompt: str = "", **options: Any) -> Self:
        """The policy of a pipeline of diffusers, with its networks, text encoder, autoencoder and scheduler.

        Args:
            pipeline: The pipeline, or any other object with these parts as attributes.
            prompt: For inputs without a prompt of their own.
            negative_prompt: What guidance leads away from.
            options: The policy's own.
        """
        text = TextEncoder(pipeline.tokenizer, pipeline.text_encoder)
        shared: dict[str, Any] = {"text_encoder": text, "negative_prompt": text([negative_prompt])}
        process, parts = DDIM.from_scheduler(pipeline.scheduler), cls.networks(pipeline)
        return cls(*parts, Autoencoder(pipeline.vae), text([prompt]), process, **shared, **options)

    @staticmethod
    def networks(pipeline: Any) -> Sequence[Any]:
        """The networks of a pipeline, in the order in which the policy takes them."""
        return (pipeline.unet,)

    def use(self, train: str, **parts: nn.Module) -> None:
        """Keep the networks as attributes; those that train also become `model`, the others are frozen.

        Args:
            train: The name of the one that trains, or "both".
            parts: The networks by name. Which weights of one that trains do so stays as it is: only the adapters of
                a LoRA model.

        Raises:
            ValueError: `train` names none of them, or one that trains has no weights that do.
        """
        if train not in (*parts, "both"):
            raise ValueError(f"{type(self).__name__} expected train to be one of {[*parts, 'both']}, got {train!r}.")
        self.trained = tuple(parts) if train == "both" else (train,)
        for name, part in parts.items():
            setattr(self, name, part)
            if name not in self.trained:
                frozen(part)
            elif not any(weight.requires_grad for weight in part.parameters()):
                raise ValueError(
                    f"{type(self).__name__} with train={train!r} expected weights that train in the {name}, found "
                    "none. Add adapters with add_lora, or call requires_grad_() of what is to train."
                )
        self.model = parts[train] if train != "both" else TrainedTogether(parts)

    def ask(self, name: str, *inputs: Any, **options: Any) -> Any:
        """Call a network of `use`; one that trains through `model`, which may be a distributed wrapper."""
        if name not in self.trained:
            return getattr(self, name)(*inputs, **options)
        return self.model(*inputs, **options) if len(self.trained) == 1 else self.model(name, *inputs, **options)

    def enlarged(self, batch: Batch) -> Tensor:
        """The degraded images in the size of the restored ones."""
        return resized(batch.degraded, [self.scale * side for side in batch.degraded.shape[-2:]])

    def prompts(self, batch: Batch) -> Tensor:
        """Embeddings `[B, L, D]` of the inputs' own prompts, or of the fixed one."""
        if batch.prompts is not None and self.text_encoder is not None:
            return self.text_encoder(batch.prompts).to(batch.degraded.device)
        return self.prompt.to(batch.degraded.device).expand(len(batch), -1, -1)

    def unconditional(self, condition: Condition) -> Condition:
        """The same condition with the negative prompt."""
        negative: Any = self.negative_prompt
        prompt = condition["prompt"]
        return {**condition, "prompt": negative.to(prompt).expand(prompt.shape[0], -1, -1)}

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        """Shape of one row of latents, for the condition's degraded images in the size of the restored ones."""
        return self.autoencoder.latent_shape(condition["degraded"])

    def encode(self, images: Tensor, condition: Condition) -> Tensor:
        """Latents of the autoencoder."""
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Images of the autoencoder, with the colours of the degraded ones if `colour_fix` says so."""
        images = self.autoencoder.decode(latents)
        if self.colour_fix is None:
            return images
        return match_colours(images, condition["degraded"], method=self.colour_fix)


class ControlNetPolicy(StableDiffusionPolicy):
    """A latent UNet steered by a `diffusers.ControlNetModel` that sees the degraded image.

    Args:
        controlnet: The ControlNet.
        unet: The `UNet2DConditionModel`. What is frozen may be in bfloat16, what trains should be in float32.
        autoencoder: The frozen autoencoder.
        prompt: `[1, L, D]` embedding of the prompt of inputs without one of their own.
        process: `DDIM.from_scheduler(pipeline.scheduler)`.
        train: What trains: "controlnet", "unet" or "both"; of a network with adapters only these.
        conditioning_scale: Factor of the ControlNet's residuals.
        checkpointing: Recompute activations in the backward pass, for less memory.
        options: Those of `StableDiffusionPolicy`.

    Example:
        >>> def build(pipeline):  # a StableDiffusionControlNetPipeline
        ...     options = {"prompt": "clean, sharp", "negative_prompt": "blurry", "guidance_scale": 4.0}
        ...     return ControlNetPolicy.from_pipeline(pipeline, colour_fix="wavelet", **options)

    References:
        Zhang, Rao, Agrawala, Adding Conditional Control to Text-to-Image Diffusion Models, 2023,
        https://arxiv.org/abs/2302.05543
        Lin et al., DiffBIR: Towards Blind Image Restoration with Generative Diffusion Prior, 2023,
        https://arxiv.org/abs/2308.15070
    """

    def __init__(
        self,
        controlnet: nn.Module,
        unet: nn.Module,
        autoencoder: Autoencoder,
        prompt: Tensor,
        process: NoiseProcess,
        *,
        train: Literal["controlnet", "unet", "both"] = "controlnet",
        conditioning_scale: float = 1.0,
        checkpointing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(autoencoder, prompt, process, **options)
        self.controlnet, self.unet, self.conditioning_scale = controlnet, unet, conditioning_scale
        self.use(train, controlnet=controlnet, unet=unet)
        if checkpointing:
            _checkpoint(controlnet, unet)

    @staticmethod
    def networks(pipeline: Any) -> Sequence[Any]:
        """ControlNet and UNet."""
        return pipeline.controlnet, pipeline.unet

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """The degraded pixels, which a ControlNet embeds, and the prompts."""
        return {"degraded": self.enlarged(batch), "prompt": self.prompts(batch)}

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The output of the UNet with the ControlNet's residuals."""
        prompt, degraded = condition["prompt"], condition["degraded"]
        # What trains is usually float32 (accelerate even makes its outputs so), what is frozen bfloat16.
        own, other = dtype_of(self.controlnet), dtype_of(self.unet)
        down, middle = self.ask(
            "controlnet",
            latents.to(own),
            times,
            prompt.to(own),
            controlnet_cond=degraded.to(own),
            conditioning_scale=self.conditioning_scale,
            return_dict=False,
        )
        return self.ask(
            "unet",
            latents.to(other),
            times,
            prompt.to(other),
            down_block_additional_residuals=[residual.to(other) for residual in down],
            mid_block_additional_residual=middle.to(other),
            return_dict=False,
        )[0]


class UpscalePolicy(StableDiffusionPolicy):
    """An upscaler that sees the degraded image with noise of a known level, as `StableDiffusionUpscalePipeline`.

    The restored images are as many times larger as the autoencoder's latents are smaller.

    Args:
        unet: The `UNet2DConditionModel`, whose input is latents and degraded image and whose class label is the noise
            level; it trains, or its adapters do.
        autoencoder: The frozen autoencoder.
        prompt: `[1, L, D]` embedding of the prompt of inputs without one of their own.
        process: `DDIM.from_scheduler(pipeline.scheduler)`.
        low_res_scheduler: `pipeline.low_res_scheduler`, which adds noise to the degraded images.
        noise_level: Its timestep.
        checkpointing: Recompute activations in the backward pass, for less memory.
        options: Those of `StableDiffusionPolicy`, without `scale`.

    Example:
        >>> def build(pipeline):  # a StableDiffusionUpscalePipeline
        ...     pipeline.unet = add_lora(pipeline.unet, targets=["to_q", "to_k", "to_v"])
        ...     return UpscalePolicy.from_pipeline(pipeline, guidance_scale=9.0, num_steps=75, noise_level=20)

    References:
        Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2021,
        https://arxiv.org/abs/2112.10752
    """

    def __init__(
        self,
        unet: nn.Module,
        autoencoder: Autoencoder,
        prompt: Tensor,
        process: NoiseProcess,
        *,
        low_res_scheduler: Any,
        noise_level: int = 20,
        checkpointing: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(autoencoder, prompt, process, scale=autoencoder.factor, **options)
        self.low_res_scheduler, self.noise_level = low_res_scheduler, noise_level
        self.use("unet", unet=unet)
        if checkpointing:
            _checkpoint(unet)

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, prompt: str = "", negative_prompt: str = "", **options: Any) -> Self:
        """The policy of a `StableDiffusionUpscalePipeline`; see `StableDiffusionPolicy.from_pipeline`."""
        options = {"low_res_scheduler": pipeline.low_res_scheduler, **options}
        return super().from_pipeline(pipeline, prompt=prompt, negative_prompt=negative_prompt, **options)

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """The degraded pixels in [-1, 1] with noise, which is always the same for an input, and the prompts."""
        degraded = batch.degraded
        fresh = noise("low_res", degraded.shape[1:])
        level = torch.full((1,), self.noise_level, device=degraded.device)
        noised = self.low_res_scheduler.add_noise(2 * degraded - 1, fresh, level)
        return {"degraded": degraded, "low_res": noised, "prompt": self.prompts(batch)}

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        """Shape of one row of latents: they are as large as the degraded images."""
        return (self.autoencoder.channels, *condition["degraded"].shape[-2:])

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The output of the UNet for latents and noisy degraded images."""
        dtype = dtype_of(self.unet)
        inputs, prompt = torch.cat([latents, condition["low_res"].to(latents)], 1), condition["prompt"]
        level = torch.full((latents.shape[0],), self.noise_level, device=latents.device)
        return self.ask("unet", inputs.to(dtype), times, prompt.to(dtype), class_labels=level, return_dict=False)[0]


class OneStepPolicy(StableDiffusionPolicy):
    """Restoration in one step of a latent UNet, from the latents of the degraded image.

    Three kinds of models differ in the noise that these latents get:

    - none (OSEDiff): restoration is deterministic. Rollouts explore with noise of standard deviation `eta` around the
      restored latents;
    - that of the step's own timestep (InvSR);
    - that of another timestep (GDPO-SR).

    Args:
        unet: The `UNet2DConditionModel`, usually with adapters.
        autoencoder: The autoencoder. If its encoder trains, a copy from before training encodes references and decodes.
        prompt: `[1, L, D]` embedding of the prompt of inputs without one of their own.
        process: `DDIM.from_scheduler(pipeline.scheduler)`.
        timestep: The timestep of the UNet's one step.
        noise_timestep: The timestep up to which the latents get noise; None adds none.
        train: What trains: "unet", "encoder" or "both"; of a network with adapters only these. Adapters of the encoder
            are added after `Autoencoder` has frozen it: `add_lora(autoencoder.vae.encoder, targets=[...])`.
        loss: The supervised loss `[B]` of restored images and references `[B, 3, H, W]`, for instance squared error
            and LPIPS; None is the mean squared error of the latents, without the decoder.
        checkpointing: Recompute activations in the backward pass, for less memory.
        options: Those of `StableDiffusionPolicy`, without `num_steps`.

    Example:
        >>> def build(pipeline):  # a StableDiffusionPipeline
        ...     pipeline.unet = add_lora(pipeline.unet, rank=4, targets=["to_q", "to_k", "to_v", "to_out.0"])
        ...     return OneStepPolicy.from_pipeline(pipeline, scale=4, colour_fix="adain")

    References:
        Wu et al., One-Step Effective Diffusion Network for Real-World Image Super-Resolution, 2024,
        https://arxiv.org/abs/2406.08177 (OSEDiff)
        Yue, Liao, Loy, Arbitrary-steps Image Super-resolution via Diffusion Inversion, 2024,
        https://arxiv.org/abs/2412.09013 (InvSR)
    """

    def __init__(
        self,
        unet: nn.Module,
        autoencoder: Autoencoder,
        prompt: Tensor,
        process: NoiseProcess,
        *,
        timestep: int = 999,
        noise_timestep: int | None = None,
        train: Literal["unet", "encoder", "both"] = "unet",
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        checkpointing: bool = False,
        **options: Any,
    ) -> None:
        # References need latents that stay what they are, and the decoder knows the encoder from before training.
        original = autoencoder if train == "unet" else frozen(copy.deepcopy(autoencoder))
        super().__init__(original, prompt, process, num_steps=1, **options)
        self.timestep, self.noise_timestep, self.loss = timestep, noise_timestep, loss
        self.unet, self.encoder = unet, autoencoder
        self.use(train, unet=unet, encoder=autoencoder)
        if checkpointing:
            _checkpoint(unet)

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """The degraded pixels, the prompts, and the latents unless the encoder trains."""
        degraded = self.enlarged(batch)
        latents = None if "encoder" in self.trained else self.encoder(degraded)
        return {"degraded": degraded, "latents": latents, "prompt": self.prompts(batch)}

    def schedule(self, condition: Condition, num_steps: int) -> Sequence[Step]:
        """One step."""
        return (self._step,)

    def start(self, condition: Condition, noise: Noise) -> Tensor:
        """The noise that the step adds to the latents of the degraded image, or zeros.

        It is added in the step because the encoder, if it trains, gets its gradient there.
        """
        shape = self.latent_shape(condition)
        if self.noise_timestep is None:
            return condition["degraded"].new_zeros(condition["degraded"].shape[0], *shape)
        return noise("start", shape)

    def step(self, latents: Tensor, step: Step, condition: Condition, *, eta: float) -> Transition:
        """A Gaussian around the restored latents."""
        restored = self._restored(latents, condition, self.guided)
        return Transition(restored, eta, restored)

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The output of the UNet."""
        dtype = dtype_of(self.unet)
        return self.ask("unet", latents.to(dtype), times, condition["prompt"].to(dtype), return_dict=False)[0]

    def sft_loss(self, references: Tensor, condition: Condition, noise: Noise) -> Tensor:
        """The loss that the policy was given, of the restored images or latents."""
        restored = self._restored(self.start(condition, noise), condition, self.predict)
        if self.loss is not None:
            return self.loss(self.autoencoder.decode(restored), references)
        return (restored - self.encode(references, condition)).square().flatten(1).mean(1)

    def _restored(self, noise: Tensor, condition: Condition, output: Callable[..., Tensor]) -> Tensor:
        """The clean latents that the network's `output` stands for."""
        latents = condition["latents"]
        if latents is None:
            latents = self.ask("encoder", condition["degraded"])
        if self.noise_timestep is not None:
            latents = self.process.add_noise(latents, noise, self._times(latents, self.noise_timestep))
        times = self._times(latents, self.timestep)
        return self.process.clean(output(latents, times, condition), latents, times)
