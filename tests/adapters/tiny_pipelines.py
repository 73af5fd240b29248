"""Real diffusers pipelines with the smallest networks that have every part, without text encoders."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn

from tests.adapters.restoration_agent import as_pil
from tests.diffusion.policies import flow_pipelines, sd_pipelines
from tests.diffusion.tiny import images, seeded

SIDE = 16  # of images; the autoencoder halves it twice less than Stable Diffusion's
SHARED = {"block_out_channels": (8, 8), "layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 4}


def img2img(scheduler, cls: type = diffusers.StableDiffusionImg2ImgPipeline, in_channels: int = 4):
    """Stable Diffusion's image-to-image pipeline, or one like it."""
    unet = seeded(
        lambda: diffusers.UNet2DConditionModel(
            8, in_channels, 4, attention_head_dim=2, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **SHARED,
        )
    )  # fmt: skip
    missing = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    pipeline = cls(vae=sd_pipelines.vae(), unet=unet, scheduler=scheduler, requires_safety_checker=False, **missing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt(count: int) -> dict[str, Tensor]:
    """Embeddings in place of texts."""
    return {"prompt_embeds": torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(4)).expand(count, -1, -1)}


HEIGHT, WIDTH = 16, 24  # of the images of `KINDS`, which must not be confused


def restated(pipeline, kind: type):
    """A pipeline of another kind with the same networks."""
    names = inspect.signature(kind).parameters
    made = kind(**{name: part for name, part in pipeline.components.items() if name in names})
    made.set_progress_bar_config(disable=True)
    return made


def flux2(*, dtype=torch.float32):
    """A Flux2Pipeline, whose latents are normalised by the statistics of a batch normalisation."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1}
    vae = flow_pipelines.seeded(lambda: diffusers.AutoencoderKLFlux2(**blocks, **sizes))
    with torch.no_grad():
        vae.bn.running_mean.copy_(torch.linspace(-0.5, 0.5, 16))
        vae.bn.running_var.copy_(torch.linspace(0.5, 2, 16))
    sizes = {"in_channels": 16, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8}
    layers = {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (2, 2, 2, 2), "timestep_guidance_channels": 8}
    transformer = flow_pipelines.seeded(lambda: diffusers.Flux2Transformer2DModel(**sizes, **layers))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    parts = {"vae": vae.to(dtype), "transformer": transformer.to(dtype), "scheduler": scheduler}
    pipeline = diffusers.Flux2Pipeline(text_encoder=None, tokenizer=None, **parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class Kind(NamedTuple):
    """A pipeline, what it is given for each image, and the arguments of its calls."""

    build: Callable[..., Any]
    inputs: Callable[[int], dict[str, Any]]
    arguments: dict[str, Any]


def _embeddings(count: int, prefix: str = "", *, pooled: bool = False, mask: bool = False) -> dict[str, Tensor]:
    texts = [f"{prefix}{row}" for row in range(count)]
    found = {f"{prefix}prompt_embeds": flow_pipelines.words(texts, 3, 8)}
    if mask:
        found[f"{prefix}prompt_embeds_mask"] = torch.ones(count, 3, dtype=torch.int64)
    return found | ({f"{prefix}pooled_prompt_embeds": flow_pipelines.words(texts, 8)} if pooled else {})


def _degraded(count: int) -> Tensor:
    return nn.functional.interpolate(images(count), size=(HEIGHT, WIDTH), mode="bilinear")


def _guided(count: int, **options: bool) -> dict[str, Tensor]:
    return _embeddings(count, **options) | _embeddings(count, "negative_", **options)


_SIZE = {"height": HEIGHT, "width": WIDTH}
_FLUX, _QWEN = flow_pipelines.flux_kontext, flow_pipelines.qwen_edit
KINDS = {
    "Stable Diffusion": Kind(sd_pipelines.text_to_image, _guided, {"guidance_scale": 5.0, **_SIZE}),
    "Stable Diffusion 3": Kind(
        flow_pipelines.sd3, functools.partial(_guided, pooled=True), {"guidance_scale": 7.0, **_SIZE}
    ),
    "Flux": Kind(
        lambda **more: restated(_FLUX(**more), diffusers.FluxPipeline),
        functools.partial(_guided, pooled=True),
        {"true_cfg_scale": 2.0, **_SIZE},
    ),
    "Flux image to image": Kind(
        lambda **more: restated(_FLUX(**more), diffusers.FluxImg2ImgPipeline),
        lambda count: _embeddings(count, pooled=True) | {"image": _degraded(count)},
        {"strength": 0.9, **_SIZE},
    ),
    "Flux Kontext": Kind(
        _FLUX,
        lambda count: _embeddings(count, pooled=True) | {"image": _degraded(count)},
        {"max_area": HEIGHT * WIDTH, "_auto_resize": False, **_SIZE},
    ),
    "Flux2": Kind(flux2, _embeddings, _SIZE),
    "Qwen-Image": Kind(
        lambda **more: restated(_QWEN(**more), diffusers.QwenImagePipeline),
        functools.partial(_guided, mask=True),
        {"true_cfg_scale": 4.0, **_SIZE},
    ),
    "Qwen-Image-Edit": Kind(
        _QWEN,
        lambda count: _guided(count, mask=True) | {"image": [as_pil(image) for image in _degraded(count)]},
        {"true_cfg_scale": 4.0, **_SIZE},
    ),
}
