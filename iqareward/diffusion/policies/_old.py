"""Restoration models as policies: what the trainer calls, and ready-made policies for networks of diffusers."""

from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iqareward.diffusion.processes import NoiseProcess
from iqareward.functional._chunks import rows_at_once

Condition = dict[str, Tensor]
"""The network's input besides the noisy latents: named tensors, made from the degraded images, batch first."""


class Policy(Protocol):
    """A conditional diffusion model as the trainer uses it; `PixelPolicy`, `ControlNetPolicy`, `FlowPolicy` are three.

    Any other model is one class with these members; `docs/how-to/own-policy.md` writes one.

    Attributes:
        model: The module that is trained. The trainer replaces it by its distributed wrapper, so always call
            `self.model`.
        process: How noise is added and taken away.

    Example:
        >>> import torch
        >>> from iqareward.diffusion import build_restorer
        >>> policy: Policy = build_restorer((8, 16))
        >>> policy.decode(policy.encode(torch.full((1, 3, 8, 8), 0.25))).unique()
        tensor([0.2500])
    """

    model: nn.Module

    @property
    def process(self) -> NoiseProcess: ...

    def latent_shape(self, degraded: Tensor) -> tuple[int, ...]:
        """Shape of one row of latents for degraded images of this size."""
        ...

    def condition(self, degraded: Tensor) -> Condition:
        """What `predict` needs of the degraded images `[B, 3, H, W]` in [0, 1]; computed once per rollout."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Latents `[B, ...]` of clean images `[B, 3, H, W]` in [0, 1]."""
        ...

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The network's output `[N, ...]` for `latents` `[N, ...]` at `times` `[N]`; with a gradient if enabled."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` of clean latents, in [0, 1] up to overshoots; the caller clamps."""
        ...

    def sft_loss(self, references: Tensor, condition: Condition, noise: Tensor, times: Tensor) -> Tensor:
        """The model's own supervised loss `[B]` for references `[B, 3, H, W]` in [0, 1]."""
        ...


def denoising_loss(policy: Policy, clean: Tensor, condition: Condition, noise: Tensor, times: Tensor) -> Tensor:
    """Mean squared error of the network's output per row: the loss that diffusion models are trained with.

    Args:
        policy: The model.
        clean: `[B, ...]` latents of the references.
        condition: The result of `policy.condition` for the same inputs.
        noise: `[B, ...]` standard normal.
        times: `[B]` from `policy.process.draw_times`.

    Returns:
        `[B]` fp32.

    Example:
        >>> from iqareward.diffusion import build_restorer
        >>> policy, images = build_restorer((8, 16)), torch.rand(2, 3, 8, 8)
        >>> clean, condition = policy.encode(images), policy.condition(images)
        >>> denoising_loss(policy, clean, condition, torch.randn(2, 3, 8, 8), torch.tensor([10, 500])).shape
        torch.Size([2])

    References:
        Ho, Jain, Abbeel, Denoising Diffusion Probabilistic Models, 2020, https://arxiv.org/abs/2006.11239
    """
    latents = policy.process.add_noise(clean, noise, times)
    target = policy.process.target(clean, noise, times)
    output = policy.predict(latents, times, condition)
    return (output.float() - target.float()).square().flatten(1).mean(1)


def select(condition: Condition, inputs: Tensor | slice) -> Condition:
    """The condition of these inputs."""
    return {name: values[inputs] for name, values in condition.items()}


def repeat(condition: Condition, group_size: int) -> Condition:
    """Each row `group_size` times, side by side: one for each rollout of an input."""
    return {name: values.repeat_interleave(group_size, 0) for name, values in condition.items()}


def unwrapped(model: nn.Module) -> Any:
    """The model itself, out of `DistributedDataParallel`."""
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def add_lora(model: nn.Module, *, rank: int = 16, targets: str | list[str] = "all-linear") -> nn.Module:
    """Add low-rank adapters with peft; they are the only weights that train from here on.

    Args:
        model: A network of diffusers or any other module.
        rank: Rank of the adapters, also their alpha.
        targets: Names of the layers that get one, or peft's "all-linear".

    Returns:
        A `peft.PeftModel`; with its adapters off it is the model from before, the reference policy for KL.

    Example:
        >>> model = add_lora(nn.Sequential(nn.Linear(100, 100)), rank=2, targets=["0"])
        >>> sum(weights.numel() for weights in model.parameters() if weights.requires_grad)
        400

    References:
        Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, https://arxiv.org/abs/2106.09685
    """
    from peft import LoraConfig, PeftModel

    # Not `get_peft_model`: for "all-linear" it looks for a configuration that only transformers models have.
    return PeftModel(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights="gaussian"))  # pyright: ignore[reportArgumentType]


@contextmanager
def reference_policy(policy: Policy, frozen: nn.Module | None = None) -> Generator[None]:
    """Within this context the policy acts as before RL, without a gradient; KL is measured against that.

    Args:
        policy: The model.
        frozen: A copy of its module from before RL. A LoRA model needs none: its adapters are switched off.

    Returns:
        A context manager.

    Raises:
        TypeError: The model has no adapters and there is no copy.

    Example:
        >>> from iqareward.diffusion import build_restorer
        >>> policy = build_restorer((8, 16))
        >>> policy.model = add_lora(policy.model, rank=2, targets=["conv_in"])
        >>> with reference_policy(policy):
        ...     torch.is_grad_enabled()
        False
    """
    with torch.no_grad():
        if frozen is None:
            bare = unwrapped(policy.model)
            if not hasattr(bare, "disable_adapter"):
                raise TypeError(
                    f"reference_policy expected a model with LoRA adapters, got {type(bare).__name__}. "
                    "Wrap it with add_lora(model) first, or train without KL."
                )
            with bare.disable_adapter():
                yield
            return
        trained, policy.model = policy.model, frozen
        try:
            yield
        finally:
            policy.model = trained


@dataclass(eq=False)
class Autoencoder:
    """A `diffusers.AutoencoderKL` with its scaling and shift, its weights frozen.

    It runs on as many images at a time as fit a budget of memory: 4 GiB, or an eighth of a smaller GPU.

    Args:
        vae: The autoencoder, e.g. `pipeline.vae`.
        checkpointed: Decode under activation checkpointing when a gradient is wanted, for less memory: the activations
            of one part of the images are kept at a time.

    Example:
        >>> import diffusers
        >>> vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
        >>> autoencoder = Autoencoder(vae)
        >>> autoencoder.encode(torch.rand(1, 3, 16, 16)).shape
        torch.Size([1, 4, 16, 16])
    """

    vae: Any
    checkpointed: bool = True

    def __post_init__(self) -> None:
        self.vae.requires_grad_(False).eval()
        config = self.vae.config
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.channels, self.scale = config.latent_channels, config.scaling_factor
        self.shift = getattr(config, "shift_factor", None) or 0.0

    def latent_shape(self, images: Tensor) -> tuple[int, ...]:
        """Shape of one row of latents; a ValueError if a side is not a multiple of the autoencoder's factor."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"Autoencoder expected images whose sides are multiples of {self.factor}, got {height}x{width}. "
                "Crop or pad them."
            )
        return (self.channels, height // self.factor, width // self.factor)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Latents `[B, C, h, w]` fp32 of images `[B, 3, H, W]` in [0, 1]; the mean, without sampling."""
        size = self._rows_at_once(images.shape[2:], images.device)
        return torch.cat([self._latents(part) for part in images.split(size)])

    def decode(self, latents: Tensor) -> Tensor:
        """Images `[N, 3, H, W]` fp32, in [0, 1] up to overshoots."""
        wanted = torch.is_grad_enabled() and latents.requires_grad
        sides = [side * self.factor for side in latents.shape[2:]]
        parts = latents.split(self._rows_at_once(sides, latents.device, gradient=wanted))
        if self.checkpointed and wanted:
            pixels: list[Any] = [checkpoint(self._pixels, part, use_reentrant=False) for part in parts]
        else:
            pixels = [self._pixels(part) for part in parts]
        return torch.cat(pixels)

    def _latents(self, images: Tensor) -> Tensor:
        latents = self.vae.encode((2 * images - 1).to(_dtype_of(self.vae))).latent_dist.mode()
        return (latents.float() - self.shift) * self.scale

    def _pixels(self, latents: Tensor) -> Tensor:
        latents = (latents / self.scale + self.shift).to(_dtype_of(self.vae))
        return (self.vae.decode(latents).sample.float() + 1) / 2

    def _rows_at_once(self, size: Sequence[int], device: torch.device, *, gradient: bool = False) -> int:
        """How many images of (height, width) to run on at a time."""
        config = self.vae.config
        # Of full size are maps as wide as the second block. Three of them live at once (and 30 GiB were measured for 64
        # images of 512x512, nearly four), or for a gradient 25 with the usual two layers in a block.
        maps = 9 * (config.layers_per_block + 1) + 1 if gradient else 4
        width = max(config.block_out_channels[:2]) * next(self.vae.parameters()).element_size()
        return rows_at_once(size, device, bytes_per_pixel=maps * width)


@dataclass(eq=False)
class PixelPolicy:
    """A `diffusers.UNet2DModel` with 6 input channels, noisy and degraded image, both in [-1, 1].

    Args:
        model: The network: 3 output channels.
        process: How noise is added and taken away.
        residual: The network predicts the change to the degraded image. For models that predict the sample: they then
            start from doing nothing and learn in a fraction of the time.

    Raises:
        ValueError: `residual` with a model that predicts noise or v.

    Example:
        >>> import diffusers, torch
        >>> from iqareward.diffusion import DDIM
        >>> unet = diffusers.UNet2DModel(16, 6, 3, block_out_channels=(8, 8), norm_num_groups=4,
        ...     down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)
        >>> policy = PixelPolicy(unet, DDIM(diffusers.DDIMScheduler()))
        >>> policy.latent_shape(torch.rand(2, 3, 16, 16))
        (3, 16, 16)

    References:
        Saharia et al., Image Super-Resolution via Iterative Refinement, 2021, https://arxiv.org/abs/2104.07636
    """

    model: nn.Module
    process: NoiseProcess
    residual: bool = False

    def __post_init__(self) -> None:
        scheduler = getattr(self.process, "scheduler", None)
        if self.residual and getattr(getattr(scheduler, "config", None), "prediction_type", None) != "sample":
            raise ValueError(
                "PixelPolicy with residual=True expected a scheduler with prediction_type='sample': noise is not a "
                "change to the degraded image. Change the scheduler, or leave residual out."
            )

    def latent_shape(self, degraded: Tensor) -> tuple[int, ...]:
        """Shape of one image."""
        return tuple(degraded.shape[1:])

    def condition(self, degraded: Tensor) -> Condition:
        """The degraded image in [-1, 1]."""
        return {"degraded": self.encode(degraded)}

    def encode(self, images: Tensor) -> Tensor:
        """Scale [0, 1] to [-1, 1]."""
        return 2 * images - 1

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The output of the UNet, added to the degraded image if it is residual."""
        degraded = condition["degraded"].to(latents)
        output = self.model(torch.cat([latents, degraded], 1).to(_dtype_of(self.model)), times).sample
        return degraded + output if self.residual else output

    def decode(self, latents: Tensor) -> Tensor:
        """Scale [-1, 1] to [0, 1]."""
        return (latents.float() + 1) / 2

    def sft_loss(self, references: Tensor, condition: Condition, noise: Tensor, times: Tensor) -> Tensor:
        """The denoising loss."""
        return denoising_loss(self, self.encode(references), condition, noise, times)


class _LatentPolicy(ABC):
    """What policies in the latent space of a frozen autoencoder share."""

    model: nn.Module
    autoencoder: Autoencoder
    process: NoiseProcess

    @abstractmethod
    def condition(self, degraded: Tensor) -> Condition: ...

    @abstractmethod
    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor: ...

    def latent_shape(self, degraded: Tensor) -> tuple[int, ...]:
        """Shape of one row of the autoencoder's latents."""
        return self.autoencoder.latent_shape(degraded)

    def encode(self, images: Tensor) -> Tensor:
        """Latents of the autoencoder."""
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Images of the autoencoder."""
        return self.autoencoder.decode(latents)

    def sft_loss(self, references: Tensor, condition: Condition, noise: Tensor, times: Tensor) -> Tensor:
        """The denoising loss in latent space."""
        return denoising_loss(self, self.encode(references), condition, noise, times)


@dataclass(eq=False)
class ControlNetPolicy(_LatentPolicy):
    """A frozen latent UNet steered by a trained `diffusers.ControlNetModel`, with one fixed prompt.

    Restoration needs no prompt of its own: encode an empty or a general one once. There is no classifier-free guidance.

    Args:
        model: The ControlNet; the part that trains, usually in float32.
        unet: The `UNet2DConditionModel`; frozen, in any dtype.
        autoencoder: The frozen autoencoder.
        prompt: `[1, L, D]` embedding of the fixed prompt, e.g. from `pipeline.encode_prompt`; the first call moves it
            to the device of the latents.
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
    process: NoiseProcess

    def __post_init__(self) -> None:
        self.unet.requires_grad_(False).eval()

    def condition(self, degraded: Tensor) -> Condition:
        """The degraded pixels, which a ControlNet embeds."""
        return {"degraded": degraded}

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The output of the UNet with the ControlNet's residuals."""
        self.prompt = self.prompt.to(latents.device)  # once: a copy in every step would make the host wait
        prompt = self.prompt.expand(latents.shape[0], -1, -1)
        # The trained ControlNet is usually float32 (accelerate even makes its residuals so), the frozen UNet bfloat16.
        own, frozen = _dtype_of(self.model), _dtype_of(self.unet)
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


@dataclass(eq=False)
class FlowPolicy(_LatentPolicy):
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

    model: nn.Module
    autoencoder: Autoencoder
    prompt: Tensor
    pooled_prompt: Tensor
    process: NoiseProcess

    def condition(self, degraded: Tensor) -> Condition:
        """Latents of the degraded image."""
        return {"degraded": self.autoencoder.encode(degraded)}

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The velocity."""
        # once: a copy in every step would make the host wait
        self.prompt, self.pooled_prompt = self.prompt.to(latents.device), self.pooled_prompt.to(latents.device)
        dtype, count = _dtype_of(self.model), latents.shape[0]
        return self.model(
            hidden_states=torch.cat([latents.to(dtype), condition["degraded"].to(dtype)], 1),
            timestep=times,
            encoder_hidden_states=self.prompt.to(dtype).expand(count, -1, -1),
            pooled_projections=self.pooled_prompt.to(dtype).expand(count, -1),
        ).sample
