"""Qwen-Image-Edit restores on request: adapters of the transformer train, everything else is frozen in bfloat16."""

import diffusers
import torch

from iqareward.diffusion import QwenImageEditPolicy


def build(folder: str = "Qwen/Qwen-Image-Edit") -> QwenImageEditPolicy:
    """The policy of a `QwenImageEditPipeline`."""
    pipeline = diffusers.QwenImageEditPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    prompts = {"prompt": "Restore this photograph.", "negative_prompt": " "}
    return QwenImageEditPolicy.from_pipeline(pipeline, lora_rank=16, checkpointing=True, guidance_scale=4.0, **prompts)
