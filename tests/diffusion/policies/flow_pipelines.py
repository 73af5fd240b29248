"""Tiny pipelines of flow models with seeded random weights, whose text encoders are replaced by hashes of words."""

import inspect
import zlib

import diffusers
import torch

SIZE = 16  # of images; 8x8 latents, 16 tokens


def seeded(build, seed=0):
    """The module that `build` makes, with weights that do not depend on what ran before and no zero layers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = build().eval()
        with torch.no_grad():
            for weight in module.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
    return module


def vae(**options):
    """An autoencoder with factor 2, whose posterior is as good as its mean (a sample of it is asked by a pipeline)."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4, "shift_factor": 0.1}
    module = seeded(lambda: diffusers.AutoencoderKL(**blocks, **sizes, scaling_factor=1.5), seed=1)
    with torch.no_grad():
        module.quant_conv.weight[4:].zero_()
        module.quant_conv.bias[4:] = -30.0
    return module


def words(texts, *shape):
    """One array `[B, *shape]` for the texts, the same for the same text."""
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode()))) for text in texts]
    return torch.stack(rows)


def with_words(pipeline, encode):
    """The pipeline, which encodes prompts by `encode(**arguments)`; embeddings that are given are passed on."""
    original = pipeline.encode_prompt
    signature = inspect.signature(original)

    def encode_prompt(*values, **named):
        arguments = signature.bind(*values, **named).arguments
        given = arguments.get("prompt_embeds") is not None
        return original(*values, **named) if given else encode(**arguments)

    pipeline.encode_prompt = encode_prompt
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 4,
    "num_attention_heads": 2,
    "caption_projection_dim": 8,
    "pooled_projection_dim": 8,
    "pos_embed_max_size": 16,
}


def sd3(kind=diffusers.StableDiffusion3Pipeline, **parts):
    """A pipeline of Stable Diffusion 3."""
    transformer = seeded(lambda: diffusers.SD3Transformer2DModel(**SD3, num_layers=2, joint_attention_dim=8), seed=2)

    def encode(prompt, **_):
        return words(prompt, 3, 8), None, words([f"pooled {text}" for text in prompt], 8), None

    pipeline = kind(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(),
        **{f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")},
        **parts,
    )
    return with_words(pipeline, encode)


def sd3_controlnet(*, reads_prompt=True, plain=False):
    """A StableDiffusion3ControlNetPipeline; ControlNets that read no prompt, or no pooled one, exist."""
    options = {"force_zeros_for_pooled_projection": plain, "joint_attention_dim": 8 if reads_prompt else None}
    controlnet = seeded(lambda: diffusers.SD3ControlNetModel(**SD3, num_layers=1, **options), seed=3)
    return sd3(diffusers.StableDiffusion3ControlNetPipeline, controlnet=controlnet)


def flux_kontext(*, guidance_embeds=True, dtype=torch.float32):
    """A FluxKontextPipeline."""
    sizes = {"in_channels": 16, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 8}
    layers = {"num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (2, 2, 4), "pooled_projection_dim": 8}
    transformer = seeded(
        lambda: diffusers.FluxTransformer2DModel(**sizes, **layers, guidance_embeds=guidance_embeds), seed=4
    )

    def encode(prompt, **_):
        return words(prompt, 3, 8), words([f"pooled {text}" for text in prompt], 8), torch.zeros(3, 3)

    pipeline = diffusers.FluxKontextPipeline(
        transformer=transformer.to(dtype),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae().to(dtype),
        **{f"{part}{number}": None for part in ("text_encoder", "tokenizer") for number in ("", "_2")},
    )
    return with_words(pipeline, encode)


def qwen_edit(*, dtype=torch.float32):
    """A QwenImageEditPipeline whose prompts differ in length and depend on the picture."""
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0]}
    autoencoder = seeded(
        lambda: diffusers.AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], **statistics
        ),
        seed=5,
    )
    sizes = {"in_channels": 16, "out_channels": 4, "attention_head_dim": 8, "num_attention_heads": 2}
    layers = {"num_layers": 2, "joint_attention_dim": 8, "axes_dims_rope": (2, 2, 4)}
    transformer = seeded(lambda: diffusers.QwenImageTransformer2DModel(**sizes, **layers), seed=6)

    def encode(prompt, image, **_):
        longest = max(len(text.split()) + 2 for text in prompt)
        mask = torch.stack([torch.arange(longest) < len(text.split()) + 2 for text in prompt]).long()
        means = torch.stack([torch.tensor(picture.getextrema()).float().mean() / 255 for picture in image])
        embeddings = (words(prompt, 9, 8)[:, :longest] + means[:, None, None]) * mask[..., None]
        return embeddings, None if bool(mask.all()) else mask

    dynamic = {"use_dynamic_shifting": True, "shift_terminal": 0.02, "base_shift": 0.5, "max_shift": 0.9}
    pipeline = diffusers.QwenImageEditPipeline(
        transformer=transformer.to(dtype),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, max_image_seq_len=8192, **dynamic),
        vae=autoencoder.to(dtype),
        text_encoder=None,
        tokenizer=None,
        processor=None,
    )
    return with_words(pipeline, encode)
