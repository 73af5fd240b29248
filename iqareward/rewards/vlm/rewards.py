"""Rewards from vision-language models of transformers: the expected level word, or the expected rating."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from iqareward.functional._chunks import rows_at_once
from iqareward.rewards.calls import Call
from iqareward.rewards.core import ImageReward, masked, reward_mode
from iqareward.rewards.loading import LazyModel
from iqareward.rewards.options import name_with
from iqareward.rewards.readout import LevelDistribution, expected_value, level_distribution, token_logits
from iqareward.rewards.vlm.answers import Answers, prepare_rating, write
from iqareward.rewards.vlm.inputs import next_ids, render, tokenize
from iqareward.rewards.vlm.network import Features, Network
from iqareward.rewards.vlm.presets import (
    Q_INSIGHT,
    Q_INSIGHT_MODEL,
    Q_INSIGHT_SUBFOLDER,
    Q_REALIGN,
    Q_REALIGN_MODELS,
    VISUALQUALITY_R1,
    VISUALQUALITY_R1_MODEL,
    ZERO_SHOT_LEVELS,
    LevelPreset,
    RatingPreset,
    Size,
    Task,
    check_preset,
    parse_rating,
)
from iqareward.types import Bounds, Images, Scores

Source = str | Path | tuple[Any, Any]
"""Hub id (`owner/name` or `owner/name/folder`, perhaps with `@revision`), folder, or a pair (model, processor), which
is used as it is."""

Scale = Literal["unit", "mos"]


class VLMReward(ImageReward):
    """A reward by numbers that a vision-language model gives to images; the model is loaded at the first call."""

    _recomputes_layers = True
    _scales = ("unit", "mos")

    def __init__(
        self,
        name: str,
        source: Source,
        columns: int,
        scale: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        differentiable: bool,
        batch_size: int,
        build: Callable[[Any], "Model"] | None = None,
    ) -> None:
        if scale not in self._scales:
            raise ValueError(f'{name} expected `scale` "{self._scales[0]}" or "{self._scales[1]}", got {scale!r}.')
        if batch_size < 1:
            raise ValueError(f"{name} expected `batch_size` >= 1, got {batch_size}.")
        if isinstance(source, tuple) and len(source) != 2:
            raise ValueError(f"{name} expected `weights` as a pair (model, processor), got {len(source)} things.")
        self.name, self.batch_size, self.differentiable = name, batch_size, differentiable
        self._columns, self.scale = columns, scale
        build = build or partial(_load, name, source, dtype, differentiable)
        self.model_loader = LazyModel(build, device, name=name, is_built=isinstance(source, tuple))

    @property
    def model(self) -> Any:
        """The network, a native class of transformers; loads it if need be."""
        return self._pair.model

    @property
    @abstractmethod
    def prompt(self) -> str:
        """What the model continues, with one placeholder for the image; loads the model if need be."""

    @abstractmethod
    def _prepare(self, network: Network) -> Callable[..., Tensor]:
        """A function from a batch's features, and prompts if needed, to `[B, columns]` float32 numbers."""

    @property
    def _pair(self) -> "Model":
        pair: Any = self._loader.get()
        return pair

    def _prepared(self) -> tuple[Network, Callable[..., Tensor]]:
        def make(pair: Model) -> tuple[Network, Callable[..., Tensor]]:
            network = Network(pair.model, pair.processor)
            return network, self._prepare(network)

        return self._loader.derived("prepared", make)

    def _numbers(self, images: Images, prompts: Sequence[str] | None = None) -> Tensor:
        """`[B, columns]` float32 on the images' device; NaN for images that cannot be scored."""
        return self._rows(self._read, self._call(images, prompts=prompts), self._columns)

    def _read(self, images: Tensor, **columns: Any) -> Tensor:
        """`[b, columns]` of a clean batch; NaN if the model takes no image of that size."""
        network, read = self._prepared()
        features = network.features(images)
        if features is None:
            return images.new_full((images.shape[0], self._columns), torch.nan)
        return masked(read(features, **columns))

    def _rows_at_once(self, size: Sequence[int], device: torch.device) -> int:
        """`batch_size`, or fewer if their pixels would not fit on a device."""
        fitting = rows_at_once(size, device)
        if self.batch_size is None:
            return fitting
        return self.batch_size if device.type == "cpu" else min(self.batch_size, fitting)


class Model(nn.Module):
    """A model, the processor that belongs to it, and a head of its own if it has one."""

    def __init__(self, model: Any, processor: Any, head: nn.Module | None = None) -> None:
        super().__init__()
        self.model, self.processor, self.head = model, processor, head

    def train(self, mode: bool = True) -> "Model":
        """Nothing: the model is in eval mode, except layers that are recomputed in the backward pass."""
        return self


def _load(name: str, source: Source, dtype: torch.dtype | None, differentiable: bool, device: Any) -> Model:
    from iqareward.rewards.vlm.checkpoints import load_model, require_transformers

    require_transformers(name)
    if isinstance(source, tuple):
        model, processor = source
        return Model(model.requires_grad_(False).eval().to(device=device, dtype=dtype), processor)
    dtype = dtype or default_dtype(device)
    return Model(*load_model(name, source, device=device, dtype=dtype, checkpointing=differentiable))


def default_dtype(device: torch.device) -> torch.dtype:
    """The dtype of weights if none is given."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class _LevelReward(VLMReward):
    """A reward by the expected level word of a preset."""

    def __init__(
        self,
        name: str,
        weights: Source,
        preset: LevelPreset,
        scale: Scale,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        differentiable: bool,
        batch_size: int,
    ) -> None:
        check_preset(name, preset, LevelPreset)
        columns = len(preset.levels) + 1  # one more for the mass of all levels
        super().__init__(name, weights, columns, scale, device, dtype, differentiable, batch_size)
        self.preset = preset
        low, high = (0.0, 1.0) if scale == "unit" else (1.0, 5.0)
        self._worth = tuple(low + (high - low) * worth for worth in preset.worth)
        self.bounds: Bounds = (min(self._worth), max(self._worth))

    @property
    def prompt(self) -> str:
        return render(self._pair.processor, self.preset, self.preset.question, self.preset.stem)

    def score_batch(self, images: Tensor) -> Tensor:
        return expected_value(self._read(images)[:, :-1], self._worth)

    def logits(self, images: Images) -> Tensor:
        """Logits of the level words, in the order of the preset: `[B, levels]` float32."""
        with reward_mode(differentiable=self.differentiable):
            return self._numbers(images)[:, :-1]

    def mass(self, images: Images) -> Tensor:
        """Probability that the model would go on with any of the level words: `[B]` float32.

        It is near 1 for a model that was trained on these words. A small mass says that the model wanted to say
        something else, so that the score means little.
        """
        with reward_mode(differentiable=self.differentiable):
            return self._numbers(images)[:, -1]

    def distribution(self, images: Images) -> LevelDistribution:
        """Level probabilities of each image, and the mean and standard deviation in levels of [1, 5]."""
        with reward_mode(differentiable=self.differentiable):
            return level_distribution(self.logits(images), [1 + 4 * worth for worth in self.preset.worth])

    def _prepare(self, network: Network) -> Callable[[Features], Tensor]:
        preset, processor = self.preset, network.processor
        text = render(processor, preset, preset.question, preset.stem)
        prompt = tokenize(processor, text, network.family.around)
        ids = torch.tensor(next_ids(processor, text, preset.levels), device=network.device)

        def read(features: Features) -> Tensor:
            logits, mass = token_logits(network.logits(features, prompt), ids)
            return torch.cat([logits, mass[:, None]], dim=1)

        return read


@final
class LevelReward(_LevelReward):
    """The expected quality level that a vision-language model gives each image, such as "bad" to "excellent".

    One forward pass, no sampling and no parsing: the same image always gets the same score. Images are rounded to 8
    bits and resized as Pillow does it, on their device, because that is what these models were trained on. Needs the
    extra `vlm`. The weights are loaded at the first call.

    Args:
        weights: Hub id or folder of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, LLaVA-OneVision or InternVL (`-hf`)
            checkpoint, or a pair (model, processor), whose model is frozen.
        preset: What is asked, and the words that may answer.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5], as human ratings are reported.
        device: None = the GPU of the first images, else the current CUDA device if there is one, else the CPU.
        dtype: None = bfloat16 on CUDA, float32 on the CPU; a model given keeps its own.
        differentiable: Keep the graph to the pixels at their original size. Layers of a model that is loaded here are
            recomputed in the backward pass.
        batch_size: Images per run of the network; images of different sizes never share one.
        name: Name of the reward, as key of components and in logs.

    Raises:
        ImportError: at the first call, if transformers is not installed.
        ValueError: at the first call, if the model's family is not supported or a level word is not one token.

    Example:
        >>> reward = LevelReward("Qwen/Qwen3-VL-2B-Instruct", scale="mos")  # nothing is loaded yet
        >>> reward.bounds
        (1.0, 5.0)

    References:
        Wu et al., "Q-Align: Teaching LMMs for Visual Scoring via Discrete Text-Defined Levels", 2024,
        https://arxiv.org/abs/2312.17090
    """

    def __init__(
        self,
        weights: Source,
        preset: LevelPreset = ZERO_SHOT_LEVELS,
        scale: Scale = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 8,
        *,
        name: str = "level",
    ) -> None:
        super().__init__(name, weights, preset, scale, device, dtype, differentiable, batch_size)


@final
class QReAlignReward(_LevelReward):
    """Q-ReAlign: Qwen3.5 trained to rate quality or aesthetics with Q-Align's level words.

    `scale`, `device`, `dtype`, `differentiable` and `batch_size` are those of `LevelReward`.

    Args:
        size: `"mini"` (0.8B parameters), `"lite"` (4B) or `"pro"` (9B).
        task: What is rated; "aesthetic" is "aesthetics".
        weights: Hub id, folder, or pair (model, processor); None = the published weights of that size.

    Example:
        >>> QReAlignReward(size="lite", task="aesthetics").name
        'qrealign_lite_aesthetics'
    """

    def __init__(
        self,
        size: Size = "mini",
        task: Task | Literal["aesthetic"] = "quality",
        scale: Scale = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 8,
        *,
        weights: Source | None = None,
    ) -> None:
        task = "aesthetics" if task == "aesthetic" else task
        if size not in Q_REALIGN_MODELS or task not in Q_REALIGN:
            raise ValueError(
                f"QReAlignReward expected size {sorted(Q_REALIGN_MODELS)} and task {sorted(Q_REALIGN)}, "
                f"got {size!r} and {task!r}."
            )
        source = Q_REALIGN_MODELS[size] if weights is None else weights
        parts = ["qrealign", *([] if size == "mini" else [size]), *([] if task == "quality" else [task])]
        name = name_with(self, "_".join(parts), weights=weights, scale=scale, dtype=dtype)
        super().__init__(name, source, Q_REALIGN[task], scale, device, dtype, differentiable, batch_size)


def zero_shot_level_reward(weights: Source, scale: Scale = "unit", **options: Any) -> LevelReward:
    """Ask Q-Align's question of a general model that was not trained on it.

    Args:
        weights: Hub id, folder, or pair (model, processor), as in `LevelReward`.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5].
        **options: Further options of `LevelReward`.

    Returns:
        A `LevelReward`: `[B]` float32, higher is better, NaN = not scored. Nothing is loaded before the first call.

    Example:
        >>> zero_shot_level_reward("Qwen/Qwen3-VL-2B-Instruct").name
        'zero_shot_level'
    """
    return LevelReward(weights, ZERO_SHOT_LEVELS, scale, name="zero_shot_level", **options)


class Reading(NamedTuple):
    """What the digits say.

    Attributes:
        ratings: `[B]` expected rating, on the preset's scale, whatever the mass.
        digit_mass: `[B]` probability that the model would go on with a legal first digit.
    """

    ratings: Tensor
    digit_mass: Tensor


class _RatingReward(VLMReward):
    """A reward by the expected rating of a preset, or by the rating that the model writes."""

    mode: Literal["expected", "generate"] = "expected"
    thinking: bool = False
    seed: int | None = None
    min_digit_mass: float = 0.5

    def __init__(
        self,
        name: str,
        weights: Source,
        preset: RatingPreset,
        scale: Scale,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        differentiable: bool,
        batch_size: int,
    ) -> None:
        check_preset(name, preset, RatingPreset)
        super().__init__(name, weights, 2, scale, device, dtype, differentiable, batch_size)
        self.preset = preset
        low, high = float(preset.ratings.low), float(preset.ratings.high)
        self._shift, self._span = (0.0, 1.0) if scale == "mos" else (low, high - low)
        self.bounds: Bounds = (low, high) if scale == "mos" else (0.0, 1.0)

    @property
    def prompt(self) -> str:
        return self._rendered(self._pair.processor)

    def score_batch(self, images: Tensor) -> Tensor:
        ratings, mass = self._read(images).unbind(1)
        return torch.where(mass >= self.min_digit_mass, (ratings - self._shift) / self._span, torch.nan)

    def score_call(self, call: Call) -> Scores:
        with reward_mode(differentiable=self.differentiable):
            if self.mode == "generate":
                scores = (self.answers(call.images).ratings - self._shift) / self._span
                reason = "no rating could be read from what the model wrote"
            else:
                scores = self._rows(self.score_batch, call)
                reason = f"the model would not start its answer with a digit (min_digit_mass={self.min_digit_mass:g})"
            self._watch.look(self.name, scores, call.images, otherwise=reason)
            return scores

    def reading(self, images: Images) -> Reading:
        """Expected ratings with the digit mass of each: how far the model was from writing a rating at all."""
        with reward_mode(differentiable=self.differentiable):
            return Reading(*self._numbers(images).unbind(1))

    def answers(self, images: Images) -> Answers:
        """What the model writes about each image by the published protocol, and the ratings parsed from it."""
        preset, written = self.preset, list[str]()

        def places(images: Tensor) -> Tensor:
            """Where the texts of a clean batch are in `written`."""
            network, start = self._prepared()[0], len(written)
            text = self._rendered(network.processor, begun=False)
            written.extend(write(network, images, text, preset.sampling, self.seed))
            return torch.arange(start, len(written), dtype=torch.float32, device=images.device)

        with reward_mode(differentiable=self.differentiable):
            found = self._rows(places, self._call(images))
            texts = ["" if place != place else written[int(place)] for place in found.tolist()]
            ratings = [parse_rating(text, preset.answer_pattern, preset.ratings) for text in texts]
            return Answers(torch.tensor(ratings, dtype=torch.float32, device=found.device), texts)

    def _rendered(self, processor: Any, *, begun: bool | None = None) -> str:
        """The prompt; with the beginning of the answer unless the model writes it."""
        begun = self.mode == "expected" if begun is None else begun
        question = self.preset.thinking_question if self.thinking else self.preset.question
        return render(processor, self.preset, question, self.preset.answer_prefix if begun else "")

    def _prepare(self, network: Network) -> Callable[[Features], Tensor]:
        if self.differentiable and not network.shares_branches:
            raise ValueError(
                "expected a model whose layers all attend to the whole sequence (with sdpa or eager attention) for "
                "`differentiable=True`: other layers overwrite their state while digits are read. Use LevelReward."
            )
        text = render(network.processor, self.preset, self.preset.question, self.preset.answer_prefix)
        return prepare_rating(network, text, self.preset.ratings)


@final
class RatingReward(_RatingReward):
    """The rating that a vision-language model would write about each image, as an expectation over its digits.

    Models that were trained to write a number are usually sampled: slow, another score each time, and text without a
    number becomes an accident. Here the answer's beginning is given, and the digits are read from the probabilities of
    one forward pass: first digit, first decimal behind each, second decimal behind each of these. That is the mean of
    what the model would write if only ratings were allowed. Needs the extra `vlm`. The weights are loaded at the first
    call.

    Args:
        weights: Hub id or folder of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3.5, LLaVA-OneVision or InternVL (`-hf`)
            checkpoint, or a pair (model, processor), whose model is frozen.
        preset: What is asked, and the ratings that may answer.
        scale: `"unit"` is [0, 1]; `"mos"` is the preset's own range, such as [1, 5].
        device: None = the GPU of the first images, else the current CUDA device if there is one, else the CPU.
        dtype: None = bfloat16 on CUDA, float32 on the CPU; a model given keeps its own.
        differentiable: Keep the graph to the pixels at their original size. Not for models with recurrent layers
            (Qwen3.5), nor with `mode="generate"`.
        batch_size: Images per run of the network; images of different sizes never share one.
        min_digit_mass: An image's score is NaN if the model would start its answer with a digit less probably.
        mode: `"expected"`, or `"generate"` for the published protocol: the model writes its answer, which is parsed;
            NaN if that fails.
        thinking: With `"generate"`: ask for the reasoning before the answer.
        seed: With `"generate"`: None = the most probable token; a number = sampled as published, the same for the same
            image, seed and model, whatever else is in the batch.
        name: Name of the reward, as key of components and in logs.

    Raises:
        ImportError: at the first call, if transformers is not installed.
        ValueError: at the first call, if the model's family is not supported or it does not write digit by digit.

    Example:
        >>> from iqareward.rewards import VISUALQUALITY_R1
        >>> reward = RatingReward("TianheWu/VisualQuality-R1-7B", VISUALQUALITY_R1, scale="mos")  # nothing is loaded
        >>> reward.bounds
        (1.0, 5.0)

    References:
        Wu et al., "VisualQuality-R1: Reasoning-Induced Image Quality Assessment via Reinforcement Learning to Rank",
        2025, https://arxiv.org/abs/2505.14460
    """

    def __init__(
        self,
        weights: Source,
        preset: RatingPreset,
        scale: Scale = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 8,
        *,
        min_digit_mass: float = 0.5,
        mode: Literal["expected", "generate"] = "expected",
        thinking: bool = False,
        seed: int | None = None,
        name: str = "rating",
    ) -> None:
        if mode not in ("expected", "generate"):
            raise ValueError(f'{name} expected `mode` "expected" or "generate", got {mode!r}.')
        if mode == "expected" and (thinking or seed is not None):
            raise ValueError(f'{name} expected `thinking` and `seed` with mode="generate" only: nothing is written.')
        if mode == "generate" and differentiable:
            raise ValueError(f'{name} expected `differentiable=False` with mode="generate": text has no gradient.')
        self.mode, self.thinking, self.seed, self.min_digit_mass = mode, thinking, seed, min_digit_mass
        super().__init__(name, weights, preset, scale, device, dtype, differentiable, batch_size)


@final
class VisualQualityR1Reward(_RatingReward):
    """VisualQuality-R1: Qwen2.5-VL-7B trained by ranking to rate quality from 1 to 5, as an expectation over digits.

    Its published protocol is `RatingReward(weights, VISUALQUALITY_R1, mode="generate")`. `scale`, `device`, `dtype`,
    `differentiable` and `batch_size` are those of `RatingReward`.

    Args:
        weights: Hub id, folder, or pair (model, processor); None = the published weights.

    Example:
        >>> VisualQualityR1Reward(scale="mos").bounds
        (1.0, 5.0)

    References:
        Wu et al., "VisualQuality-R1: Reasoning-Induced Image Quality Assessment via Reinforcement Learning to Rank",
        2025, https://arxiv.org/abs/2505.14460
    """

    def __init__(
        self,
        scale: Scale = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 8,
        *,
        weights: Source | None = None,
    ) -> None:
        name = name_with(self, "visualquality_r1", weights=weights, scale=scale, dtype=dtype)
        weights = VISUALQUALITY_R1_MODEL if weights is None else weights
        super().__init__(name, weights, VISUALQUALITY_R1, scale, device, dtype, differentiable, batch_size)


@final
class QInsightReward(_RatingReward):
    """Q-Insight: Qwen2.5-VL-7B trained to reason about quality and rate it from 1 to 5, as an expectation over digits.

    It was trained to think first, which this does not wait for: look at `reading(images).digit_mass` before you trust
    it. Its published protocol is `RatingReward(weights, Q_INSIGHT, mode="generate", thinking=True)`. `scale`, `device`,
    `dtype`, `differentiable` and `batch_size` are those of `RatingReward`.

    Args:
        weights: Hub id, folder, or pair (model, processor); None = the published weights.

    Example:
        >>> QInsightReward().name
        'qinsight'

    References:
        Li et al., "Q-Insight: Understanding Image Quality via Visual Reinforcement Learning", 2025,
        https://arxiv.org/abs/2503.22679
    """

    def __init__(
        self,
        scale: Scale = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 8,
        *,
        weights: Source | None = None,
    ) -> None:
        name = name_with(self, "qinsight", weights=weights, scale=scale, dtype=dtype)
        weights = f"{Q_INSIGHT_MODEL}/{Q_INSIGHT_SUBFOLDER}" if weights is None else weights
        super().__init__(name, weights, Q_INSIGHT, scale, device, dtype, differentiable, batch_size)
