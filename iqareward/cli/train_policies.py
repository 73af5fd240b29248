"""The policies that `iqareward train` knows by name, and the folder that a trained one is written to."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import safetensors.torch
import torch

from iqareward.atomic import atomic_folder
from iqareward.diffusion import (
    DDIM,
    ControlNetPolicy,
    FeedForwardPolicy,
    FlowPolicy,
    FluxKontextPolicy,
    OneStepPolicy,
    PixelPolicy,
    Policy,
    QwenImageEditPolicy,
    SD3ControlNetPolicy,
    TrainedTogether,
    UpscalePolicy,
    build_restorer,
    load_restorer,
    save_restorer,
)
from iqareward.diffusion.checkpoint import trained_weights
from iqareward.diffusion.finite import require_finite
from iqareward.optional import require_diffusers

Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Pretrained:
    """Makes a policy of a pipeline of diffusers, by hub id or folder.

    Args:
        policy: The class of the policy.
        pipeline: The class of the pipeline.
    """

    policy: Any
    pipeline: str

    @property
    def then(self) -> Callable[..., Policy]:
        """What further options belong to."""
        return self.policy.from_pipeline

    def __call__(self, pipeline: str, *, dtype: Dtype = "float32", **options: Any) -> Policy:
        """The policy; `dtype` is that of frozen weights, those that train are in float32."""
        return self.policy.from_pipeline(_loaded(self.pipeline, pipeline, dtype), **options)


@dataclass(frozen=True)
class Controlled(Pretrained):
    """The same for a pipeline with a ControlNet, which may be a model of its own."""

    def __call__(
        self, pipeline: str, *, controlnet: str | None = None, dtype: Dtype = "float32", **options: Any
    ) -> Policy:
        """The policy; without `controlnet` the pipeline holds one."""
        parts = {} if controlnet is None else {"controlnet": _loaded("AutoModel", controlnet, dtype)}
        return self.policy.from_pipeline(_loaded(self.pipeline, pipeline, dtype, **parts), **options)


def _loaded(kind: str, source: str, dtype: Dtype, **parts: Any) -> Any:
    """A pipeline or a network of diffusers."""
    diffusers = require_diffusers("iqareward train")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # its other name is not in older versions
        return getattr(diffusers, kind).from_pretrained(source, torch_dtype=getattr(torch, dtype), **parts)


PRESETS: dict[str, Callable[..., Policy]] = {
    "tiny": partial(build_restorer, (16, 32, 32), layers=1),
    "small": partial(build_restorer, (32, 64, 128), layers=1),
    "base": partial(build_restorer, (64, 128, 256), layers=2),
}
"""Pixel models that are trained from scratch."""

POLICIES: dict[str, Callable[..., Policy]] = {
    "PixelPolicy": load_restorer,
    "FeedForwardPolicy": FeedForwardPolicy.from_checkpoint,
    "ControlNetPolicy": Controlled(ControlNetPolicy, "StableDiffusionControlNetPipeline"),
    "UpscalePolicy": Pretrained(UpscalePolicy, "StableDiffusionUpscalePipeline"),
    "OneStepPolicy": Pretrained(OneStepPolicy, "StableDiffusionPipeline"),
    "SD3ControlNetPolicy": Controlled(SD3ControlNetPolicy, "StableDiffusion3ControlNetPipeline"),
    "FlowPolicy": Pretrained(FlowPolicy, "StableDiffusion3Pipeline"),
    "FluxKontextPolicy": Pretrained(FluxKontextPolicy, "FluxKontextPipeline"),
    "QwenImageEditPolicy": Pretrained(QwenImageEditPolicy, "QwenImageEditPipeline"),
}
"""Policies with pretrained weights, by name, and the function that loads each."""


def save_policy(policy: Policy, folder: Path) -> list[str]:
    """Write what was trained; returns a sentence for each part that says how to load it.

    Raises:
        TrainingError: A weight is not finite.
    """
    if isinstance(policy, PixelPolicy) and isinstance(policy.process, DDIM):
        save_restorer(policy, folder)
        return [f"{folder}/ is the trained restorer, for iqareward.diffusion.load_restorer"]
    model = policy.model
    require_finite("The model", trained_weights(model))
    parts = dict(model.items()) if isinstance(model, TrainedTogether) else {"": model}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as whole:
        return [_save(part, whole / name, folder / name, f'["{name}"]' if name else "") for name, part in parts.items()]


def _save(part: Any, folder: Path, shown: Path, item: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    if hasattr(part, "peft_config") and hasattr(part, "disable_adapter"):
        part.save_pretrained(folder, save_embedding_layers=False)
        network = type(part.get_base_model()).__name__
        return f'{shown}/ has the adapters: peft.PeftModel.from_pretrained(network, "{shown}"), network a {network}'
    if hasattr(part, "save_pretrained"):
        part.save_pretrained(folder)
        return f'{shown}/ has the trained network: diffusers.{type(part).__name__}.from_pretrained("{shown}")'
    whole = all(weight.requires_grad for weight in part.parameters())
    weights = {name: value.detach().cpu() for name, value in part.state_dict().items()} if whole else {}
    weights = {name: value.clone().contiguous() for name, value in (weights or trained_weights(part)).items()}
    _ = (folder / "model.safetensors").write_bytes(safetensors.torch.save(weights))
    return (
        f"{shown}/model.safetensors has the trained weights: "
        f"policy.model{item}.load_state_dict(safetensors.torch.load_file(file), strict=False)"
    )
