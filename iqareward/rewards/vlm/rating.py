"""Rewards read from digits: the number that a vision-language model would rate an image with, as an expectation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
from torch import Tensor

from iqareward.rewards.calls import Call
from iqareward.rewards.readout import token_logits
from iqareward.rewards.scoring import reward_mode
from iqareward.rewards.vlm.branches import DigitReadout
from iqareward.rewards.vlm.chat import Prompt, digit_ids, render, tokenize
from iqareward.rewards.vlm.generate import Answers, write
from iqareward.rewards.vlm.network import Features, Network
from iqareward.rewards.vlm.presets import RatingPreset
from iqareward.rewards.vlm.ratings import parse_rating
from iqareward.rewards.vlm.scorer import Source, VLMReward
from iqareward.types import Bounds, Images, Scores


class Reading(NamedTuple):
    """What the digits say.

    Attributes:
        ratings: `[B]` expected rating, on the preset's scale, whatever the mass.
        digit_mass: `[B]` probability that the model would go on with a legal first digit.
    """

    ratings: Tensor
    digit_mass: Tensor


@dataclass(frozen=True)
class RatingReadout:
    """Expected rating and digit mass behind the beginning of an answer."""

    preset: RatingPreset
    differentiable: bool
    width = 2

    def prepare(self, network: Network) -> Callable[[Features], Tensor]:
        """Render the prompt, and find the digits in the model's vocabulary."""
        text = render(network.processor, self.preset, self.preset.question, self.preset.answer_prefix)
        prompt = tokenize(network.processor, text, network.family.around)
        digits, point = digit_ids(network.processor, text)
        readout = DigitReadout(self.preset.ratings, digits, point)
        if self.differentiable and not network.shares_branches:
            raise ValueError(
                "expected a model whose layers all attend to the whole sequence (with sdpa or eager attention) for "
                "`differentiable=True`: other layers overwrite their state while digits are read. Use LevelReward."
            )
        make = _side_by_side if network.shares_branches else _step_by_step
        answer = make(network, prompt, readout)
        ids = torch.tensor(digits, device=network.device)
        first_ids = ids[list(readout.first)]

        def read(features: Features) -> Tensor:
            first, decimals = answer(features)
            chosen, mass = token_logits(network.head(first), first_ids)
            ratings = readout.expectation(chosen, [network.head(place, ids).float() for place in decimals])
            return torch.stack([ratings, mass], dim=1)

        return read


Digits = Callable[[Features], tuple[Tensor, list[Tensor]]]
"""From features to the last layer `[B, values]` at the first digit, and `[B, beginnings, values]` at each decimal."""


def _side_by_side(network: Network, prompt: Prompt, readout: DigitReadout) -> Digits:
    """All beginnings of the answer in the same pass as the prompt, which they share."""
    branches = readout.branches
    counts = [len(readout.open) * 10**place for place in range(readout.ratings.decimals)]

    def hidden(features: Features) -> tuple[Tensor, list[Tensor]]:
        first, *decimals = network.hidden(features, prompt, branches).split([1, *counts], dim=1)
        return first[:, 0], decimals

    return hidden


def _step_by_step(network: Network, prompt: Prompt, readout: DigitReadout) -> Digits:
    """The prompt once, then one step for each decimal over its repeated cache."""
    starts = [[readout.digits[digit], readout.point] for digit in readout.open]
    ones = torch.tensor(readout.digits, device=network.device)[:, None]
    steps = [torch.tensor(starts, device=network.device), *[ones] * (readout.ratings.decimals - 1)]

    def hidden(features: Features) -> tuple[Tensor, list[Tensor]]:
        first, *decimals = network.steps(features, prompt, steps)
        return first, [place.unflatten(0, (features.tokens.shape[0], -1)) for place in decimals]

    return hidden


@final
class RatingReward(VLMReward):
    """The rating that a vision-language model would write about each image, as an expectation over its digits.

    Models that were trained to write a number are usually sampled: slow, another score each time, and text without a
    number becomes an accident. Here the answer's beginning is given, and the digits are read from the probabilities of
    one forward pass: first digit, first decimal behind each, second decimal behind each of these. That is the mean of
    what the model would write if only ratings were allowed. Needs the extra `vlm`. The weights are loaded at the first
    call.

    Args:
        model: hub id or folder of a Qwen2.5-VL, Qwen3-VL, Qwen3.5, LLaVA-OneVision or InternVL (`-hf`) checkpoint, or
            a pair (model, processor), whose model is frozen.
        preset: what is asked, and the ratings that may answer.
        scale: `"unit"` is [0, 1]; `"mos"` is the preset's own range, such as [1, 5].
        device: None = the GPU of the first images, else the current CUDA device if there is one, else the CPU.
        dtype: None = bfloat16 on CUDA, float32 on the CPU.
        differentiable: keep the graph to the pixels at their original size. Not for models with recurrent layers
            (Qwen3.5), nor with `mode="generate"`.
        batch_size: images per run of the network; images of different sizes never share one.
        min_digit_mass: an image's score is NaN if the model would start its answer with a digit less probably.
        mode: `"expected"`, or `"generate"` for the published protocol: the model writes its answer, which is parsed;
            NaN if that fails.
        thinking: with `"generate"`: ask for the reasoning before the answer.
        seed: with `"generate"`: None = the most probable token; a number = sampled as published, the same for the same
            image, seed and model, whatever else is in the batch.
        name: of the reward, as key of components and in logs.

    Raises:
        ImportError: at the first call, if transformers is not installed.
        ValueError: at the first call, if the model's family is not supported or it does not write digit by digit.

    Example:
        >>> from iqareward.rewards.vlm.presets import VISUALQUALITY_R1
        >>> reward = RatingReward("TianheWu/VisualQuality-R1-7B", VISUALQUALITY_R1, scale="mos")  # nothing is loaded
        >>> reward.bounds
        (1.0, 5.0)

    References:
        Wu et al., "VisualQuality-R1: Reasoning-Induced Image Quality Assessment via Reinforcement Learning to Rank",
        2025, https://arxiv.org/abs/2505.14460
    """

    def __init__(
        self,
        model: Source,
        preset: RatingPreset,
        scale: Literal["unit", "mos"] = "unit",
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
        if scale not in ("unit", "mos"):
            raise ValueError(f'{name} expected `scale` "unit" or "mos", got {scale!r}.')
        if mode not in ("expected", "generate"):
            raise ValueError(f'{name} expected `mode` "expected" or "generate", got {mode!r}.')
        if mode == "expected" and (thinking or seed is not None):
            raise ValueError(f'{name} expected `thinking` and `seed` with mode="generate" only: nothing is written.')
        if mode == "generate" and differentiable:
            raise ValueError(f'{name} expected `differentiable=False` with mode="generate": text has no gradient.')
        self.preset, self.scale = preset, scale
        self.mode, self.thinking, self.seed, self.min_digit_mass = mode, thinking, seed, min_digit_mass
        low, high = float(preset.ratings.low), float(preset.ratings.high)
        self._shift, self._span = (0.0, 1.0) if scale == "mos" else (low, high - low)
        self.bounds: Bounds = (low, high) if scale == "mos" else (0.0, 1.0)
        super().__init__(
            name,
            model,
            RatingReadout(preset, differentiable),
            device=device,
            dtype=dtype,
            differentiable=differentiable,
            batch_size=batch_size,
        )

    @property
    def prompt(self) -> str:
        """What the model continues, one placeholder for the image; loads the model if need be."""
        processor = self._judge.processor
        begun = self.preset.answer_prefix if self.mode == "expected" else ""
        return render(processor, self.preset, self._question, begun)

    @property
    def _question(self) -> str:
        return self.preset.thinking_question if self.thinking else self.preset.question

    def score_batch(self, images: Tensor) -> Tensor:
        """The expected rating of each image, on the scale of the reward."""
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
            network, start = self._asked().network, len(written)
            prompt = tokenize(
                network.processor, render(network.processor, preset, self._question), network.family.around
            )
            written.extend(write(network, images, prompt, preset.sampling, self.seed))
            return torch.arange(start, len(written), dtype=torch.float32, device=images.device)

        with reward_mode(differentiable=self.differentiable):
            found = self._rows(places, self._call(images))
            texts = ["" if place != place else written[int(place)] for place in found.tolist()]
            ratings = [parse_rating(text, preset.answer_pattern, preset.ratings) for text in texts]
            return Answers(torch.tensor(ratings, dtype=torch.float32, device=found.device), texts)
