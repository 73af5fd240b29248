"""Restorers that are no diffusion models: one pass of a network from the degraded image to the restored one."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from iqareward.diffusion.batches import Batch
from iqareward.diffusion.conditions import Condition
from iqareward.diffusion.noise import Noise
from iqareward.diffusion.policies.core import Parts, dtype_of
from iqareward.diffusion.processes import Step, Transition
from iqareward.optional import require
from iqareward.weight_files import check_values, decode

Loss: TypeAlias = Literal["l1", "mse", "charbonnier"] | Callable[[Tensor, Tensor], Tensor]

# Of the difference between images, per pixel. Charbonnier's is a smooth absolute value.
_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "l1": torch.abs,
    "mse": torch.square,
    "charbonnier": lambda difference: (difference.square() + 1e-6).sqrt(),
}


class FeedForwardPolicy(Parts):
    """Any network that maps a degraded image to a restored one in one pass, such as SwinIR, HAT, NAFNet or Restormer.

    Rollouts explore with Gaussian noise around the network's answer, independent for every pixel value and of standard
    deviation `exploration`; validation shows the answer itself. Rewards with a gradient need no noise:
    `DirectRewardGradient` differentiates through the network.

    Args:
        network: Called with images `[N, 3, h, w]` in [0, 1], in the dtype of its weights; returns `[N, 3, H, W]` in
            [0, 1] up to overshoots. H and W are h and w times its scale.
        multiple: Sides of the images that the network takes are multiples of this. Others are padded by reflection
            below and on the right, and what belongs to the padding is cut off again.
        minimum: Smallest side that the network takes.
        loss: The supervised loss by name, or a function that gives the losses `[B]` of restored images and references.

    Raises:
        ValueError: `loss` is another name.

    Example:
        >>> import torch
        >>> from iqareward.diffusion import Batch, Noise
        >>> policy = FeedForwardPolicy(nn.Conv2d(3, 3, 3, padding=1))
        >>> condition = policy.condition(Batch((0,), torch.rand(1, 3, 16, 16)), Noise((0,)))
        >>> policy.step(policy.start(condition, Noise((0,))), policy.schedule(condition, 1)[0], condition, eta=0.1).std
        0.1
    """

    num_steps, eta, exploration = 1, 0.0, 0.02
    _STEP: ClassVar[Step] = Step(time=0.0, now=1.0, then=0.0)

    def __init__(self, network: nn.Module, *, multiple: int = 1, minimum: int = 1, loss: Loss = "l1") -> None:
        if isinstance(loss, str) and loss not in _LOSSES:
            raise ValueError(f"FeedForwardPolicy expected a loss among {list(_LOSSES)} or a function, got {loss!r}.")
        self.model, self.multiple, self.minimum, self.loss = network, multiple, minimum, loss

    @classmethod
    def from_checkpoint(cls, path: str | Path, *, dtype: torch.dtype = torch.float32, loss: Loss = "l1") -> Self:
        """Load a checkpoint of SwinIR, HAT, NAFNet or any other architecture that the package spandrel recognises.

        No code of the file is run. Restormer and others with a licence of their own are recognised after
        `spandrel_extra_arches.install()` of that package.

        Args:
            path: A `.safetensors` file, or one of `torch.save`.
            dtype: Of the weights.
            loss: The supervised loss, as above.

        Returns:
            A policy on the CPU, which trains all weights.

        Raises:
            ImportError: spandrel is not installed.
            OSError: There is no such file.
            ValueError: The file is damaged, its architecture is unknown, or the network is not one from an RGB image
                to an RGB image.
        """
        spandrel: Any = require("spandrel", extra="restorers", purpose="FeedForwardPolicy.from_checkpoint")
        path = Path(path)
        content, _ = decode(path)
        try:
            loaded = spandrel.ModelLoader().load_from_state_dict(spandrel.canonicalize_state_dict(content))
        except Exception as error:  # whatever the detection raises for a file of another kind
            raise ValueError(
                f"FeedForwardPolicy expected {path} to hold a network that spandrel recognises, which it does not "
                f"({type(error).__name__}: {error!s:.200}). Build the network and pass it to FeedForwardPolicy(...)."
            ) from error
        check_values(path, loaded.model.state_dict(), may_be_zero=True)
        size = loaded.size_requirements
        policy = cls(loaded.model, multiple=size.multiple_of, minimum=max(size.minimum, 1), loss=loss)
        if not isinstance(loaded, spandrel.ImageModelDescriptor) or not policy._is_plain(loaded):
            raise ValueError(
                f"FeedForwardPolicy expected a network that maps images [N, 3, h, w] in [0, 1] to restored images, "
                f"which the {loaded.architecture.name} of {path} does not by itself. Wrap it in a module that does, "
                "and pass that to FeedForwardPolicy(...)."
            )
        policy.model.to(dtype=dtype).requires_grad_(True)
        return policy

    @torch.no_grad()
    def _is_plain(self, loaded: Any) -> bool:
        """Whether calling the network is all that there is to do, and not for instance to subtract its answer."""
        if (loaded.input_channels, loaded.output_channels) != (3, 3):
            return False
        side = max(64, self.minimum)
        images = torch.linspace(0, 1, 3 * side * side).view(1, 3, side, side)
        try:
            answer, plain = loaded(images), self.model(images)
        except RuntimeError:  # it takes more channels than the image has
            return False
        return isinstance(plain, Tensor) and torch.allclose(plain.clamp(0, 1), answer, atol=1e-4)

    def condition(self, batch: Batch, noise: Noise) -> Condition:
        """The degraded images."""
        return {"degraded": batch.degraded}

    def schedule(self, condition: Condition, num_steps: int) -> Sequence[Step]:
        """One step."""
        return (self._STEP,)

    def start(self, condition: Condition, noise: Noise) -> Tensor:
        """The degraded images."""
        return condition["degraded"]

    def step(self, latents: Tensor, step: Step, condition: Condition, *, eta: float) -> Transition:
        """A Gaussian around the network's answer."""
        restored = self.restore(condition["degraded"])
        return Transition(restored, eta, restored)

    def restore(self, degraded: Tensor) -> Tensor:
        """The network's answer `[N, 3, H, W]` fp32 for images `[N, 3, h, w]` of any size."""
        height, width = degraded.shape[-2:]
        images = self._padded(degraded.to(dtype_of(self.model)))
        restored = self.model(images).float()
        scale = restored.shape[-1] / images.shape[-1]
        return restored[..., : round(height * scale), : round(width * scale)]

    def _padded(self, images: Tensor) -> Tensor:
        sides = images.shape[-2:]
        below, right = (-(-max(side, self.minimum) // self.multiple) * self.multiple - side for side in sides)
        # a reflection is smaller than the image; what is left is filled with its edge
        mirrored = min(right, sides[1] - 1), min(below, sides[0] - 1)
        if any(mirrored):
            images = pad(images, (0, mirrored[0], 0, mirrored[1]), mode="reflect")
        if (right, below) != mirrored:
            images = pad(images, (0, right - mirrored[0], 0, below - mirrored[1]), mode="replicate")
        return images

    def decode(self, latents: Tensor, condition: Condition) -> Tensor:
        """The images themselves."""
        return latents

    def sft_loss(self, references: Tensor, condition: Condition, noise: Noise) -> Tensor:
        """The loss of the network's answer."""
        restored = self.restore(condition["degraded"])
        if isinstance(self.loss, str):
            return _LOSSES[self.loss](restored - references).flatten(1).mean(1)
        return self.loss(restored, references)

    def reconstruct(self, references: Tensor, condition: Condition) -> Tensor:
        """The references: nothing is encoded."""
        return references
