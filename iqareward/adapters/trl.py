"""Image rewards and difficulty-adaptive weights for TRL's GRPOTrainer and RLOOTrainer.

TRL trains models that write text, such as an agent that picks restoration tools or a model that rewrites prompts; its
trainers for diffusion models were removed in 0.24.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from iqareward.adapters._core import Scorer, column
from iqareward.atomic import atomic_write
from iqareward.groups import group_statistics
from iqareward.images import ImageLike
from iqareward.optional import require
from iqareward.rewards.core import refuse_groups
from iqareward.rewards.specs import Spec
from iqareward.schedules import Weighter, check_signal
from iqareward.types import Reward, Scores, needs
from iqareward.weighting import LossWeights, weighted_advantages

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
        group_size: TRL's `num_generations`, for rewards that compare the rollouts of a prompt, such as `RankInGroup`.
            Each process must have whole groups, so `per_device_train_batch_size * steps_per_generation` must be a
            multiple of it. Set `num_generations_eval` to the same, or do without evaluation.
        no_image: The reward of a completion that led to no image. A number below all scores discourages it; None leaves
            the completion out.
        name: The name in TRL's logs; None = the reward's.
        device: Where images are scored, and where weights of rewards given by name live; None = the CPU for images.

    Raises:
        ValueError: The reward needs references, inputs or prompts, and no column is named, or ids, and there is no
            `group_size`. When called: there are parts of groups.

    Example:
        >>> photos = list(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        >>> reward = TRLReward("ssim", "restored", references="clean")
        >>> reward(completions=["a", "b"], restored=[photos[0], None], clean=photos)
        [1.0, None]
    """

    def __init__(
        self,
        reward: Spec | Reward,
        images: str | Decode,
        *,
        references: str | None = None,
        inputs: str | None = None,
        prompts: str | None = None,
        group_size: int | None = None,
        no_image: float | None = None,
        name: str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        if group_size is None and needs(reward, "ids"):
            raise ValueError(
                f"TRLReward expected `group_size` for a reward that compares the completions of a prompt, got "
                f"{getattr(reward, 'name', reward)!r} without it. Pass group_size=num_generations."
            )
        ids = None if group_size is None else "ids"
        sources = {"references": references, "inputs": inputs, "prompts": prompts, "ids": ids}
        self._scorer = Scorer(reward, who="TRLReward", sources=sources, device=device, moves_images=True)
        self.reward = self._scorer.reward
        self.images, self.group_size, self.no_image = images, group_size, no_image
        self.__name__ = name or self.reward.name

    def __call__(
        self, completions: Sequence[Any], *, log_metric: Callable[[str, float], None] | None = None, **columns: Any
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
        if self.group_size is not None:
            if len(found) % self.group_size:
                raise ValueError(
                    f"{self.__name__} expected whole groups of {self.group_size} completions, got {len(found)}. Make "
                    "per_device_train_batch_size * steps_per_generation a multiple of num_generations."
                )
            columns["ids"] = [row // self.group_size for row in range(len(found))]
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
            # One call per completion, because TRL averages the calls of all processes, which hold different numbers of
            # scored images.
            unscored = {row for row in rows if rewards[row] is None}
            for row in range(len(found)):
                log_metric(f"{self.__name__}/no_image", float(found[row] is None))
                log_metric(f"{self.__name__}/unscored", float(row in unscored))
            for name, scores in parts.items():
                for score in filter(math.isfinite, scores.tolist()):
                    log_metric(f"{self.__name__}/{name}", score)
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
        if not isinstance(reward, TRLReward):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"AsyncTRLReward expected a TRLReward, got {reward!r}. Wrap it: TRLReward(reward, images).")
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


def adaptive_trainer(
    trainer: type, weighter: Weighter, fidelity: TRLReward, *, targets: str | None = None, sft_scale: float = 1.0
) -> Any:
    """A subclass of GRPOTrainer or RLOOTrainer that learns more from the prompts whose images are still bad.

    Every advantage is multiplied with the RL weight of its prompt, which follows from the mean distance of the prompt's
    images to the ground truth. With `targets`, the mean of `sft_scale * weight * loss` over the rows is added to the
    loss, with the SFT weight of the row's prompt and the cross-entropy per token of its target. A prompt whose
    completions all got the same reward has no RL weight. Evaluation does not change. `adaptive/difficulty`,
    `adaptive/rl_share`, `adaptive/sft_share` and `adaptive/sft_loss` appear in the logs.

    The weighter's state is saved in each checkpoint, as `weighter.pt`, and restored when training resumes.

    Args:
        trainer: `trl.GRPOTrainer` or `trl.RLOOTrainer`. TRL 1.16 was read: its `_calculate_rewards`,
            `_generate_and_score_completions`, `compute_loss`, `_save_checkpoint` and `_load_optimizer_and_scheduler`
            are extended.
        weighter: A weighter that takes a difficulty, calibrated or built with `calibrate_on_first=True`. Without
            `targets` its mode must be "convex", because the SFT weights are not used.
        fidelity: Measures the distance: a reward with references and an upper bound, preferably not the one that is
            trained on. It is not one of the `reward_funcs`, and decodes the images once more.
        targets: The column of completions to imitate: text, or a list of one assistant message for conversational
            prompts; None or an empty text for a prompt that has none. The tools of a vision-language model must not
            return images.
        sft_scale: Brings the supervised loss to the scale of the policy loss.

    Returns:
        A class that is built like `trainer`.

    Raises:
        ValueError: The weighter would scale nothing or does not take a difficulty, or the reward has no upper bound; in
            training: a target is neither text nor one assistant message, or a tool returned an image.

    Example:
        >>> from iqareward import AdaptiveWeighter
        >>> weighter = AdaptiveWeighter(mode="convex", calibrate_on_first=True)
        >>> fidelity = TRLReward("gmsd", "restored", references="clean")
        >>> adaptive_trainer(object, weighter, fidelity).__name__
        'Adaptiveobject'
    """
    check_signal("adaptive_trainer", weighter)
    if not isinstance(fidelity, TRLReward):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"adaptive_trainer expected `fidelity` as a TRLReward, which says where the images and their ground truth "
            f"are, got {fidelity!r}. Pass for example TRLReward('gmsd', 'restored', references='clean')."
        )
    refuse_groups("adaptive_trainer", fidelity.reward)
    best = fidelity.reward.bounds[1]
    if targets is None and getattr(weighter, "mode", "convex") != "convex":
        raise ValueError(
            "adaptive_trainer expected a weighter with mode='convex', got 'additive', whose RL weight is 1 for all. "
            "Build it with AdaptiveWeighter(mode='convex'), or name the column of completions to imitate with targets=."
        )
    if best is None or not fidelity.reward.needs_references:
        raise ValueError(
            f"adaptive_trainer expected `fidelity` with references and an upper bound, got {fidelity.reward.name!r}. "
            "Use for example 'gmsd', 'ssim', 'psnr' or 'lpips'."
        )
    if targets is not None and not hasattr(trainer, "loss_is_scaled_for_ga"):
        raise ValueError(f"adaptive_trainer expected a trainer of TRL 1.16 or newer for `targets`, got {trainer}.")

    class Adaptive(trainer):
        def _calculate_rewards(
            self, inputs: list[dict[str, Any]], prompts: Any, completions: Any, completion_ids: Any
        ) -> Tensor:
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
            if self.model.training:
                call = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
                distances = (best - _scores(self, fidelity, inputs, **call)).abs()
                self._weights = _prompt_weights(self, weighter, distances, rewards)
            return rewards

        def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
            batch = super()._generate_and_score_completions(inputs)
            if self.model.training:
                batch["advantages"] = weighted_advantages(batch["advantages"], self._weights)
                if targets is not None:
                    _refuse_tool_images(batch)
                    rows = [torch.tensor(_target_ids(self, row, targets), dtype=torch.int64) for row in inputs]
                    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
                    batch["target_ids"] = ids.to(self.accelerator.device)
                    batch["sft_weights"] = self._weights.sft
            return batch

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **options: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **options)
            if "target_ids" not in inputs:
                return loss
            sft_loss = (inputs["sft_weights"] * _cross_entropy(model, inputs)).mean()
            mean = self.accelerator.gather(sft_loss.detach()).mean().item()
            self._metrics["train"]["adaptive/sft_loss"].append(mean)
            parts = self.current_gradient_accumulation_steps if self.loss_is_scaled_for_ga else 1
            return loss + sft_scale * sft_loss / parts

        def _save_checkpoint(self, model: Any, trial: Any) -> None:
            super()._save_checkpoint(model, trial)
            if self.args.should_save:
                folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
                with atomic_write(folder / _STATE) as file:
                    torch.save(weighter.state_dict(), file)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and (path := Path(checkpoint) / _STATE).exists():
                weighter.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))

    Adaptive.__name__ = Adaptive.__qualname__ = f"Adaptive{trainer.__name__}"
    return Adaptive


_STATE = "weighter.pt"  # in the folder of a checkpoint


def _scores(trainer: Any, fidelity: TRLReward, inputs: list[dict[str, Any]], **call: Any) -> Tensor:
    """`[local rows]` scores from the call that TRL makes of its own reward functions; NaN for None."""
    call |= {"trainer_state": trainer.state, "log_extra": lambda column, values: None}  # logged by the rewards already
    columns = {key: [row[key] for row in inputs] for key in inputs[0] if key not in ("prompt", "completion", *call)}
    if getattr(trainer, "environments", None) is not None:
        columns["environments"] = trainer.environments
    scores = fidelity(**columns, **call)
    return torch.tensor([math.nan if score is None else score for score in scores], device=trainer.accelerator.device)


def _prompt_weights(trainer: Any, weighter: Weighter, distances: Tensor, rewards: Tensor) -> LossWeights:
    """Weights of this process's rows, from the distances of its rows and the rewards `[rows, functions]` of all."""
    accelerate = require("accelerate", extra="trl", purpose="adaptive_trainer")
    everywhere = accelerate.utils.gather(distances)
    groups = torch.arange(len(everywhere), device=everywhere.device) // trainer.num_generations
    start = trainer.accelerator.process_index * len(distances)
    mine = slice(start, start + len(distances))
    difficulty = group_statistics(everywhere, groups).mean
    spreads = [group_statistics(column, groups).std > 0 for column in rewards.unbind(1)]
    weights = weighter(difficulty[mine], has_signal=torch.stack(spreads).any(0)[mine])
    weighter.update(difficulty[mine])
    found = {"difficulty": difficulty} | {
        f"{name}_share": accelerate.utils.gather(rows) for name, rows in weights._asdict().items()
    }
    for name, rows in found.items():
        trainer._metrics["train"][f"adaptive/{name}"].append(rows.nanmean().item())
    return weights


def _refuse_tool_images(batch: dict[str, Any]) -> None:
    """TRL keeps the images of prompts and tools in one tensor, so a target could not be given those of its prompt."""
    kinds = (batch[name][:, batch["prompt_ids"].shape[1] :] for name in _TOKEN_KINDS if name in batch)
    if any(kind.any() for kind in kinds):
        raise ValueError(
            "adaptive_trainer expected no images of tools for `targets`, got some. Let the tools return text and keep "
            "the image in the environment, or leave `targets` out."
        )


def _target_ids(trainer: Any, row: dict[str, Any], column: str) -> list[int]:
    """The tokens of a row's target, which follow those of its prompt; none if the row has no target."""
    if column not in row:
        raise ValueError(f"adaptive_trainer expected targets in column {column!r}, got a row with {sorted(row)}.")
    target, processing = row[column], trainer.processing_class
    tokenizer = getattr(processing, "tokenizer", processing)
    if not target:
        return []
    end = tokenizer.eos_token_id
    if isinstance(target, str):
        return [*tokenizer(target, add_special_tokens=False)["input_ids"], end]
    if [message["role"] for message in target] != ["assistant"]:
        raise ValueError(
            f"adaptive_trainer expected targets that are text or one message of the assistant, got {target}. "
            "Keep the first answer, such as its tool call."
        )

    def tokens(messages: list[Any], **options: Any) -> list[int]:
        options |= {"chat_template": trainer.chat_template or processing.chat_template, **trainer.chat_template_kwargs}
        return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"]

    question = [{"role": "user", "content": "any"}]
    before, whole = tokens(question, add_generation_prompt=True), tokens(question + target)
    if whole[: len(before)] != before:
        raise ValueError(
            "adaptive_trainer expected a chat template that continues a prompt with its answer; this one changes the "
            "prompt. Give targets as text, exactly as the model should write them."
        )
    answer = whole[len(before) :]
    return answer[: len(answer) - answer[::-1].index(end)] if end in answer else [*answer, end]


# What models call the images of their prompts, and which tokens stand for them.
_IMAGES = (
    "pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "image_position_ids",
)  # fmt: skip
_TOKEN_KINDS = ("token_type_ids", "mm_token_type_ids")


def _cross_entropy(model: Any, inputs: dict[str, Any]) -> Tensor:
    """`[rows]` mean over the tokens of each row's target; 0 without a target."""
    targets, start = inputs["target_ids"], inputs["prompt_ids"].shape[1]
    found = targets >= 0
    ids = torch.cat([inputs["prompt_ids"], targets.clamp(min=0)], 1)
    mask = torch.cat([inputs["prompt_mask"], found.to(inputs["prompt_mask"].dtype)], 1)
    more = {name: inputs[name] for name in _IMAGES if inputs.get(name) is not None}
    for name in _TOKEN_KINDS:
        if inputs.get(name) is not None:
            kinds = inputs[name][:, :start]
            more[name] = torch.cat([kinds, kinds.new_zeros(targets.shape)], 1)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **more).logits[:, start - 1 : -1]
    losses = nn.functional.cross_entropy(logits.float().mT, targets, reduction="none")  # ignores -100
    return losses.sum(1) / found.sum(1).clamp(min=1)


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
    if not hasattr(rows, "__len__"):
        raise TypeError(
            f"TRLReward expected a list with one image or None per completion, got {type(rows).__name__}. "
            "Return one from the function that is given as images=."
        )
    if many := [row for row, value in enumerate(rows) if isinstance(value, list | tuple) and len(value) != 1]:
        raise ValueError(
            f"TRLReward expected one image per completion, got {len(rows[many[0]])} for completion {many[0]}. "
            "Choose one with a function, images=decode."
        )
    return [value[0] if isinstance(value, list | tuple) else value for value in rows]
