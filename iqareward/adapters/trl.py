"""Image rewards and difficulty-adaptive weights for TRL's GRPOTrainer and RLOOTrainer.

TRL trains models that write text, such as an agent that picks restoration tools or a model that rewrites prompts; its
trainers for diffusion models were removed in 0.24.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from iqareward.adapters._core import Scorer, column
from iqareward.groups import group_statistics
from iqareward.images import ImageLike
from iqareward.optional import require
from iqareward.schedules import check_signal
from iqareward.types import Reward, Scores
from iqareward.weighting import AdaptiveWeighter, weighted_advantages

__all__ = ["AsyncTRLReward", "Decode", "TRLReward", "adaptive_trainer", "tool_images"]

Decode: TypeAlias = Callable[..., Sequence[ImageLike | None]]
"""`decode(completions, **columns)` returns the image that each completion led to, None where there is none."""


@final
class TRLReward:
    """A reward function for `GRPOTrainer(reward_funcs=[...])` and RLOOTrainer that scores images.

    A completion whose image cannot be scored gets `None`, so that TRL gives it no advantage. With several reward
    functions, though, TRL 1.16 counts the missing one as 0 beside the others: put the parts into one reward
    (`"0.7*qalign + 0.3*ssim"`), or set `multi_objective_aggregation="normalize_then_sum"`.

    Images may be PIL images, uint8, or floats in [0, 1]. `log_metric` receives the mean score of each part of a sum,
    the share of completions without an image, and the share of images that were not scored.

    Args:
        reward: A name or sum of the catalogue, or any reward.
        images: The column that holds the images, or a function `decode(completions, **columns)` that returns one image
            per completion, None where there is none; `tool_images` is such a function. It must be picklable if the
            reward is sent to workers.
        references: The column of ground truths, for rewards that need them.
        inputs: The column of degraded images, for rewards that need them.
        prompts: The column of texts, for rewards that need them.
        no_image: The reward of a completion that led to no image. A number below all scores discourages it; None leaves
            the completion out.
        name: The name in TRL's logs; None = the reward's.
        device: Where images are scored, and where weights of rewards given by name live; None = the CPU for images.

    Raises:
        ValueError: The reward needs references, inputs or prompts, and no column is named.

    Example:
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
        inputs: str | None = None,
        prompts: str | None = None,
        no_image: float | None = None,
        name: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        sources = {"references": references, "inputs": inputs, "prompts": prompts}
        self._scorer = Scorer(reward, who="TRLReward", sources=sources, device=device, moves_images=True)
        self.reward = self._scorer.reward
        self.images, self.no_image = images, no_image
        self.__name__ = name or self.reward.name

    def __call__(
        self, *, completions: Sequence[Any], log_metric: Callable[[str, float], None] | None = None, **columns: Any
    ) -> list[float | None]:
        """One number or None per completion, from what TRL passes by keyword."""
        columns["completions"] = completions
        source = self.images
        found = column(source, columns, who=self.__name__) if isinstance(source, str) else source(**columns)
        found = _single_images(found)
        if len(found) != len(completions):
            raise ValueError(
                f"{self.__name__} expected one image or None per completion ({len(completions)}), got {len(found)}. "
                "Return them in the order of the completions."
            )
        more = self._scorer.columns(columns)
        for name in ("references", "inputs"):
            more[name] = None if more[name] is None else _single_images(more[name])
        rows, call = self._scorer.present(found, **more)
        rewards: list[float | None] = [self.no_image] * len(found)
        parts: dict[str, Scores] = {}
        if call is not None:
            scores, parts = call.score_with_parts(self.reward)
            for row, score in zip(rows, scores.tolist(), strict=True):
                rewards[row] = score if math.isfinite(score) else None
        if log_metric is not None:
            unscored = sum(rewards[row] is None for row in rows)
            log_metric(f"{self.__name__}/no_image", 1 - len(rows) / max(1, len(found)))
            log_metric(f"{self.__name__}/unscored", unscored / max(1, len(found)))
            for name, scores in parts.items():
                if scores.isfinite().any():
                    log_metric(f"{self.__name__}/{name}", scores[scores.isfinite()].mean().item())
        return rewards


@final
class AsyncTRLReward:
    """A `TRLReward` that TRL runs beside its other asynchronous rewards; it scores in a thread, so none waits for it.

    Use it for rewards on another device or another machine. With one reward, or all on one CPU, `TRLReward` is as fast.

    Args:
        reward: The reward to run.

    Example:
        >>> import inspect
        >>> inspect.iscoroutinefunction(AsyncTRLReward(TRLReward("qalign", "restored")))
        True
    """

    # `inspect.iscoroutinefunction` recognises a coroutine function by these attributes. Without them the object would
    # be taken for a plain function, and its coroutine never be awaited.
    __defaults__ = None
    __kwdefaults__ = None

    def __init__(self, reward: TRLReward) -> None:
        self.reward = reward
        self.__name__ = reward.__name__
        self.__annotations__ = {}

    async def __call__(self, **call: Any) -> list[float | None]:
        """The answer of the `TRLReward`."""
        return await asyncio.to_thread(self.reward, **call)

    __code__ = __call__.__code__


def tool_images(completions: Sequence[Sequence[dict[str, Any]]], **columns: Any) -> list[ImageLike | None]:
    """The last image that a tool returned in each completion, for `TRLReward(images=tool_images)`.

    TRL shows such images to the model, which must be a vision-language model. The tools of a text model should keep the
    image in the environment, for a `decode(completions, environments, **columns)`.

    Args:
        completions: Lists of messages; a tool that returns `[{"type": "image", "image": ...}]` leaves its image there.
        columns: Not used.

    Returns:
        One image or None per completion.

    Example:
        >>> tool_images([[{"role": "tool", "content": [{"type": "image", "image": "the image"}]}], []])
        ['the image', None]
    """
    return [_last_tool_image(messages) for messages in completions]


def adaptive_trainer(trainer: type, weighter: AdaptiveWeighter, fidelity: TRLReward) -> Any:
    """A subclass of GRPOTrainer or RLOOTrainer that learns more from the prompts whose images are still bad.

    Every advantage is multiplied with the RL weight of its prompt, which follows from the mean distance of the prompt's
    images to the ground truth. TRL has no supervised loss, so the SFT weights are not used; evaluation does not change.
    `adaptive/difficulty` and `adaptive/rl_share` appear in the logs.

    Args:
        trainer: `trl.GRPOTrainer` or `trl.RLOOTrainer`. TRL 1.16 was read: its `_calculate_rewards` and
            `_generate_and_score_completions` are extended.
        weighter: A weighter in mode "convex", calibrated or built with `calibrate_on_first=True`. TRL's checkpoints do
            not hold its state: save `weighter.state_dict()` beside them.
        fidelity: Measures the distance: a reward with references and an upper bound, preferably not the one that is
            trained on. It is not one of the `reward_funcs`, and decodes the images once more.

    Returns:
        A class that is built like `trainer`.

    Raises:
        ValueError: The weighter would scale nothing or does not take a difficulty, or the reward has no upper bound.

    Example:
        >>> weighter = AdaptiveWeighter(mode="convex", calibrate_on_first=True)
        >>> fidelity = TRLReward("gmsd", "restored", references="clean")
        >>> adaptive_trainer(object, weighter, fidelity).__name__
        'Adaptiveobject'
    """
    check_signal("adaptive_trainer", weighter)
    best = fidelity.reward.bounds[1]
    if weighter.mode != "convex":
        raise ValueError(
            "adaptive_trainer expected a weighter with mode='convex', got 'additive', whose RL weight is 1 for all. "
            "Build it with AdaptiveWeighter(mode='convex')."
        )
    if best is None or not fidelity.reward.needs_references:
        raise ValueError(
            f"adaptive_trainer expected `fidelity` with references and an upper bound, got {fidelity.reward.name!r}. "
            "Use for example 'gmsd', 'ssim', 'psnr' or 'lpips'."
        )

    class Adaptive(trainer):
        def _calculate_rewards(
            self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, *rest: Any
        ) -> Tensor:
            rewards = super()._calculate_rewards(inputs, prompts, completions, *rest)
            scores = _scores(self, fidelity, inputs, prompts=prompts, completions=completions)
            self._difficulty = _per_prompt(self, (best - scores).abs())
            return rewards

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            if self.model.training:
                weights = weighter(self._difficulty)
                batch["advantages"] = weighted_advantages(batch["advantages"], weights)
                weighter.update(self._difficulty)
                self._metrics["train"]["adaptive/difficulty"].append(self._difficulty.nanmean().item())
                self._metrics["train"]["adaptive/rl_share"].append(weights.rl.mean().item())
            return batch

    Adaptive.__name__ = Adaptive.__qualname__ = f"Adaptive{trainer.__name__}"
    return Adaptive


def _scores(trainer: Any, fidelity: TRLReward, inputs: list[dict[str, Any]], **call: Any) -> Tensor:
    """`[local rows]` scores from the call that TRL makes of its own reward functions; NaN for None."""
    columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion")}
    if getattr(trainer, "environments", None) is not None:
        columns["environments"] = trainer.environments
    scores = fidelity(**columns, **call)
    return torch.tensor([math.nan if score is None else score for score in scores], device=trainer.accelerator.device)


def _per_prompt(trainer: Any, distances: Tensor) -> Tensor:
    """`[local rows]`, each row's mean over all rows of its prompt, whichever process generated them."""
    accelerate = require("accelerate", extra="trl", purpose="adaptive_trainer")
    everywhere = accelerate.utils.gather(distances)
    size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    groups = torch.arange(len(everywhere), device=everywhere.device) // size
    start = trainer.accelerator.process_index * len(distances)
    return group_statistics(everywhere, groups).mean[start : start + len(distances)]


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


def _single_images(rows: Sequence[Any]) -> list[Any]:
    """A column in which a list of one image, as TRL's `images` column has them, is replaced by its image."""
    if many := [row for row, value in enumerate(rows) if isinstance(value, list | tuple) and len(value) != 1]:
        raise ValueError(
            f"TRLReward expected one image per completion, got {len(rows[many[0]])} for completion {many[0]}. "
            "Choose one with a function, images=decode."
        )
    return [value[0] if isinstance(value, list | tuple) else value for value in rows]
