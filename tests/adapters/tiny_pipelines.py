"""Real diffusers pipelines with the smallest networks that have every part, without text encoders."""

import diffusers
import torch
from torch import Tensor

from tests.diffusion.tiny import autoencoder, seeded

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
    pipeline = cls(vae=autoencoder().vae, unet=unet, scheduler=scheduler, requires_safety_checker=False, **missing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def flow(scheduler):
    """Stable Diffusion 3's image-to-image pipeline, which is trained by flow matching."""
    sizes = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "joint_attention_dim": 8}
    more = {"caption_projection_dim": 8, "pooled_projection_dim": 8, "pos_embed_max_size": 16}
    shape = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
    transformer = seeded(lambda: diffusers.SD3Transformer2DModel(**shape, **sizes, **more))
    texts = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")]
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline(
        transformer=transformer, vae=autoencoder().vae, scheduler=scheduler, **dict.fromkeys(texts)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt(count: int, *, pooled: bool = False) -> dict[str, Tensor]:
    """Embeddings in place of texts."""
    generator = torch.Generator().manual_seed(4)
    one = torch.randn(1, 3, 8, generator=generator).expand(count, -1, -1)
    embeddings = {"prompt_embeds": one}
    return embeddings | ({"pooled_prompt_embeds": one[:, 0]} if pooled else {})
