"""FLUX.1 Kontext restores on request: adapters of the transformer train, everything else is frozen in bfloat16."""

import diffusers
import torch

from iqareward.diffusion import FluxKontextPolicy


def build(folder: str = "black-forest-labs/FLUX.1-Kontext-dev") -> FluxKontextPolicy:
    """The policy of a `FluxKontextPipeline`."""
    pipeline = diffusers.FluxKontextPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    prompt = "Restore this photograph: remove blur, noise and compression artefacts."
    return FluxKontextPolicy.from_pipeline(pipeline, prompt=prompt, lora_rank=16, checkpointing=True)
