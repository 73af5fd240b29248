"""Published texts are exact, and the digits of a rating are those of its range."""

import itertools
import math
import pickle
from dataclasses import replace

import pytest

from iqareward.rewards.vlm.presets import (
    Q_INSIGHT,
    Q_REALIGN,
    VISUALQUALITY_R1,
    ZERO_SHOT_LEVELS,
    LevelPreset,
    Ratings,
    parse_rating,
)

RANGES = [Ratings(low, high, decimals) for low, high in ((0, 9), (1, 5), (0, 1), (3, 8)) for decimals in (1, 2)]


def _all_ratings(ratings: Ratings) -> list[str]:
    """Every legal rating as text, counted in units of the last decimal."""
    scale = 10**ratings.decimals
    return [
        f"{unit // scale}.{unit % scale:0{ratings.decimals}d}"
        for unit in range(ratings.low * scale, ratings.high * scale + 1)
    ]


@pytest.mark.parametrize("ratings", RANGES, ids=str)
def test_digits_and_means_are_those_of_the_enumerated_ratings(ratings) -> None:
    """For every beginning: the next digits are exactly those that occur, and its worth is the mean of what follows."""
    texts = _all_ratings(ratings)
    starts = {text[:length] for text in texts for length in range(len(text) + 1)}
    for start in starts:
        matching = [text for text in texts if text.startswith(start)]
        following = {text[len(start)] for text in matching if len(text) > len(start)}
        assert math.isclose(ratings.mean(start), sum(map(float, matching)) / len(matching), rel_tol=1e-12)
        if following and following != {"."}:
            assert ratings.digits_after(start) == tuple(sorted(map(int, following)))
        else:
            with pytest.raises(ValueError, match="no digit follows"):
                ratings.digits_after(start)


@pytest.mark.parametrize("ratings", RANGES, ids=str)
def test_beginnings_that_no_rating_has_are_refused(ratings) -> None:
    """Every string of up to three digits and points that begins no rating raises."""
    starts = {text[:length] for text in _all_ratings(ratings) for length in range(len(text) + 1)}
    candidates = {"".join(c) for length in range(1, 4) for c in itertools.product("0123456789.", repeat=length)}
    assert {start for start in candidates if _begins(ratings, start)} == candidates & starts


def _begins(ratings: Ratings, start: str) -> bool:
    try:
        ratings.mean(start)
    except ValueError:
        return False
    return True


def test_impossible_ranges_are_refused() -> None:
    """Each error names what was expected."""
    for low, high in ((5, 1), (1, 10), (-1, 5), (3, 3)):
        with pytest.raises(ValueError, match="one digit each"):
            Ratings(low, high, 2)
    with pytest.raises(ValueError, match="decimals"):
        Ratings(1, 5, 0)


@pytest.mark.parametrize(
    ("preset", "text", "rating"),
    [
        (VISUALQUALITY_R1, "<answer>4.25</answer>", 4.25),
        (VISUALQUALITY_R1, "<think>it has <answer>1</answer></think>\n<answer>\n3.5 </answer>", 3.5),
        (VISUALQUALITY_R1, "<answer>5</answer>", 5.0),
        (VISUALQUALITY_R1, "<answer>7.5</answer>", math.nan),
        (VISUALQUALITY_R1, "<answer>good</answer>", math.nan),
        (VISUALQUALITY_R1, "<think>there are 3 flaws", math.nan),
        (VISUALQUALITY_R1, "", math.nan),
        (Q_INSIGHT, '<think>3 flaws</think><answer>{"rating": 2.75}</answer>', 2.75),
        (Q_INSIGHT, '<answer>```json\n{"rating" : 4}\n```</answer>', 4.0),
        (Q_INSIGHT, '<answer>{"rating": 4.2.5}</answer>', math.nan),
        (Q_INSIGHT, "<answer>3.5</answer>", math.nan),
    ],
)
def test_ratings_are_parsed_from_answers_and_never_guessed(preset, text, rating) -> None:
    """The last answer counts; without a number in the range there is none, and numbers in the thinking do not count."""
    assert parse_rating(text, preset.answer_pattern, preset.ratings) == pytest.approx(rating, nan_ok=True)


def test_thinking_is_closed_explicitly() -> None:
    """Some templates would leave a thinking block open before the begun answer."""
    for preset in (*Q_REALIGN.values(), ZERO_SHOT_LEVELS, VISUALQUALITY_R1, Q_INSIGHT):
        assert preset.template["enable_thinking"] is False


def test_the_answer_follows_its_prefix() -> None:
    """The prefix, any rating and a closing tag are read back as that rating: prefix and pattern agree."""
    closing = {VISUALQUALITY_R1: "</answer>", Q_INSIGHT: "}</answer>"}
    for preset, close in closing.items():
        assert parse_rating(f"{preset.answer_prefix}4.25{close}", preset.answer_pattern, preset.ratings) == 4.25


def test_presets_are_values() -> None:
    """They compare, hash, pickle, and give edited copies."""
    for preset in (*Q_REALIGN.values(), ZERO_SHOT_LEVELS, VISUALQUALITY_R1, Q_INSIGHT):
        assert pickle.loads(pickle.dumps(preset)) == preset
        assert hash(replace(preset, question=preset.question)) == hash(preset)
        assert replace(preset, question="Is it sharp?") != preset


def test_levels_and_worth_must_match() -> None:
    """A level without a worth, or a worth outside [0, 1], is an error at construction."""
    with pytest.raises(ValueError, match="one `worth`"):
        LevelPreset("q", "s", levels=(" good", " bad"), worth=(1.0, 0.5, 0.0))
    with pytest.raises(ValueError, match="one `worth`"):
        LevelPreset("q", "s", levels=(" good", " bad"), worth=(5.0, 1.0))
    with pytest.raises(ValueError, match="different"):
        LevelPreset("q", "s", levels=(" good", " good"), worth=(1.0, 0.0))
