"""The object shapes that loops without a plug-in point expect of a reward model: imscore, HPSv3, MixGRPO, SRPO.

- Read: imscore cb28b8b, DanceGRPO 15cc71d and the released HPSv3 call, MixGRPO 10293dd, SRPO 69e8e81.
- Range: imscore and SRPO hand over floats in [0, 1]; DanceGRPO the path of a PNG, MixGRPO PIL images.
- References: none of them passes any, so rewards that compare with a ground truth are refused.
- Failure: `on_nan="raise"`, a number on request. MixGRPO swallows exceptions and goes on with reward 0 for all images;
  its model ends the process instead.
"""

from collections.abc import Callable, Sequence
from typing import Literal, final

import torch
from torch import Tensor, nn

from iqareward.adapters._values import OnNan, check_on_nan, score
from iqareward.images import ImageLike, to_images
from iqareward.rewards.catalog import load
from iqareward.rewards.loading import ImageDevice
from iqareward.types import Reward, Scores

_WORDS = ("raise", "mean", "worst")


def text_free(
    reward: str | Reward, *, who: str, device: torch.device | str | None = None, differentiable: bool = False
) -> Reward:
    """The reward of a name, or the object itself; refuses one that needs what such loops do not have.

    Args:
        reward: a name or sum of the catalogue, or any reward.
        who: the adapter, for the message.
        device: for weights of rewards given by name.
        differentiable: whether the scores must carry a graph.

    Raises:
        ValueError: the reward needs references, or has no gradient where one is needed.
    """
    found = load(reward, device=device, differentiable=differentiable) if isinstance(reward, str) else reward
    if found.needs_references:
        raise ValueError(
            f"{who} expected a no-reference reward, got {found.name!r}: its caller passes no ground truth. "
            "`iqareward list` shows which rewards need one."
        )
    if differentiable and not found.differentiable:
        raise ValueError(
            f"{who} expected a differentiable reward, got {found.name!r}, whose gradient to the pixels would be zero. "
            "Build it with differentiable=True."
        )
    return found


@final
class ImscoreModel(nn.Module):
    """Any reward where an imscore model is expected: `model.score(pixels, prompts)`.

    It has no parameters of its own: `to`, `eval` and `requires_grad_` do nothing, and the reward stays where it is.

    Args:
        reward: a name or sum of the catalogue, or any no-reference reward.
        differentiable: for rewards given by name: keep the graph to the pixels, as imscore does.
        device: for weights of rewards given by name.
        on_nan: what an image without a score becomes: "raise", "mean", "worst" or a number.

    Example:
        >>> model = ImscoreModel("piqe", differentiable=False)  # cheap; to train, a judge such as "qalign"
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
        check_on_nan(on_nan, allowed=_WORDS, who="ImscoreModel")
        needed = differentiable and isinstance(reward, str)
        self.reward = text_free(reward, who="ImscoreModel", device=device, differentiable=needed)
        self.on_nan: OnNan = on_nan

    def score(self, pixels: Tensor, prompts: Sequence[str] | None = None) -> Scores:
        """`[B]` scores of `pixels` `[B, 3, H, W]` in [0, 1]; higher is better."""
        return score(self.reward, pixels, value_range=(0, 1), prompts=prompts, on_nan=self.on_nan)


@final
class HPSv3Model:
    """Any reward where an HPSv3 inferencer is expected: `model.reward(image_paths, prompts)`, as DanceGRPO calls it.

    Args:
        reward: a name or sum of the catalogue, or any no-reference reward.
        device: where images are scored, weights of rewards given by name live, and scores come out; with several
            processes the device of this one, because DanceGRPO gathers the scores there.
        on_nan: what an image without a score becomes: "raise" or a number; it hands over one image at a time, so that
            there is no mean to take.

    Example:
        >>> HPSv3Model("ssim", device="cpu")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: HPSv3Model expected a no-reference reward, got 'ssim': its caller passes no ground truth. ...
    """

    def __init__(self, reward: str | Reward, *, device: torch.device | str, on_nan: OnNan = "raise") -> None:
        check_on_nan(on_nan, allowed=("raise",), who="HPSv3Model")
        self.judge = text_free(reward, who="HPSv3Model", device=device)
        self._device = ImageDevice(device, name="HPSv3Model")
        self.on_nan: OnNan = on_nan

    def reward(self, image_paths: Sequence[str], prompts: Sequence[str]) -> Scores:
        """`[B]` scores of the images in these files, on `device`; higher is better."""
        return _score_files(self.judge, image_paths, prompts, self._device, self.on_nan)


def mixgrpo_model(
    reward: str | Reward,
    slot: Literal["PickScoreRewardModel", "HPSClipRewardModel"] = "PickScoreRewardModel",
    *,
    device: torch.device | str | None = None,
    on_nan: OnNan = "raise",
) -> Callable[[Sequence[ImageLike], Sequence[str]], list[float]]:
    """A model to append to MixGRPO's `reward_models`, of a class with one of the five names that it knows.

    It decides by `type(model).__name__` how to call a model, and gives a model of any other name reward 0 for every
    image, printing the error and going on. It does the same with every exception, so that this model stops training,
    where it must, by `SystemExit`.

    Args:
        reward: a name or sum of the catalogue, or any no-reference reward.
        slot: whose place to take; its weight is then that of the reward (`--pick_score_weight`, `--hps_weight`).
        device: where images are scored, and weights of rewards given by name live; None = CPU for the images.
        on_nan: what an image without a score becomes: "raise" (the process ends with the reason) or a number.

    Returns:
        The model: `model(images, prompts) -> list of float`.

    Raises:
        ValueError: another slot, or a reward that needs references.

    Example:
        >>> model = mixgrpo_model("qalign")
        >>> type(model).__name__
        'PickScoreRewardModel'
    """
    if slot not in ("PickScoreRewardModel", "HPSClipRewardModel"):
        raise ValueError(
            f"mixgrpo_model expected slot 'PickScoreRewardModel' or 'HPSClipRewardModel', got {slot!r}: MixGRPO calls "
            "the other names in other ways or not at all."
        )
    check_on_nan(on_nan, allowed=("raise",), who="mixgrpo_model")
    judge = text_free(reward, who="mixgrpo_model", device=device)
    where = ImageDevice(device, name="mixgrpo_model")

    def call(model: object, images: Sequence[ImageLike], prompts: Sequence[str]) -> list[float]:
        try:
            return _score_files(judge, images, prompts, where, on_nan).tolist()
        except Exception as error:  # MixGRPO swallows every Exception around a reward, and would train on without it
            raise SystemExit(f"mixgrpo_model: {error}") from error

    return type(slot, (), {"__call__": call})()


@final
class SRPOModel(nn.Module):
    """A text-conditioned reward where SRPO expects one: `model.SRP_cfg(positive, negative, images, k)`.

    SRPO learns from what two texts make of one image, `(1 + k) r(image, positive) - r(image, negative)`, and swaps the
    texts for its inversion branch. A reward that reads no text, such as every quality metric, gives both texts the same
    score: the difference vanishes, `k r(image)` is left, and both branches pull the same way. Such rewards are refused;
    for them use the reward's own gradient (`iqareward.diffusion.RewardGradient`, or a loss of `reward_losses`).

    Args:
        reward: a differentiable reward that needs prompts.

    Raises:
        ValueError: the reward reads no text, needs references, or is not differentiable.

    Example:
        >>> SRPOModel(load("niqe"))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: SRPOModel expected a reward that reads the prompt, got 'niqe'. SRPO learns from the difference ...

    References:
        Shen et al., Directly Aligning the Full Diffusion Trajectory with Fine-Grained Human Preference, 2025,
        https://arxiv.org/abs/2509.06942
    """

    def __init__(self, reward: Reward) -> None:
        super().__init__()
        self.reward = text_free(reward, who="SRPOModel")
        if not reward.needs_prompts:
            raise ValueError(
                f"SRPOModel expected a reward that reads the prompt, got {reward.name!r}. SRPO learns from the "
                "difference that two texts make for one image, and without a text there is none. Use the reward's own "
                "gradient instead: iqareward.diffusion.RewardGradient, or a loss of iqareward.adapters.reward_losses."
            )
        text_free(reward, who="SRPOModel", differentiable=True)

    def SRP_cfg(  # the name SRPO calls
        self, prompts: Sequence[str], negative_prompts: Sequence[str], images: Tensor, k: float | Tensor
    ) -> Scores:
        """`[B]` relative scores of `images` `[B, 3, H, W]` in [0, 1], with their graph."""
        wanted, unwanted = (
            score(self.reward, images, value_range=(0, 1), prompts=texts) for texts in (prompts, negative_prompts)
        )
        return (1 + k) * wanted - unwanted


def _score_files(
    reward: Reward, images: ImageLike, prompts: Sequence[str], device: ImageDevice, on_nan: OnNan
) -> Scores:
    pixels = to_images(list(images), device=device.get())
    return score(reward, pixels, value_range=(0, 1), prompts=list(prompts), on_nan=on_nan)
