"""Prompt embeddings of a batch, and what policies that read them share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition
from iqareward.diffusion.policies.autoencoders import Autoencoder
from iqareward.diffusion.policies.core import DiffusionPolicy
from iqareward.diffusion.processes import NoiseProcess

Prompts: TypeAlias = Callable[[Batch], Condition]
"""Gives the prompt embeddings of a batch, one row per input: `FixedPrompt`, `PipelinePrompts` or a function."""


@dataclass(eq=False)
class FixedPrompt:
    """The same prompt for every input, encoded once.

    Args:
        embeddings: Named tensors with one row each; the names are those that the policy documents.

    Example:
        >>> prompts = FixedPrompt({"prompt": torch.zeros(1, 77, 8), "pooled": torch.zeros(1, 8)})
        >>> prompts(Batch((3, 5), torch.rand(2, 3, 8, 8)))["prompt"].shape
        torch.Size([2, 77, 8])
    """

    embeddings: dict[str, Tensor]

    def __call__(self, batch: Batch) -> Condition:
        """The embeddings, repeated for each input."""
        return {name: value.expand(len(batch), *value.shape[1:]) for name, value in self.embeddings.items()}

    def to(self, device: torch.device | str) -> Self:
        """Move the embeddings."""
        self.embeddings = {name: value.to(device) for name, value in self.embeddings.items()}
        return self


class PipelinePrompts:
    """The inputs' own prompts, encoded for each batch by a pipeline; a fixed one for inputs without.

    The text encoders, which can be larger than a GPU, move to the device of a batch when it first has prompts.

    Args:
        pipeline: A pipeline of diffusers; only its text encoders are used.
        encode: Called with the pipeline, a list of prompts and a device or None; returns named embeddings.
        text: The fixed prompt.
    """

    def __init__(self, pipeline: Any, encode: Callable[[Any, list[str], Any], Condition], text: str) -> None:
        self.pipeline, self.encode = pipeline, encode
        with torch.no_grad():
            self.fixed = FixedPrompt(encode(pipeline, [text], None))

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Condition:
        """The embeddings, one row per input."""
        if batch.prompts is None:
            return self.fixed(batch)
        move_text_encoders(self.pipeline, batch.degraded.device)
        return self.encode(self.pipeline, list(batch.prompts), batch.degraded.device)

    def to(self, device: torch.device | str) -> Self:
        """Move the fixed prompt."""
        self.fixed.to(device)
        return self


def move_text_encoders(pipeline: Any, device: torch.device) -> None:
    """Move the text encoders of a pipeline."""
    for name, part in pipeline.components.items():
        if name.startswith("text_encoder") and part is not None:
            part.to(device)


class PromptedPolicy(DiffusionPolicy):
    """A diffusion model in the latents of a frozen autoencoder, with prompts and guidance; write `predict`.

    Its condition has "latents" of the degraded images, "prompts" and "negative".

    Args:
        autoencoder: The frozen autoencoder.
        process: How noise is added and taken away.
        prompts: Gives the embeddings of a batch.
        negative: The same for what guidance leads away from.
        guidance_scale: Scale of classifier-free guidance in sampling; 1 is none.
        num_steps: Steps of the sampler.
        eta: Noise of each step, as the process takes it.
        exploration: Noise of each step in rollouts.

    Raises:
        ValueError: There is guidance, and there are no negative prompts.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        process: NoiseProcess,
        prompts: Prompts,
        negative: Prompts | None = None,
        *,
        guidance_scale: float = 1.0,
        num_steps: int = 28,
        eta: float = 0.0,
        exploration: float = 0.7,
    ) -> None:
        if guidance_scale != 1 and negative is None:
            raise ValueError(
                f"{type(self).__name__} expected `negative` prompts for guidance_scale={guidance_scale}, got none. "
                "Give the embeddings of an empty text, or guidance_scale=1."
            )
        self.autoencoder, self.process, self.prompts, self.negative = autoencoder, process, prompts, negative
        self.guidance_scale, self.num_steps = guidance_scale, num_steps
        self.eta, self.exploration = eta, exploration

    def condition(self, batch: Batch, noise: Any) -> Condition:
        """Latents of the degraded images, and the embeddings of the prompts."""
        negative = None if self.negative is None else self.negative(batch)
        return {
            "latents": self.autoencoder.encode(batch.degraded),
            "prompts": self.prompts(batch),
            "negative": negative,
        }

    def unconditional(self, condition: Condition) -> Condition:
        """The condition with the negative prompts."""
        return {**condition, "prompts": condition["negative"]}

    def encode(self, images: Tensor, condition: Condition) -> Tensor:
        """Latents of the autoencoder."""
        return self.autoencoder.encode(images)

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """Images of the autoencoder."""
        return self.autoencoder.decode(latents)
