"""Numeric answers of vision-language models: an expectation over the digits, or text that the model writes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from iqareward.rewards.readout import expected_value, token_logits
from iqareward.rewards.vlm.inputs import Prompt, digit_ids, tokenize
from iqareward.rewards.vlm.network import Branches, Features, Network
from iqareward.rewards.vlm.presets import Ratings, Sampling


class Answers(NamedTuple):
    """What a model wrote about each image.

    Attributes:
        ratings: `[B]` float32 on the images' device, on the preset's scale; NaN where none could be parsed.
        texts: The answers as written; empty for an image that cannot be scored.
    """

    ratings: Tensor
    texts: list[str]


@dataclass(frozen=True)
class DigitReadout:
    """How a rating is read digit by digit: the beginnings that the model is asked about, and what its answers mean."""

    ratings: Ratings
    digits: tuple[int, ...]  # token ids of 0 to 9
    point: int  # token id of the decimal point

    @property
    def first(self) -> tuple[int, ...]:
        """Digits that a rating may begin with."""
        return self.ratings.digits_after("")

    @property
    def open(self) -> tuple[int, ...]:
        """First digits that decimals follow; behind the highest there are only zeros."""
        return tuple(digit for digit in self.first if len(self.ratings.digits_after(f"{digit}.")) > 1)

    @property
    def branches(self) -> Branches:
        """A digit and the point for each open first digit, then ten digits behind every beginning but the longest."""
        ids, parents, read = list[int](), list[int](), list[int]()
        for digit in self.open:
            ids += [self.digits[digit], self.point]
            parents += [-1, len(ids) - 2]
            read.append(len(ids) - 1)
        level = list(read)
        for _ in range(self.ratings.decimals - 1):
            start = len(ids)
            ids += list(self.digits) * len(level)
            parents += [parent for parent in level for _ in self.digits]
            level = list(range(start, len(ids)))
            read += level
        return Branches(tuple(ids), tuple(parents), tuple(read))

    def expectation(self, first: Tensor, decimals: list[Tensor]) -> Tensor:
        """Mean rating `[B]` when every digit is drawn from the digits that may stand there.

        Args:
            first: `[B, first]` logits of the digits a rating may begin with.
            decimals: Logits of the ten digits behind every beginning, `[B, open, 10]`, `[B, open * 10, 10]`, ...
        """
        below: Tensor | None = None  # worth of the decimals behind each digit, from the last place on
        for place in range(self.ratings.decimals, 0, -1):
            unit = 10.0**-place
            worth: list[Tensor | float] = [digit * unit for digit in range(10)]
            if below is not None:
                worth = [digit * unit + below[..., digit] for digit in range(10)]
            found = expected_value(decimals[place - 1], worth)  # [B, open * 10 ** (place - 1)]
            below = found.unflatten(-1, (-1, 10)) if place > 1 else found
        assert below is not None
        behind = dict(zip(self.open, below.unbind(-1), strict=True))
        return expected_value(first, [digit + behind.get(digit, 0.0) for digit in self.first])


def prepare_rating(network: Network, text: str, ratings: Ratings) -> Callable[[Features], Tensor]:
    """A function from features to `[B, 2]`: expected rating and digit mass behind the rendered prompt `text`."""
    prompt = tokenize(network.processor, text, network.family.around)
    readout = DigitReadout(ratings, *digit_ids(network.processor, text))
    answer = (_side_by_side if network.shares_branches else _step_by_step)(network, prompt, readout)
    ids = torch.tensor(readout.digits, device=network.device)
    first_ids = ids[list(readout.first)]

    def read(features: Features) -> Tensor:
        first, decimals = answer(features)
        chosen, mass = token_logits(network.head(first), first_ids)
        found = readout.expectation(chosen, [network.head(place, ids).float() for place in decimals])
        return torch.stack([found, mass], dim=1)

    return read


# from features to the last layer `[B, values]` at the first digit, and `[B, beginnings, values]` at each decimal
_Digits = Callable[[Features], tuple[Tensor, list[Tensor]]]


def _side_by_side(network: Network, prompt: Prompt, readout: DigitReadout) -> _Digits:
    """All beginnings of the answer in the same pass as the prompt, which they share."""
    branches = readout.branches
    counts = [len(readout.open) * 10**place for place in range(readout.ratings.decimals)]

    def hidden(features: Features) -> tuple[Tensor, list[Tensor]]:
        first, *decimals = network.hidden(features, prompt, branches).split([1, *counts], dim=1)
        return first[:, 0], decimals

    return hidden


def _step_by_step(network: Network, prompt: Prompt, readout: DigitReadout) -> _Digits:
    """The prompt once, then one step for each decimal over its repeated cache."""
    starts = [[readout.digits[digit], readout.point] for digit in readout.open]
    ones = torch.tensor(readout.digits, device=network.device)[:, None]
    steps = [torch.tensor(starts, device=network.device), *[ones] * (readout.ratings.decimals - 1)]

    def hidden(features: Features) -> tuple[Tensor, list[Tensor]]:
        first, *decimals = network.steps(features, prompt, steps)
        return first, [place.unflatten(0, (features.tokens.shape[0], -1)) for place in decimals]

    return hidden


def write(network: Network, images: Tensor, text: str, sampling: Sampling, seed: int | None) -> list[str]:
    """What the model writes about a clean batch of one size; empty texts if it takes no image of that size.

    Args:
        network: The model.
        images: float32 `[b, 3, H, W]` in [0, 1].
        text: The rendered prompt.
        sampling: How published scores were sampled.
        seed: Seed of the samples; None = greedy.
    """
    from transformers import GenerationConfig

    inputs = network.family.images(images)
    if inputs is None:
        return [""] * images.shape[0]
    features = network.features(images[:1])  # to know how many tokens an image has; `generate` makes its own
    assert features is not None
    prompt = tokenize(network.processor, text, network.family.around)
    layout = network.layout(prompt, features.tokens.shape[1], features.grid, None)
    ids = layout.ids.expand(images.shape[0], -1)
    kinds = {"mm_token_type_ids": (ids == network.processor.image_token_id).int()} if inputs.grid else {}
    tokenizer = network.processor.tokenizer
    options = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    with network.writing:
        found = network.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=options,
            logits_processor=[] if seed is None else _sampler(sampling, seed),
            **inputs.keywords | {"pixel_values": inputs.keywords["pixel_values"].to(network.model.dtype)},
            **kinds,
        )
    return tokenizer.batch_decode(found[:, ids.shape[1] :], skip_special_tokens=True)


def _sampler(sampling: Sampling, seed: int) -> list[Any]:
    """Sampling as a change of the logits, after which the largest is a fair draw.

    The noise depends on the seed and the step alone, not on a generator that threads share or on the row: an image's
    answer is the same alone and in any batch.
    """
    from transformers.generation import logits_process as warpers

    shaped: list[Any] = []
    if sampling.temperature != 1:
        shaped.append(warpers.TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        shaped.append(warpers.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        shaped.append(warpers.TopPLogitsWarper(sampling.top_p))
    return [*shaped, GumbelNoise(seed)]


class GumbelNoise:
    """A logits processor that adds the same Gumbel noise to every row: the argmax is then a draw from the softmax."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = torch.rand(scores.shape[-1], generator=self._generator, dtype=torch.float64)
        noise = -(-uniform.clamp_min(torch.finfo(torch.float64).tiny).log()).log()
        return scores + noise.to(scores)
