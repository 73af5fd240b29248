"""Prompt embeddings of a batch: the same prompt for every input, or each input's own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch
from torch import Tensor

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition

Prompts: TypeAlias = Callable[[Batch], Condition]
"""Gives the prompt embeddings of a batch, one row per input: `FixedPrompt`, `PipelinePrompts` or a function."""


@dataclass(eq=False)
class FixedPrompt:
    """The same prompt for every input, encoded once; the text encoders can be dropped afterwards.

    Args:
        embeddings: Named tensors with one row each; the names are those that the policy documents.

    Example:
        >>> prompts = FixedPrompt({"prompt": torch.zeros(1, 77, 8), "pooled": torch.zeros(1, 8)})
        >>> prompts(Batch((3, 5), torch.rand(2, 3, 8, 8)))["prompt"].shape
        torch.Size([2, 77, 8])
    """

    embeddings: dict[str, Tensor | None]

    def __call__(self, batch: Batch) -> Condition:
        """The embeddings, repeated for each input."""
        rows = len(batch)
        return {name: value if value is None else value.expand(rows, *value.shape[1:]) for name, value in self._items()}

    def to(self, device: torch.device | str) -> Self:
        """Move the embeddings."""
        self.embeddings = {name: value if value is None else value.to(device) for name, value in self._items()}
        return self

    def _items(self) -> list[tuple[str, Tensor | None]]:
        return list(self.embeddings.items())


@dataclass(eq=False)
class PipelinePrompts:
    """Prompts that the text encoders of a pipeline encode for each batch.

    Args:
        pipeline: A pipeline of diffusers; only its text encoders are used.
        encode: Called with the pipeline, a list of prompts and the degraded images; returns named embeddings.
        text: The prompt of every input; None for the input's own.
    """

    pipeline: Any
    encode: Callable[[Any, list[str], Tensor], Condition]
    text: str | None = None

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Condition:
        """The embeddings, one row per input."""
        prompts = batch.prompts if self.text is None else (self.text,) * len(batch)
        if prompts is None:
            raise ValueError(
                "PipelinePrompts expected a prompt with each input, got data without prompts. Give the data prompts, "
                "or the policy one fixed `prompt`."
            )
        return self.encode(self.pipeline, list(prompts), batch.degraded)

    def to(self, device: torch.device | str) -> Self:
        """Move the text encoders."""
        for name, part in self.pipeline.components.items():
            if name.startswith("text_encoder") and part is not None:
                part.to(device)
        return self


def prompts_of(
    pipeline: Any, encode: Callable[[Any, list[str], Tensor], Condition], text: str | None
) -> FixedPrompt | PipelinePrompts:
    """A fixed prompt, encoded now, or the inputs' own if `text` is None."""
    if text is None:
        return PipelinePrompts(pipeline, encode)
    with torch.no_grad():
        return FixedPrompt(encode(pipeline, [text], torch.empty(0, device=pipeline.device)))
