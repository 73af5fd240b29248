"""Rewards in the place of other reward models and losses: imscore, DanceGRPO's HPSv2 and HPSv3, AlignProp, VADER.

These loops pass no ground truth, so rewards that need references are refused.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias, final

import torch
from PIL import Image
from torch import Tensor, nn

from iqareward.adapters._core import OnNan, Scorer
from iqareward.images import to_images
from iqareward.rewards.specs import Spec
from iqareward.types import Reward, Scores

__all__ = ["HPSv2Model", "HPSv3Model", "ImscoreModel", "alignprop_loss", "vader_loss"]

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
        reward: Spec | Reward,
        *,
        differentiable: bool = True,
        device: torch.device | str | None = None,
        on_nan: OnNan = "raise",
    ) -> None:
        super().__init__()
        needed = differentiable and not callable(reward)
        self._scorer = Scorer(reward, who="ImscoreModel", on_nan=on_nan, device=device, differentiable=needed)

    def score(self, pixels: Tensor, prompts: Sequence[str] | None = None) -> Scores:
        """`[B]` scores of `pixels` `[B, 3, H, W]` in [0, 1]; higher is better."""
        return self._scorer(pixels, prompts=prompts)


class _DanceGRPOModel:
    """A reward that gets one image a call, and returns its score where DanceGRPO gathers it."""

    def __init__(self, reward: Spec | Reward, *, device: torch.device | str, on_nan: OnNan = "raise") -> None:
        who = type(self).__name__
        self._scorer = Scorer(reward, who=who, on_nan=on_nan, policies=("raise",), device=device, moves_images=True)


@final
class HPSv2Model(_DanceGRPOModel):
    """Any reward where HPSv2 is expected: its model, tokenizer and preprocessing, as DanceGRPO calls them.

    Args:
        reward: A name or sum of the catalogue, or any no-reference reward.
        device: Where images are scored, weights of rewards given by name live, and scores are returned; with several
            processes the device of this one, because DanceGRPO gathers the scores there.
        on_nan: What an image without a score becomes: "raise" or a number. DanceGRPO passes one image at a time, so
            there is no mean to take.

    Example:
        >>> model = HPSv2Model("piqe", device="cpu")
        >>> pixels = model.preprocess(Image.new("RGB", (64, 48)))[None]
        >>> outputs = model(pixels, model.tokenizer(["a cat"]))
        >>> torch.diagonal(outputs["image_features"] @ outputs["text_features"].T).shape  # the score
        torch.Size([1])
    """

    @staticmethod
    def preprocess(image: Image.Image) -> Tensor:
        """The image as it is, `[3, H, W]` in [0, 1]: neither resized nor cropped."""
        return to_images(image)[0]

    @staticmethod
    def tokenizer(prompts: Sequence[str]) -> Tensor:
        """The prompts as `[B, length]` bytes of UTF-8, padded with 0."""
        rows = [torch.tensor(list(prompt.encode()), dtype=torch.uint8) for prompt in prompts]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def __call__(self, pixels: Tensor, text: Tensor) -> dict[str, Tensor]:
        """`[B, 1]` features whose product is the score.

        Args:
            pixels: `[B, 3, H, W]` in [0, 1].
            text: `[B, length]` from `tokenizer`.
        """
        prompts = None
        if self._scorer.reward.needs_prompts:  # reading them from a GPU waits for it
            prompts = [bytes(row).rstrip(b"\0").decode() for row in text.tolist()]
        # float64, because autocast would round the scores to half precision in the product
        features = self._scorer(pixels, prompts=prompts).double()[:, None]
        return {"image_features": features, "text_features": torch.ones_like(features)}


@final
class HPSv3Model(_DanceGRPOModel):
    """Any reward where an HPSv3 inferencer is expected: `model.reward(image_paths, prompts)`, as DanceGRPO calls it.

    HPSv3 itself is `iqareward.rewards.HPSv3Reward`, the reward `"hpsv3"`.

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

    def reward(self, image_paths: Sequence[str], prompts: Sequence[str]) -> Scores:
        """`[B]` scores of the images in these files, on `device`; higher is better.

        Raises:
            ValueError: A file is a JPEG, whose score would be that of the codec as much as of the image.
        """
        for path in image_paths:
            if Path(path).suffix.lower() in (".jpg", ".jpeg"):
                raise ValueError(
                    f"HPSv3Model expected images stored without loss, got {Path(path).name}, whose score would be "
                    "that of the JPEG codec as much as of the image. Let the trainer write PNG: change '.jpg' to "
                    "'.png' where it makes the path."
                )
        return self._scorer(list(image_paths), prompts=list(prompts))


def alignprop_loss(
    reward: Spec | Reward, *, device: torch.device | str | None = None, on_nan: OnNan = "raise"
) -> _Loss:
    """`loss_fn(images, prompts=None) -> (loss [B], rewards [B])` for AlignProp.

    It takes the place of what `alignprop_trainer.aesthetic_loss_fn` returns, which gets no prompts, or `hps_loss_fn`,
    which gets them. The loss is one number per sample, to be multiplied with `weights.rl` for a weight per sample.

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


def vader_loss(reward: Spec | Reward, *, device: torch.device | str | None = None, on_nan: OnNan = "raise") -> _Loss:
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
