"""Tiny pipelines of Stable Diffusion with seeded random weights, text encoder and tokenizer included."""

import diffusers
import torch
import transformers

from tests.diffusion.policies.flow_pipelines import seeded

SIZE = 16  # of images; 8x8 latents
BLOCKS = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 2}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
SIZES = {"block_out_channels": (8, 8), "layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 4}
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


def vae(levels=2, **options):
    """An autoencoder with factor 2 ** (levels - 1), whose posterior is as good as its mean."""
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    sizes = {"block_out_channels": (8,) * levels, "norm_num_groups": 4, "latent_channels": 4}
    module = seeded(lambda: diffusers.AutoencoderKL(**blocks, **sizes, **options), seed=1)
    with torch.no_grad():
        module.quant_conv.weight[4:].zero_()
        module.quant_conv.bias[4:] = -30.0
    return module


def unet(channels=4, **options):
    """A latent UNet with cross-attention."""
    return seeded(lambda: diffusers.UNet2DConditionModel(8, channels, 4, **SIZES, **BLOCKS, **UP, **options), seed=2)


def controlnet():
    """A ControlNet whose zero layers are no longer zero, as after training."""
    embedding = {"conditioning_embedding_out_channels": (4, 8)}
    return seeded(lambda: diffusers.ControlNetModel(4, **SIZES, **BLOCKS, **embedding), seed=3)


def texts():
    """A CLIP text encoder and a tokenizer that knows letters alone."""
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer({word: number for number, word in enumerate(words)}, [])
    tokenizer.model_max_length = 12
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    tokens = {"vocab_size": len(words), "bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1}
    config = transformers.CLIPTextConfig(**sizes, **tokens, max_position_embeddings=12)
    return {"tokenizer": tokenizer, "text_encoder": seeded(lambda: transformers.CLIPTextModel(config), seed=4)}


def quiet(pipeline):
    """The pipeline without a progress bar."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _unsafe():
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


def text_to_image(scheduler=None, kind=diffusers.StableDiffusionPipeline):
    """A StableDiffusionPipeline, or an image-to-image one."""
    scheduler = scheduler or diffusers.DDIMScheduler(**BETAS, timestep_spacing="trailing", steps_offset=1)
    return quiet(kind(vae=vae(), unet=unet(), scheduler=scheduler, **texts(), **_unsafe()))


def controlled(scheduler=None):
    """A StableDiffusionControlNetPipeline."""
    scheduler = scheduler or diffusers.DDIMScheduler(**BETAS, steps_offset=1, set_alpha_to_one=False)
    parts = {"vae": vae(), "unet": unet(), "controlnet": controlnet(), "scheduler": scheduler}
    return quiet(diffusers.StableDiffusionControlNetPipeline(**parts, **texts(), **_unsafe()))


def upscaling():
    """A StableDiffusionUpscalePipeline, x4."""
    scheduler = diffusers.DDIMScheduler(**BETAS, prediction_type="v_prediction", set_alpha_to_one=False, steps_offset=1)
    low = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    parts = {"vae": vae(3, scaling_factor=0.08333), "unet": unet(7, num_class_embeds=1000), "scheduler": scheduler}
    return quiet(diffusers.StableDiffusionUpscalePipeline(**parts, **texts(), low_res_scheduler=low))
