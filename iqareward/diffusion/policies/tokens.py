"""Edit models that read latents as tokens of 2x2: those of the noisy image, followed by those of the degraded one."""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.policies.core import dtype_of
from iqareward.diffusion.policies.prompts import PromptedPolicy
from iqareward.diffusion.processes import Step


class TokenPolicy(PromptedPolicy):
    """What the edit models share: tokens, and noise levels that depend on how many there are; write `velocity`."""

    @abstractmethod
    def velocity(self, tokens: Tensor, times: Tensor, condition: Condition, size: tuple[int, int]) -> Tensor:
        """The network's output `[N, 2 * T, 4 * C]` for the tokens of both images, of height x width = T tokens each.

        `times` `[N]` are in [0, 1].
        """

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """Latents of the degraded images, and the embeddings of the prompts."""
        height, width = batch.degraded.shape[-2:]
        multiple = 2 * self.autoencoder.factor
        if height % multiple or width % multiple:
            raise ValueError(
                f"{type(self).__name__} expected images whose sides are multiples of {multiple}, got {height}x{width}. "
                "Crop or pad them."
            )
        return super().condition(batch, noise)

    def schedule(self, condition: Condition, num_steps: int) -> Sequence[Step]:
        """The steps of the pipeline for images of this size."""
        height, width = condition["latents"].shape[-2:]
        return self.process.schedule(num_steps, tokens=height * width // 4)

    def predict(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:
        """The velocity."""
        height, width = latents.shape[2] // 2, latents.shape[3] // 2
        dtype = dtype_of(self.model)
        tokens = torch.cat([to_tokens(latents), to_tokens(condition["latents"])], 1).to(dtype)
        output = self.velocity(tokens, times.to(dtype) / 1000, condition, (height, width))
        return from_tokens(output[:, : height * width], height)


def to_tokens(latents: Tensor) -> Tensor:
    """Latents `[N, C, 2h, 2w]` as tokens `[N, h * w, 4 * C]`, row by row."""
    return nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT


def from_tokens(tokens: Tensor, height: int) -> Tensor:
    """Tokens `[N, h * w, 4 * C]` as latents `[N, C, 2h, 2w]`, for a height of h tokens."""
    return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (height, -1)), 2)
