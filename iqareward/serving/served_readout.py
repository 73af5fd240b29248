"""What to ask a chat server about one image, and the score that its token probabilities make."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, NamedTuple, TypeVar

from iqareward.rewards.vlm.presets import LevelPreset, RatingPreset
from iqareward.serving.served_chat import shares

T = TypeVar("T")

Ask = Callable[[str, int], Awaitable[list[tuple[str, dict[str, float]]]]]
"""`ask(answer, max_tokens)`: the tokens that follow a begun answer, each with its alternatives."""

# A first digit that is less likely than this is not asked about again: its ratings count as their mean, which is at
# most half a unit off, so a rating moves by less than 0.0005 for each such digit.
NEGLIGIBLE = 1e-3


class Answer(NamedTuple):
    """What was read about one image.

    Attributes:
        value: in [0, 1]; NaN if the tokens that count were too improbable.
        mass: probability that the first token was one that counts.
        error: why there is neither; "" = there are.
    """

    value: float
    mass: float
    error: str = ""


async def read_level(ask: Ask, preset: LevelPreset, min_mass: float) -> Answer:
    """The expected worth of the level word: one request."""
    ((_, logprobs), *_) = await ask(preset.stem, 1)
    probabilities, mass = shares(logprobs, preset.levels, min_mass)
    return Answer(math.fsum(p * worth for p, worth in zip(probabilities, preset.worth, strict=True)), mass)


async def read_rating(ask: Ask, preset: RatingPreset, min_mass: float) -> Answer:
    """The expected rating, read to its first decimal; later decimals count as their mean.

    The first request writes three tokens, so that it also answers for the decimals of the most probable first digit.
    Every other digit with decimals that is not negligible costs one more request of one token, whose image and prompt
    the server has in its prefix cache: one or two requests for a sure model, four for an undecided one on [1, 5].
    """
    ratings = preset.ratings
    written = await ask(preset.answer_prefix, 3)
    first = [str(digit) for digit in ratings.digits_after("")]
    probabilities, mass = shares(written[0][1], first, min_mass)
    if math.isnan(probabilities[0]):
        return Answer(math.nan, mass)
    known = {written[0][0]: written[2][1]} if len(written) == 3 and written[1][0] == "." else {}

    async def worth(start: str, probability: float) -> float:
        decimals = [f"{start}.{digit}" for digit in ratings.digits_after(f"{start}.")]
        if len(decimals) == 1 or probability < NEGLIGIBLE:
            return ratings.mean(start)
        logprobs = known.get(start)
        if logprobs is None:
            ((_, logprobs), *_) = await ask(f"{preset.answer_prefix}{start}.", 1)
        found, _ = shares(logprobs, [rating[-1] for rating in decimals], min_mass)
        return math.fsum(p * ratings.mean(rating) for p, rating in zip(found, decimals, strict=True))

    values = await together(worth(*branch) for branch in zip(first, probabilities, strict=True))
    rating = math.fsum(p * value for p, value in zip(probabilities, values, strict=True))
    return Answer((rating - ratings.low) / (ratings.high - ratings.low), mass)


async def together(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; the first error ends the others."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
