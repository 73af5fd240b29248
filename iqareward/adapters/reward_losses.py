"""Losses for trainers that follow a reward's gradient: AlignProp, VADER, ReNO.

- Read: AlignProp b576ae7, VADER 18bc41e, ReNO 172e997.
- Range: AlignProp [0, 1] (its own losses shift it once more and see a washed-out image), VADER [-1, 1], ReNO [0, 1]
  once its CLIP preprocessing is taken out.
- References: none of them passes any; rewards that compare with a ground truth are refused.
- Failure: `on_nan="raise"`; a number counts as a constant, without gradient.
- A weight per sample: AlignProp's loss is `[B]`; multiply it with `weights.rl`.
"""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from iqareward.adapters._values import OnNan, check_on_nan, score
from iqareward.adapters.scorers import text_free
from iqareward.types import Reward

# what ReNO's CLIP preprocessing makes of every image; none of its generators draws that size
_CLIP_SIDE = 224
Losses = Callable[..., tuple[Tensor, Tensor]]


def alignprop_loss(
    reward: str | Reward, *, device: torch.device | str | None = None, on_nan: OnNan = "raise"
) -> Losses:
    """`loss_fn(images, prompts=None) -> (loss [B], rewards [B])` for AlignProp.

    Set `trainer.loss_fn = alignprop_loss(...)` on the finished trainer, and keep `config.reward_fn="aesthetic"`: it
    accepts no other word for a loss without prompts.

    Args:
        reward: a name or sum of the catalogue, or any differentiable no-reference reward.
        device: for weights of rewards given by name.
        on_nan: what an image without a score becomes: "raise", "mean", "worst" or a number.

    Returns:
        The function, on images `[B, 3, H, W]` in [0, 1] with their graph; the loss is the negative reward.

    Raises:
        ValueError: the reward needs references or is not differentiable.

    Example:
        >>> from iqareward.rewards.metric import NoReference
        >>> def contrast(images):
        ...     return images.std(dim=(1, 2, 3))
        >>> loss_fn = alignprop_loss(NoReference(contrast, higher_is_better=True, differentiable=True))
        >>> loss, rewards = loss_fn(torch.rand(2, 3, 8, 8, requires_grad=True))
        >>> loss.shape, loss.requires_grad
        (torch.Size([2]), True)
    """
    judge = _judge(reward, "alignprop_loss", device, on_nan)

    def loss_fn(images: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        rewards = score(judge, images, value_range=(0, 1), prompts=prompts, on_nan=on_nan)
        return -rewards, rewards.detach()

    return loss_fn


def vader_loss(reward: str | Reward, *, device: torch.device | str | None = None, on_nan: OnNan = "raise") -> Losses:
    """`loss_fn(frames, prompts=None) -> (loss, reward)`, both scalar, for VADER: the value of `loss_fn` in its script.

    Args:
        reward: a name or sum of the catalogue, or any differentiable no-reference reward.
        device: for weights of rewards given by name.
        on_nan: what a frame without a score becomes: "raise", "mean", "worst" or a number.

    Returns:
        The function, on decoded frames `[B, 3, H, W]` in [-1, 1] with their graph.

    Raises:
        ValueError: the reward needs references or is not differentiable.

    Example:
        >>> vader_loss("piqe")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: piqe has no useful gradient to the pixels. ...
    """
    judge = _judge(reward, "vader_loss", device, on_nan)

    def loss_fn(frames: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        rewards = score(judge, frames, value_range=(-1, 1), prompts=prompts, on_nan=on_nan)
        return -rewards.mean(), rewards.detach().mean()

    return loss_fn


@final
class ReNOLoss:
    """A loss for the list that ReNO's `LatentNoiseTrainer` takes, on its image at native resolution.

    ReNO crops every image to 224 pixels and normalises it for CLIP before its losses see it. Take that out with
    `trainer.preprocess_fn = torch.nn.Identity()`; losses of ReNO's own in the same list must then crop by themselves.

    Args:
        reward: a name or sum of the catalogue, or any differentiable no-reference reward.
        weighting: its factor in the sum of losses.
        device: for weights of rewards given by name.
        on_nan: what an image without a score becomes: "raise" or a number.

    Raises:
        ValueError: the reward needs references or is not differentiable; when called: the image is ReNO's CLIP crop.

    Example:
        >>> from iqareward.rewards.metric import NoReference
        >>> def contrast(images):
        ...     return images.std(dim=(1, 2, 3))
        >>> loss = ReNOLoss(NoReference(contrast, higher_is_better=True, differentiable=True), 2.0)
        >>> loss.name, loss.weighting, loss(torch.full((1, 3, 8, 8), 0.5), "a cat").item()
        ('contrast', 2.0, -0.0)
    """

    def __init__(
        self,
        reward: str | Reward,
        weighting: float = 1.0,
        *,
        device: torch.device | str | None = None,
        on_nan: OnNan = "raise",
    ) -> None:
        self.reward = _judge(reward, "ReNOLoss", device, on_nan)
        self.name = self.reward.name
        self.weighting = weighting
        self.on_nan: OnNan = on_nan

    def __call__(self, image: Tensor, prompt: str) -> Tensor:
        """The negative reward of `image` `[B, 3, H, W]` in [0, 1], a scalar; lower is better."""
        if tuple(image.shape[-2:]) == (_CLIP_SIDE, _CLIP_SIDE):
            raise ValueError(
                f"ReNOLoss expected the image at native resolution, got ReNO's CLIP crop {list(image.shape)}. "
                "Set trainer.preprocess_fn = torch.nn.Identity() before trainer.train(...)."
            )
        prompts = [prompt] * image.shape[0]
        return -score(self.reward, image, value_range=(0, 1), prompts=prompts, on_nan=self.on_nan).mean()


def _judge(reward: str | Reward, who: str, device: Any, on_nan: OnNan) -> Reward:
    check_on_nan(on_nan, allowed=("raise", "mean", "worst"), who=who)
    return text_free(reward, who=who, device=device, differentiable=True)
