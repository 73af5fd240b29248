"""Policies on the networks of Stable Diffusion: a ControlNet, an upscaler, and restoration in one step."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.policies.autoencoders import Autoencoder
from iqareward.diffusion.policies.colours import match_colours, resized
from iqareward.diffusion.policies.core import Noised, TrainedTogether, add_lora, dtype_of, frozen, trainable
from iqareward.diffusion.policies.prompts import PipelinePrompts, PromptedPolicy, Prompts
from iqareward.diffusion.processes import DDIM, NoiseProcess, Step, Transition

# the layers of an AutoencoderKL's encoder that OSEDiff adapts
_ENCODER_LAYERS = ["conv_in", "conv_out", "conv", "conv1", "conv2", "conv_shortcut", "to_q", "to_k", "to_v", "to_out.0"]


class StableDiffusionPolicy(PromptedPolicy):
    """What the policies of this file share: networks that train together, prompts, sizes and colours.

    Derive from it for another network in the latents of Stable Diffusion: write `condition` and `predict`, and call
    `use` for the networks. Its condition has "degraded" images, in the size that the networks see, and "prompts" with
    "prompt" `[B, L, D]`.

    Args:
        autoencoder: The frozen autoencoder.
        process: How noise is added and taken away, e.g. `DDIM.from_scheduler(pipeline.scheduler)`.
        prompts: Gives "prompt" `[B, L, D]` for a batch, e.g. a `FixedPrompt`.
        negative: The same for what guidance leads away from.
        scale: How many times larger than the degraded images the restored ones are; the networks see the degraded
            image enlarged by bicubic interpolation.
        colour_fix: Give restored images the colours of the degraded ones: "adain" or "wavelet", see `match_colours`.
        num_steps: Steps of the sampler.
        exploration: Noise of each step in rollouts.
        options: Those of `PromptedPolicy`: `guidance_scale` and `eta`.

    Attributes:
        networks: Names of the networks in a pipeline; the first one trains if none is named.
    """

    networks: ClassVar[tuple[str, ...]] = ("unet",)

    def __init__(
        self,
        autoencoder: Autoencoder,
        process: NoiseProcess,
        prompts: Prompts,
        negative: Prompts | None = None,
        *,
        scale: int = 1,
        colour_fix: Literal["adain", "wavelet"] | None = None,
        num_steps: int = 50,
        exploration: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(
            autoencoder, process, prompts, negative, num_steps=num_steps, exploration=exploration, **options
        )
        self.scale = scale
        self.colour_fix: Literal["adain", "wavelet"] | None = colour_fix

    @classmethod
    def from_pipeline(
        cls,
        pipeline: Any,
        *,
        prompt: str = "",
        negative_prompt: str = "",
        train: str | None = None,
        lora_rank: int | None = None,
        lora_targets: str | list[str] = "all-linear",
        checkpointing: bool = False,
        guidance_scale: float = 1.0,
        autoencoder: Autoencoder | None = None,
        **options: Any,
    ) -> Self:
        """The policy of a pipeline of diffusers, with its networks, text encoder, autoencoder and scheduler.

        Args:
            pipeline: The pipeline.
            prompt: For inputs without a prompt of their own.
            negative_prompt: What guidance leads away from.
            train: What trains, as the policy takes it; the first of its `networks` if None.
            lora_rank: Rank of LoRA adapters on what trains; None trains all of its weights.
            lora_targets: Names of the layers that get adapters, or "all-linear".
            checkpointing: Recompute activations in the backward pass, for less memory.
            guidance_scale: Scale of classifier-free guidance in sampling; 1 is none.
            autoencoder: Another one than the pipeline's.
            options: The policy's own.
        """
        train = cls.networks[0] if train is None else train
        parts = {name: getattr(pipeline, name) for name in cls.networks}
        for name, part in parts.items():
            if checkpointing:  # the gradient passes through a frozen one as well
                part.enable_gradient_checkpointing()
            if train in (name, "both"):
                parts[name] = trainable(part, lora_rank=lora_rank, lora_targets=lora_targets)
        return cls(
            **parts,
            autoencoder=Autoencoder(pipeline.vae) if autoencoder is None else autoencoder,
            process=DDIM.from_scheduler(pipeline.scheduler),
            prompts=PipelinePrompts(pipeline, _encoded, prompt),
            negative=None if guidance_scale == 1 else PipelinePrompts(pipeline, _encoded, negative_prompt).fixed,
            train=train,
            guidance_scale=guidance_scale,
            **options,
        )

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

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """The degraded images in the size of the restored ones, and the embeddings of the prompts."""
        return {
            "degraded": resized(batch.degraded, [self.scale * side for side in batch.degraded.shape[-2:]]),
            "prompts": self.prompts(batch),
            "negative": None if self.negative is None else self.negative(batch),
        }

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        """Shape of one row of latents, for the condition's degraded images in the size of the restored ones."""
        return self.autoencoder.latent_shape(condition["degraded"])

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
        process: `DDIM.from_scheduler(pipeline.scheduler)`.
        prompts: Gives "prompt" `[B, L, D]` for a batch, e.g. a `FixedPrompt`.
        negative: The same for what guidance leads away from.
        train: What trains: "controlnet", "unet" or "both"; of a network with adapters only these.
        conditioning_scale: Factor of the ControlNet's residuals.
        from_degraded: Sampling starts from noised latents of the degraded image (SeeSR, PASD, StableSR) instead of
            pure noise.
        options: Those of `StableDiffusionPolicy`.

    Example:
        >>> def build(pipeline):  # a StableDiffusionControlNetPipeline
        ...     texts = {"prompt": "clean, sharp", "negative_prompt": "blurry"}
        ...     return ControlNetPolicy.from_pipeline(pipeline, **texts, guidance_scale=4.0, colour_fix="wavelet")

    References:
        Zhang, Rao, Agrawala, Adding Conditional Control to Text-to-Image Diffusion Models, 2023,
        https://arxiv.org/abs/2302.05543
        Lin et al., DiffBIR: Towards Blind Image Restoration with Generative Diffusion Prior, 2023,
        https://arxiv.org/abs/2308.15070
    """

    networks = ("controlnet", "unet")

    def __init__(
        self,
        controlnet: nn.Module,
        unet: nn.Module,
        autoencoder: Autoencoder,
        process: NoiseProcess,
        prompts: Prompts,
        negative: Prompts | None = None,
        *,
        train: Literal["controlnet", "unet", "both"] = "controlnet",
        conditioning_scale: float = 1.0,
        from_degraded: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(autoencoder, process, prompts, negative, **options)
        self.conditioning_scale, self.from_degraded = conditioning_scale, from_degraded
        self.controlnet, self.unet = controlnet, unet
        self.use(train, controlnet=controlnet, unet=unet)

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """The degraded images in the size of the restored ones, their latents if they are the start, and prompts."""
        condition = super().condition(batch, noise)
        return {**condition, "latents": self.encode(condition["degraded"], condition) if self.from_degraded else None}

    def anchor(self, condition: Condition) -> Tensor | None:
        """Latents of the degraded images, if they are the start."""
        return condition["latents"]

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The output of the UNet with the ControlNet's residuals."""
        prompt, degraded = condition["prompts"]["prompt"], condition["degraded"]
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
        process: `DDIM.from_scheduler(pipeline.scheduler)`.
        prompts: Gives "prompt" `[B, L, D]` for a batch, e.g. a `FixedPrompt`.
        negative: The same for what guidance leads away from.
        low_res_scheduler: `pipeline.low_res_scheduler`, which adds noise to the degraded images.
        noise_level: Its timestep.
        train: "unet".
        options: Those of `StableDiffusionPolicy`, without `scale`.

    Example:
        >>> def build(pipeline):  # a StableDiffusionUpscalePipeline
        ...     return UpscalePolicy.from_pipeline(pipeline, lora_rank=16, guidance_scale=9.0, num_steps=75)

    References:
        Rombach et al., High-Resolution Image Synthesis with Latent Diffusion Models, 2021,
        https://arxiv.org/abs/2112.10752
    """

    def __init__(
        self,
        unet: nn.Module,
        autoencoder: Autoencoder,
        process: NoiseProcess,
        prompts: Prompts,
        negative: Prompts | None = None,
        *,
        low_res_scheduler: Any,
        noise_level: int = 20,
        train: Literal["unet"] = "unet",
        **options: Any,
    ) -> None:
        super().__init__(autoencoder, process, prompts, negative, **options)
        self.low_res_scheduler, self.noise_level = low_res_scheduler, noise_level
        self.unet = unet
        self.use(train, unet=unet)

    @classmethod
    def from_pipeline(cls, pipeline: Any, **options: Any) -> Self:
        """The policy of a `StableDiffusionUpscalePipeline`; see `StableDiffusionPolicy.from_pipeline`."""
        return super().from_pipeline(pipeline, low_res_scheduler=pipeline.low_res_scheduler, **options)

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """The degraded images, in [-1, 1] and with noise that is always the same for an input, and the prompts."""
        condition, degraded = super().condition(batch, noise), batch.degraded
        fresh, level = noise("low_res", degraded.shape[1:]), torch.full((1,), self.noise_level, device=degraded.device)
        return {**condition, "low_res": self.low_res_scheduler.add_noise(2 * degraded - 1, fresh, level)}

    def latent_shape(self, condition: Condition) -> tuple[int, ...]:
        """Shape of one row of latents: they are as large as the degraded images."""
        return (self.autoencoder.channels, *condition["degraded"].shape[-2:])

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The output of the UNet for latents and noisy degraded images."""
        dtype = dtype_of(self.unet)
        inputs, prompt = torch.cat([latents, condition["low_res"].to(latents)], 1), condition["prompts"]["prompt"]
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
        process: `DDIM.from_scheduler(pipeline.scheduler)`.
        prompts: Gives "prompt" `[B, L, D]` for a batch, e.g. a `FixedPrompt`.
        negative: The same for what guidance leads away from.
        timestep: The timestep of the UNet's one step.
        noise_timestep: The timestep up to which the latents get noise; None adds none.
        train: What trains: "unet", "encoder" or "both"; of a network with adapters only these. `Autoencoder` freezes
            all, so adapters of the encoder are added later: `add_lora(autoencoder.vae.encoder, targets=[...])`.
        loss: The supervised loss `[B]` of restored images and references `[B, 3, H, W]`, for instance squared error
            and LPIPS; None is the mean squared error of the latents, without the decoder.
        exploration: Noise around the restored latents in rollouts.
        options: Those of `StableDiffusionPolicy`, without `num_steps`.

    Example:
        >>> def build(pipeline):  # a StableDiffusionPipeline
        ...     return OneStepPolicy.from_pipeline(pipeline, train="both", lora_rank=4, scale=4, colour_fix="adain")

    References:
        Wu et al., One-Step Effective Diffusion Network for Real-World Image Super-Resolution, 2024,
        https://arxiv.org/abs/2406.08177 (OSEDiff)
        Yue, Liao, Loy, Arbitrary-steps Image Super-resolution via Diffusion Inversion, 2024,
        https://arxiv.org/abs/2412.09013 (InvSR)
        Yi et al., GDPO-SR: Group Direct Preference Optimization for One-Step Generative Image Super-Resolution, 2026,
        https://arxiv.org/abs/2603.16769
    """

    def __init__(
        self,
        unet: nn.Module,
        autoencoder: Autoencoder,
        process: DDIM,
        prompts: Prompts,
        negative: Prompts | None = None,
        *,
        timestep: int = 999,
        noise_timestep: int | None = None,
        train: Literal["unet", "encoder", "both"] = "unet",
        loss: Callable[[Tensor, Tensor], Tensor] | None = None,
        exploration: float = 0.1,
        **options: Any,
    ) -> None:
        # References need latents that stay what they are, and the decoder knows the encoder from before training.
        original = autoencoder if train == "unet" else frozen(copy.deepcopy(autoencoder))
        super().__init__(original, process, prompts, negative, num_steps=1, exploration=exploration, **options)
        self.timestep, self.noise_timestep, self.loss = timestep, noise_timestep, loss
        alpha_bar = float(process.scheduler.alphas_cumprod[timestep])
        self._step = Step(float(timestep), alpha_bar, 1.0)
        self.unet, self.encoder = unet, autoencoder
        self.use(train, unet=unet, encoder=autoencoder)

    @classmethod
    def from_pipeline(
        cls, pipeline: Any, *, train: str | None = None, lora_rank: int | None = None, **options: Any
    ) -> Self:
        """The policy of a `StableDiffusionPipeline`; see `StableDiffusionPolicy.from_pipeline`."""
        autoencoder = Autoencoder(pipeline.vae)
        if train in ("encoder", "both"):
            encoder = autoencoder.vae.encoder
            _ = add_lora(encoder, rank=lora_rank, targets=_ENCODER_LAYERS) if lora_rank else encoder.requires_grad_()
        options = {"train": train, "lora_rank": lora_rank, "autoencoder": autoencoder, **options}
        return super().from_pipeline(pipeline, **options)

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """The degraded images, the prompts, and the latents unless the encoder trains."""
        condition = super().condition(batch, noise)
        latents = None if "encoder" in self.trained else self.encoder(condition["degraded"])
        return {**condition, "latents": latents}

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
        dtype, prompt = dtype_of(self.unet), condition["prompts"]["prompt"]
        return self.ask("unet", latents.to(dtype), times, prompt.to(dtype), return_dict=False)[0]

    def sft_loss(self, references: Tensor, condition: Condition, noise: Noise) -> Tensor:
        """The loss that the policy was given, of the restored images or latents."""
        restored = self._restored(self.start(condition, noise), condition, self.predict)
        if self.loss is not None:
            return self.loss(self.autoencoder.decode(restored), references)
        return (restored - self.encode(references, condition)).square().flatten(1).mean(1)

    def noised(self, clean: Tensor, condition: Condition, noise: Noise) -> Noised:
        """Clean latents with noise, at the timesteps of the one step: the network knows no others."""
        if self.noise_timestep is None or "unet" not in self.trained:
            raise ValueError(
                "OneStepPolicy expected a noise_timestep and a UNet that trains, to learn from samples with noise. Use "
                "ClippedPolicyGradient or GroupDPO with rollouts of eta > 0, or DirectRewardGradient."
            )
        fresh, times = noise("noise", clean.shape[1:]), self._times(clean, self.timestep)
        latents = self.process.add_noise(clean, fresh, self._times(clean, self.noise_timestep))
        return Noised(latents, times, self.process.target(clean, fresh, times))

    def _restored(self, noise: Tensor, condition: Condition, output: Callable[..., Tensor]) -> Tensor:
        """The clean latents that the network's `output` stands for."""
        latents = condition["latents"]
        if latents is None:
            latents = self.ask("encoder", condition["degraded"])
        if self.noise_timestep is not None:
            latents = self.process.add_noise(latents, noise, self._times(latents, self.noise_timestep))
        times = self._times(latents, self.timestep)
        return self.process.clean(output(latents, times, condition), latents, times)

    @staticmethod
    def _times(like: Tensor, timestep: int) -> Tensor:
        return torch.full((like.shape[0],), timestep, device=like.device)


def _encoded(pipeline: Any, prompts: list[str], device: Any) -> Condition:
    return {"prompt": pipeline.encode_prompt(prompts, device, 1, False)[0]}
