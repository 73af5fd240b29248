"""A served judge gives the expectation of the server's own distribution, and keeps the contract."""

import asyncio
import math
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from iqareward.rewards.vlm.presets import (
    Q_INSIGHT,
    Q_REALIGN,
    VISUALQUALITY_R1,
    ZERO_SHOT_LEVELS,
    LevelPreset,
    RatingPreset,
    Ratings,
)
from iqareward.testing import check_reward
from tests.tolerances import EXACT, FORMULA_FP32
from tests.vlm.chat_double import LEVELS, next_token, of_brightness


def _images(count: int, height: int = 12, width: int = 10, seed: int = 0) -> Tensor:
    """Images of different brightness, so that their scores differ."""
    noise = torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))
    return noise * torch.linspace(0.3, 1.0, count)[:, None, None, None]


def _brightness(images: Tensor) -> list[float]:
    """What the double sees: the mean of 8-bit pixels."""
    return (images.double() * 255).round().mean((1, 2, 3)).div(255).tolist()


def expected_level(preset: LevelPreset, brightness: float) -> float:
    """Expected worth, from the whole distribution."""
    found = next_token(preset.stem, brightness)
    chosen = [found[level] for level in preset.levels]
    return math.fsum(p * w for p, w in zip(chosen, preset.worth, strict=True)) / math.fsum(chosen)


def expected_rating(preset: RatingPreset, brightness: float) -> float:
    """Expected rating by enumerating every answer with one decimal; the second decimal counts as its mean."""
    low, high = preset.ratings.low, preset.ratings.high
    first = next_token(preset.answer_prefix, brightness)
    whole = math.fsum(first[str(digit)] for digit in range(low, high + 1))
    total = 0.0
    for digit in range(low, high + 1):
        decimals = next_token(f"{preset.answer_prefix}{digit}.", brightness)
        legal = range(10) if digit < high else range(1)
        mass = math.fsum(decimals[str(k)] for k in legal)
        for k in legal:
            value = digit + k / 10 + (0.045 if digit < high else 0.0)
            total += first[str(digit)] / whole * decimals[str(k)] / mass * value
    return total


@pytest.mark.parametrize(
    "preset",
    [*Q_REALIGN.values(), ZERO_SHOT_LEVELS, replace(ZERO_SHOT_LEVELS, levels=tuple(LEVELS[:2]), worth=(1.0, 0.0))],
)
def test_level_scores_are_the_expected_worth(make, preset) -> None:
    """Equal to the sum over the double's own probabilities, on both scales, in the order of the images."""
    images = _images(5)
    expected = torch.tensor([expected_level(preset, b) for b in _brightness(images)])
    for scale, want in (("unit", expected), ("mos", 1 + 4 * expected)):
        torch.testing.assert_close(make(preset, scale=scale, min_mass=0.01)(images), want, **FORMULA_FP32)


@pytest.mark.parametrize("preset", [VISUALQUALITY_R1, Q_INSIGHT], ids=["visualquality_r1", "q_insight"])
def test_ratings_are_the_expectation_over_all_answers(make, preset) -> None:
    """Equal to the brute-force sum over every one-decimal answer, on both scales."""
    images = _images(5)
    expected = torch.tensor([expected_rating(preset, b) for b in _brightness(images)])
    torch.testing.assert_close(make(preset, scale="mos")(images), expected, **FORMULA_FP32)
    torch.testing.assert_close(make(preset)(images), (expected - 1) / 4, **FORMULA_FP32)


@pytest.mark.parametrize(("likely", "asked"), [("3", "124"), ("5", "1234"), ("7", "1234")])
def test_a_rating_asks_once_for_every_digit_that_matters(double, make, likely, asked) -> None:
    """The first request answers for the decimals of the digit that it writes; the highest digit needs none."""

    def undecided(request: dict, answer: str, image: np.ndarray) -> dict[str, float]:
        found = of_brightness(request, answer, image)
        if answer == "<answer>":
            found = {token: 0.7 * probability for token, probability in found.items()}
            found[likely] += 0.3
        return found

    double.distribution = undecided
    make(VISUALQUALITY_R1, min_mass=0.1)(_images(1))
    answers = sorted(request["messages"][-1]["content"] for request in double.requests)
    assert answers == ["<answer>", *(f"<answer>{digit}." for digit in asked)]


def test_a_sure_model_costs_one_request_and_the_bound_holds(double, make) -> None:
    """Digits below one in a thousand are not asked about; the rating is then within 0.0005 for each of them."""

    def sure(request: dict, answer: str, image: np.ndarray) -> dict[str, float]:
        found = of_brightness(request, answer, image)
        if answer == "<answer>":
            found = {token: 1e-5 * probability for token, probability in found.items()}
            found["3"] = 1 - math.fsum(p for token, p in found.items() if token != "3")
        return found

    double.distribution = sure
    images = _images(1)
    score = make(VISUALQUALITY_R1, scale="mos")(images)
    assert len(double.requests) == 1
    (brightness,) = _brightness(images)
    decimals = next_token("<answer>3.", brightness)
    mass = math.fsum(decimals[str(k)] for k in range(10))
    expected = math.fsum(decimals[str(k)] / mass * (3 + k / 10 + 0.045) for k in range(10))
    assert abs(score.item() - expected) < 4 * 0.0005


def test_requests_say_what_the_preset_says(double, make) -> None:
    """Order of image and text, system prompt, begun answer, template options, and nothing that bends probabilities."""
    make(Q_INSIGHT)(_images(1))
    make(VISUALQUALITY_R1)(_images(1))
    make(Q_REALIGN["quality"])(_images(1))
    by_model = {request["messages"][-1]["content"]: request for request in double.requests}
    insight, visual, level = (
        by_model[answer] for answer in (Q_INSIGHT.answer_prefix, "<answer>", "The quality of the image is")
    )
    assert [message["role"] for message in insight["messages"]] == ["system", "user", "assistant"]
    assert insight["messages"][0]["content"] == Q_INSIGHT.system
    assert [part["type"] for part in insight["messages"][1]["content"]] == ["text", "image_url"]
    assert insight["messages"][1]["content"][0]["text"] == Q_INSIGHT.question
    assert [message["role"] for message in visual["messages"]] == ["user", "assistant"]
    assert [part["type"] for part in visual["messages"][0]["content"]] == ["image_url", "text"]
    assert visual["messages"][0]["content"][1]["text"] == VISUALQUALITY_R1.question
    assert visual["chat_template_kwargs"] == {"add_vision_id": True, "enable_thinking": False}
    assert level["chat_template_kwargs"] == {"enable_thinking": False}
    assert (level["max_tokens"], visual["max_tokens"]) == (1, 3)
    for request in double.requests:
        assert request["model"] == "judge"
        assert (request["temperature"], request["top_p"], request["repetition_penalty"]) == (0.0, 1.0, 1.0)


def test_an_answer_may_begin_with_the_level(double, make) -> None:
    """Without a stem the server writes the generation prompt and no assistant message is sent."""
    preset = LevelPreset("Is it sharp?", stem="", levels=("1", "0"), worth=(1.0, 0.0))
    images = _images(2)
    found = [next_token("", b) for b in _brightness(images)]
    expected = torch.tensor([p["1"] / (p["1"] + p["0"]) for p in found])
    torch.testing.assert_close(make(preset, min_mass=0.05)(images), expected, **FORMULA_FP32)
    assert double.requests[0]["add_generation_prompt"] is True


def test_pixels_arrive_as_they_are(double, make) -> None:
    """What Pillow decodes on the other side is round(255 x) for every pixel."""
    images = _images(3, 17, 33)
    make(max_in_flight=1)(images)
    sent = sorted(double.images, key=lambda image: image.mean())
    for image, pixels in zip(images, sent, strict=True):
        np.testing.assert_array_equal(pixels, (image * 255).round().permute(1, 2, 0).byte().numpy())


@pytest.mark.parametrize(
    ("preset", "scale"), [(ZERO_SHOT_LEVELS, "unit"), (VISUALQUALITY_R1, "mos")], ids=["levels", "rating"]
)
def test_contract(make, preset, scale) -> None:
    """Shapes, bounds, independence of batch, order, thread and mode, pickling, isolation of broken images."""
    check_reward(make(preset, scale=scale), _images(3))


def test_broken_images_are_not_sent(double, make) -> None:
    """They get NaN without a request, whatever the mix of sizes."""
    images = [*_images(2), *_images(2, 8, 8)]
    images[1] = images[1] * torch.nan
    images[2] = images[2] * 255
    scores = make()(images)
    assert scores.isnan().tolist() == [False, True, True, False]
    assert len(double.requests) == 2


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_too_little_mass_is_nan_not_an_error(make) -> None:
    """A model that wants to say something else is not scored; the mass says so."""
    preset = replace(ZERO_SHOT_LEVELS, levels=(" excellent", " good"), worth=(1.0, 0.0))
    images = _images(2)
    scores, mass = make(preset).reading(images)
    expected = [next_token(preset.stem, b) for b in _brightness(images)]
    assert scores.isnan().all()
    torch.testing.assert_close(mass, torch.tensor([p[" excellent"] + p[" good"] for p in expected]), **FORMULA_FP32)
    ratings = make(replace(VISUALQUALITY_R1, answer_prefix="The quality of the image is")).reading(images)
    assert ratings.scores.isnan().all()
    assert (ratings.mass < 0.5).all()


def test_mass_is_the_probability_of_what_counts(make) -> None:
    """For ratings: of a legal first digit."""
    images = _images(3)
    _, mass = make(VISUALQUALITY_R1, min_mass=0.2).reading(images)
    found = [next_token("<answer>", b) for b in _brightness(images)]
    expected = torch.tensor([math.fsum(p[str(d)] for d in range(1, 6)) for p in found])
    torch.testing.assert_close(mass, expected, **FORMULA_FP32)


@pytest.mark.filterwarnings("ignore::iqareward.rewards.core.UnscoredWarning")
def test_levels_outside_the_list_of_the_server_are_nan(double, make) -> None:
    """If what the list leaves out could move the score, there is none, though the mass may be large."""

    def flat(request: dict, answer: str, image: np.ndarray) -> dict[str, float]:
        crowd = {f"word{i}": 0.3 / 19 for i in range(19)}
        return {" excellent": 0.7, **crowd, " bad": 1e-9}

    double.distribution = flat
    scores, mass = make(replace(ZERO_SHOT_LEVELS, levels=(" excellent", " bad"), worth=(1.0, 0.0))).reading(_images(1))
    assert scores.isnan().all()
    torch.testing.assert_close(mass, torch.tensor([0.7]), **FORMULA_FP32)


def test_coroutines_and_threads_share_one_client(double, make) -> None:
    """`await ascore` in a running loop, a plain call in that loop, and eight threads: the same numbers."""
    reward, images = make(max_in_flight=4), _images(4)
    expected = reward(images)

    async def caller() -> tuple[Tensor, Tensor, Tensor]:
        first, second = await asyncio.gather(reward.ascore(images), reward.ascore(images.flip(0)))
        return first, second, reward(images)

    first, second, third = asyncio.run(caller())
    for scores in (first, second.flip(0), third):
        torch.testing.assert_close(scores, expected, **EXACT)
    with ThreadPoolExecutor(max_workers=8) as pool:
        for scores in pool.map(reward, [images] * 8):
            torch.testing.assert_close(scores, expected, **EXACT)
    assert double.connections <= 4
    assert double.most_in_flight <= 4


def test_concurrency_is_used_and_bounded(double, make) -> None:
    """Twelve slow requests with three at a time: never more, and connections are kept."""
    double.seconds = 0.02
    reward = make(max_in_flight=3)
    reward(_images(12))
    reward(_images(12))
    assert double.most_in_flight == 3
    assert double.connections == 3


def test_rewards_travel_without_connections(make) -> None:
    """A used reward pickles small, and the copy opens its own connections."""
    reward, images = make(), _images(2)
    expected = reward(images)
    data = pickle.dumps(reward)
    assert len(data) < 3000
    copy = pickle.loads(data)
    torch.testing.assert_close(copy(images), expected, **EXACT)
    copy.close()
    torch.testing.assert_close(copy(images), expected, **EXACT)  # closing is not the end
    copy.close()


def test_the_scale_of_ratings_is_their_own(make) -> None:
    """`"mos"` keeps the preset's range, as RatingReward does; `"unit"` divides by it."""
    preset = replace(VISUALQUALITY_R1, ratings=Ratings(0, 9, 1))
    images = _images(3)
    mos, unit = make(preset, scale="mos"), make(preset)
    assert (mos.bounds, unit.bounds) == ((0.0, 9.0), (0.0, 1.0))
    torch.testing.assert_close(mos(images), 9 * unit(images), **FORMULA_FP32)
