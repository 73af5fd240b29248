"""Rewards in the place of other reward models and losses: imscore, DanceGRPO's HPSv3, AlignProp, VADER.

These loops pass no ground truth, so rewards that need references are refused.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias, final

import torch
from torch import Tensor, nn

from iqareward.adapters._core import OnNan, Scorer
from iqareward.types import Reward, Scores

__all__ = ["HPSv3Model", "ImscoreModel", "alignprop_loss", "vader_loss"]

_Loss: TypeAlias = Callable[..., tuple[Tensor, Tensor]]


@final
class ImscoreModel(nn.Module):
    """Any reward where an imscore model is expected: `model.score(pixels, prompts)`.

    It has no parameters of its own: `to`, `eval` and `requires_grad_` do nothing, and the reward stays where it is.

    Args:
        reward: A name or sum of the catalogue, or any no-reference reward.
        differentiable: For rewards given by name: keep the graph to the pixels, as imscore does.
        device: Where weights of rewards given by name live.
        on_nan: What an image without a score becomes: "raise", "mean", "worst" or a number.

    Example:
        >>> model = ImscoreModel("piqe", differentiable=False)  # cheap; to train, choose for example "qalign"
        >>> model.score(torch.full((2, 3, 32, 32), 0.5), ["a cat", "a dog"]).shape
        torch.Size([2])
    """

    def __init__(
        self,
        reward: str | Reward,
        *,
        differentiable: bool = True,
        device: torch.device | str | None = None,
        on_nan: OnNan = "raise",
    ) -> None:
        super().__init__()
        needed = differentiable and isinstance(reward, str)
        self._scorer = Scorer(reward, who="ImscoreModel", on_nan=on_nan, device=device, differentiable=needed)

    def score(self, pixels: Tensor, prompts: Sequence[str] | None = None) -> Scores:
        """`[B]` scores of `pixels` `[B, 3, H, W]` in [0, 1]; higher is better."""
        return self._scorer(pixels, prompts=prompts)


@final
class HPSv3Model:
    """Any reward where an HPSv3 inferencer is expected: `model.reward(image_paths, prompts)`, as DanceGRPO calls it.

    Args:
        reward: A name or sum of the catalogue, or any no-reference reward.
        device: Where images are scored, weights of rewards given by name live, and scores are returned; with several
            processes the device of this one, because DanceGRPO gathers the scores there.
        on_nan: What an image without a score becomes: "raise" or a number. DanceGRPO passes one image at a time, so
            there is no mean to take.

    Example:
        >>> HPSv3Model("ssim", device="cpu")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: HPSv3Model got reward 'ssim', which needs `references`, and has none. ...
    """

    def __init__(self, reward: str | Reward, *, device: torch.device | str, on_nan: OnNan = "raise") -> None:
        self._scorer = Scorer(
            reward, who="HPSv3Model", on_nan=on_nan, policies=("raise",), device=device, moves_images=True
        )

    def reward(self, image_paths: Sequence[str], prompts: Sequence[str]) -> Scores:
        """`[B]` scores of the images in these files, on `device`; higher is better."""
        return self._scorer(list(image_paths), prompts=list(prompts))


def alignprop_loss(reward: str | Reward, *, device: torch.device | str | None = None, on_nan: OnNan = "raise") -> _Loss:
    """`loss_fn(images, prompts=None) -> (loss [B], rewards [B])` for AlignProp.

    Set `trainer.loss_fn = alignprop_loss(...)` on the finished trainer, and keep `config.reward_fn="aesthetic"`: it
    accepts no other word for a loss without prompts. The loss is one number per sample, to be multiplied with
    `weights.rl` for a weight per sample.

    Args:
        reward: A name or sum of the catalogue, or any differentiable no-reference reward.
        device: Where weights of rewards given by name live.
        on_nan: What an image without a score becomes: "raise", "mean", "worst" or a number, without gradient.

    Returns:
        The function, on images `[B, 3, H, W]` in [0, 1] with their graph; the loss is the negative reward.

    Raises:
        ValueError: The reward needs references or is not differentiable.

    Example:
        >>> from iqareward.rewards.metric import NoReference
        >>> def contrast(images):
        ...     return images.std(dim=(1, 2, 3))
        >>> loss_fn = alignprop_loss(NoReference(contrast, higher_is_better=True, differentiable=True))
        >>> loss, rewards = loss_fn(torch.rand(2, 3, 8, 8, requires_grad=True))
        >>> loss.shape, loss.requires_grad
        (torch.Size([2]), True)
    """
    scorer = Scorer(reward, who="alignprop_loss", on_nan=on_nan, device=device, differentiable=True)

    def loss_fn(images: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        rewards = scorer(images, prompts=prompts)
        return -rewards, rewards.detach()

    return loss_fn


def vader_loss(reward: str | Reward, *, device: torch.device | str | None = None, on_nan: OnNan = "raise") -> _Loss:
    """`loss_fn(frames, prompts=None) -> (loss, reward)`, both scalar, for VADER: the value of `loss_fn` in its script.

    Args:
        reward: A name or sum of the catalogue, or any differentiable no-reference reward.
        device: Where weights of rewards given by name live.
        on_nan: What a frame without a score becomes: "raise", "mean", "worst" or a number, without gradient.

    Returns:
        The function, on decoded frames `[B, 3, H, W]` in [-1, 1] with their graph.

    Raises:
        ValueError: The reward needs references or is not differentiable.

    Example:
        >>> vader_loss("piqe")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: piqe has no useful gradient to the pixels. ...
    """
    scorer = Scorer(
        reward, who="vader_loss", value_range=(-1.0, 1.0), on_nan=on_nan, device=device, differentiable=True
    )

    def loss_fn(frames: Tensor, prompts: Sequence[str] | None = None) -> tuple[Tensor, Tensor]:
        reward = scorer(frames, prompts=prompts).mean()
        return -reward, reward.detach()

    return loss_fn
