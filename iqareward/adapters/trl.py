"""Rewards for TRL's GRPOTrainer and RLOOTrainer: the images that a language model makes or improves, scored.

TRL trains models that write text, such as an agent that picks restoration tools or a rewriter of prompts; its trainers
for diffusion models were removed in 0.24. Read from TRL 1.16.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch

from iqareward.adapters._values import find_reward
from iqareward.images import ImageLike, to_images
from iqareward.rewards.calls import Call
from iqareward.rewards.loading import ImageDevice
from iqareward.types import Reward, Scores

Decode = Callable[..., Sequence[ImageLike | None]]
"""`decode(completions, **columns)`: the image that each completion led to, None where there is none."""


@final
class TRLReward:
    """A reward function for `GRPOTrainer(reward_funcs=[...])` and RLOOTrainer that scores images.

    A completion whose image cannot be scored gets `None`: TRL leaves it out of its group and gives it no advantage.
    With several reward functions, though, TRL 1.16 adds up those that did score, as if the missing one were 0; put the
    parts into one reward (`"0.7*qalign + 0.3*ssim"`), or set `multi_objective_aggregation="normalize_then_sum"`.

    Pixels: PIL images and uint8 as they are; floats must lie in [0, 1]. `log_metric` receives the mean of every part
    of a weighted sum, and the share of completions with no image and of images that were not scored.

    Args:
        reward: a name or sum of the catalogue, or any reward.
        images: the column that holds the images, or a function `decode(completions, **columns)` that gives one image
            per completion, None where there is none; `tool_images` is such a function. It must be a module-level
            function, or another picklable callable, if the reward is sent to workers.
        references: the column of ground truths, for rewards that need them.
        prompts: the column of texts, for rewards that need them.
        no_image: what a completion earns that led to no image: a number below all scores discourages it; None leaves it
            out.
        name: as it appears in TRL's logs; default: the reward's.
        device: where images are scored, and where weights of rewards given by name live; None = the CPU for images.

    Raises:
        ValueError: the reward needs references or prompts and no column is named.

    Example:
        >>> import torch
        >>> photos = list(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        >>> reward = TRLReward("ssim", "restored", references="clean")
        >>> reward(completions=["a", "b"], restored=[photos[0], None], clean=photos)
        [1.0, None]
    """

    def __init__(
        self,
        reward: str | Reward,
        images: str | Decode,
        *,
        references: str | None = None,
        prompts: str | None = None,
        no_image: float | None = None,
        name: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.reward = find_reward(reward, device=device, references=references, who="TRLReward")
        if self.reward.needs_prompts and prompts is None:
            raise ValueError(
                f"TRLReward got reward {self.reward.name!r}, which needs texts, and no `prompts`. "
                "Name the column that holds them with prompts=..."
            )
        self.images, self.references, self.prompts = images, references, prompts
        self.no_image = no_image
        self.__name__ = name or self.reward.name
        self._device = ImageDevice(device, name=self.__name__)

    def __call__(
        self, *, completions: Sequence[Any], log_metric: Callable[[str, float], None] | None = None, **columns: Any
    ) -> list[float | None]:
        """One number or None per completion, from what TRL passes by keyword."""
        columns["completions"] = completions
        found = self._found(columns)
        rows = [index for index, image in enumerate(found) if image is not None]
        rewards: list[float | None] = [self.no_image] * len(found)
        parts: dict[str, list[float]] = {}
        if rows:
            parts = {part: scores.tolist() for part, scores in self._score(found, rows, columns).items()}
            for row, score in zip(rows, parts.pop(""), strict=True):
                rewards[row] = score if math.isfinite(score) else None
        if log_metric is not None:
            scored = sum(rewards[row] is not None for row in rows)
            log_metric(f"{self.__name__}/no_image", 1 - len(rows) / max(1, len(found)))
            log_metric(f"{self.__name__}/unscored", (len(rows) - scored) / max(1, len(found)))
            for part, scores in parts.items():
                finite = [score for score in scores if math.isfinite(score)]
                if finite:
                    log_metric(f"{self.__name__}/{part}", sum(finite) / len(finite))
        return rewards

    def _found(self, columns: dict[str, Any]) -> list[ImageLike | None]:
        """The image of each completion."""
        completions = columns["completions"]
        source = self.images
        found = self._column("images", source, columns) if isinstance(source, str) else source(**columns)
        if len(found) != len(completions):
            raise ValueError(
                f"{self.__name__} expected one image or None per completion ({len(completions)}), got {len(found)}. "
                "Return them in the order of the completions."
            )
        return [_single(image, index) for index, image in enumerate(found)]

    def _score(self, found: Sequence[Any], rows: Sequence[int], columns: dict[str, Any]) -> dict[str, Scores]:
        """The scores of the images that there are, under "", and of each part of a weighted sum, by its name."""
        images = self._converted(found, rows)
        references = prompts = None
        if self.reward.needs_references and self.references is not None:
            clean = self._column("references", self.references, columns)
            references = self._converted([_single(image, index) for index, image in enumerate(clean)], rows)
        if self.prompts is not None:
            texts = self._column("prompts", self.prompts, columns)
            prompts = [texts[row] for row in rows]
        total, parts = Call(images, references, prompts=prompts).score_with_parts(self.reward)
        return {"": total, **parts}

    def _converted(self, images: Sequence[Any], rows: Sequence[int]) -> Any:
        return to_images([images[row] for row in rows], value_range=(0, 1), device=self._device.get())

    def _column(self, argument: str, column: str, columns: dict[str, Any]) -> Any:
        if column not in columns:
            raise ValueError(
                f"{self.__name__} expected a column {column!r} ({argument}={column!r}), got {sorted(columns)}. "
                "Name a column of the data set or a field that your rollout function returns."
            )
        return columns[column]


@final
class AsyncTRLReward:
    """A `TRLReward` that TRL runs beside the other asynchronous rewards; it scores in a thread, so none waits for it.

    For rewards on another device or another machine; with one reward, or all on one CPU, the plain form is as fast.

    Args:
        reward: what to run.

    Example:
        >>> import inspect
        >>> inspect.iscoroutinefunction(AsyncTRLReward(TRLReward("qalign", "restored")))
        True
    """

    # `inspect.iscoroutinefunction` knows a coroutine function by these attributes; an object that only has an async
    # `__call__` is taken for a plain function by whoever asks it, and its coroutine is never awaited.
    __defaults__ = None
    __kwdefaults__ = None

    def __init__(self, reward: TRLReward) -> None:
        self.reward = reward
        self.__name__ = reward.__name__
        self.__annotations__ = {}

    async def __call__(self, **call: Any) -> list[float | None]:
        """What the plain form answers."""
        return await asyncio.to_thread(self.reward, **call)

    __code__ = __call__.__code__


def tool_images(completions: Sequence[Sequence[dict[str, Any]]], **columns: Any) -> list[ImageLike | None]:
    """The last image that a tool returned in each completion, for `TRLReward(images=tool_images)`.

    TRL shows such images to the model, which must be a vision-language model; a text model's tools had better keep the
    image in the environment, for a `decode(completions, environments, **columns)`.

    Args:
        completions: lists of messages; a tool that returns `[{"type": "image", "image": ...}]` leaves its image there.
        columns: not used.

    Returns:
        One image or None per completion.

    Example:
        >>> tool_images([[{"role": "tool", "content": [{"type": "image", "image": "the image"}]}], []])
        ['the image', None]
    """
    return [_last_tool_image(messages) for messages in completions]


def _last_tool_image(messages: Sequence[dict[str, Any]]) -> ImageLike | None:
    if isinstance(messages, str):
        raise TypeError(
            "tool_images expected completions as lists of messages, got text. "
            "Use conversational prompts, which TRL's tools need anyway."
        )
    for message in reversed(messages):
        content = message.get("content")
        if message.get("role") == "tool" and isinstance(content, list):
            for part in reversed(content):
                if part.get("type") == "image":
                    return part["image"]
    return None


def _single(image: Any, index: int) -> Any:
    """The image of a row of TRL's `images` column, a list of one; anything else as it is."""
    if not isinstance(image, list | tuple):
        return image
    if len(image) != 1:
        raise ValueError(
            f"TRLReward expected one image per completion, got {len(image)} for completion {index}. "
            "Choose one with a function, images=decode."
        )
    return image[0]
