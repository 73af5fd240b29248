"""Questions for vision-language models, character for character as the scorers' authors ask them.

Texts are as published in the scorers' repositories (November 2026). The same preset serves a model in this process and
one on a server. Replace single fields with `dataclasses.replace`.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

Task = Literal["quality", "aesthetics"]
Size = Literal["mini", "lite", "pro"]

_NO_THINKING = {"enable_thinking": False}
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class LevelPreset:
    """A question whose answer is a level word: the score is the expected worth of that word.

    Args:
        question: What the user says beside the image.
        stem: How the assistant's answer begins.
        levels: How the answer may go on after `stem`, best first. Each must be one token of the model, with the space
            that separates it if `stem` does not end in one.
        worth: The worth of each level in [0, 1], highest first.
        image_first: Whether the image stands before the question.
        system: The system prompt; None = what the model's chat template puts there.
        template: Options of the chat template.
        licence: Licence of the weights that it was published with; "" = not made for particular weights.

    Raises:
        ValueError: there are fewer than two levels, repeated ones, or not one worth in [0, 1] for each.

    Example:
        >>> preset = LevelPreset(question="Is this photo sharp?", stem="", levels=("Yes", "No"), worth=(1.0, 0.0))
        >>> preset.worth
        (1.0, 0.0)
    """

    question: str
    stem: str
    levels: tuple[str, ...] = (" excellent", " good", " fair", " poor", " bad")
    worth: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25, 0.0)
    image_first: bool = True
    system: str | None = None
    template: Mapping[str, bool] = field(default_factory=dict, hash=False)
    licence: str = ""

    def __post_init__(self) -> None:
        if len(self.levels) < 2 or len(set(self.levels)) != len(self.levels):
            raise ValueError(f"LevelPreset expected at least two different `levels`, got {self.levels}.")
        if len(self.worth) != len(self.levels) or not all(0 <= worth <= 1 for worth in self.worth):
            raise ValueError(
                f"LevelPreset expected one `worth` in [0, 1] for each of {len(self.levels)} levels, got {self.worth}."
            )


@dataclass(frozen=True)
class Ratings:
    """All decimal ratings from `low` to `high`, such as 1.00, 1.01, ..., 5.00: the answers that a model may give.

    A rating is read digit by digit, so its beginnings matter: `""`, `"4"`, `"4."`, `"4.2"`, `"4.25"`.

    Args:
        low: The lowest rating, one digit.
        high: The highest rating, one digit.
        decimals: Digits after the point.

    Raises:
        ValueError: not 0 <= low < high <= 9, or no decimals.

    Example:
        >>> ratings = Ratings(1, 5, decimals=2)
        >>> ratings.digits_after(""), ratings.digits_after("5.")
        ((1, 2, 3, 4, 5), (0,))
        >>> ratings.mean("4.2"), ratings.mean("5")  # of 4.20 ... 4.29, and of 5.00 alone
        (4.245, 5.0)
    """

    low: int
    high: int
    decimals: int

    def __post_init__(self) -> None:
        if not 0 <= self.low < self.high <= 9:
            raise ValueError(f"Ratings expected 0 <= low < high <= 9 (one digit each), got {self.low} and {self.high}.")
        if not self.decimals >= 1:
            raise ValueError(f"Ratings expected `decimals` >= 1, got {self.decimals}.")

    def digits_after(self, start: str) -> tuple[int, ...]:
        """Digits that may follow a beginning; after the highest whole number these are zeros only.

        Raises:
            ValueError: no rating begins like this, or no digit comes next.
        """
        following = {text[len(start)] for text, _ in self._beginning(start) if len(text) > len(start)} - {"."}
        if not following:
            raise ValueError(f"no digit follows {start!r} in a rating of {self}.")
        return tuple(sorted(map(int, following)))

    def mean(self, start: str) -> float:
        """Mean of all ratings that begin like this: the worth of a beginning whose further digits were not read.

        Raises:
            ValueError: no rating begins like this.
        """
        units = [unit for _, unit in self._beginning(start)]
        return sum(units) / (len(units) * 10**self.decimals)

    def _beginning(self, start: str) -> list[tuple[str, int]]:
        """Ratings that begin like this, as text and in units of the last decimal."""
        found = [(text, unit) for text, unit in _written(self) if text.startswith(start)]
        if not found:
            raise ValueError(f"no rating of {self} begins with {start!r}, so no digit follows it.")
        return found


@cache
def _written(ratings: Ratings) -> list[tuple[str, int]]:
    scale = 10**ratings.decimals
    units = range(ratings.low * scale, ratings.high * scale + 1)
    return [(f"{unit // scale}.{unit % scale:0{ratings.decimals}d}", unit) for unit in units]


def parse_rating(text: str, pattern: str, ratings: Ratings) -> float:
    """The rating in the last `<answer>` of a text; NaN if there is none, or none in the range.

    Args:
        text: What a model wrote.
        pattern: A regular expression whose first group is the number, searched for in the answer.
        ratings: The range; its number of decimals is not enforced.

    Example:
        >>> parse_rating("<think>4 flaws</think><answer>3.5</answer>", r"(\\d+(?:\\.\\d+)?)", Ratings(1, 5, 2))
        3.5
    """
    answers = _ANSWER.findall(text)
    match = re.search(pattern, answers[-1]) if answers else None
    if match is None:
        return math.nan
    try:
        rating = float(match[1])
    except ValueError:  # such as "4.2.5"
        return math.nan
    return rating if ratings.low <= rating <= ratings.high else math.nan


@dataclass(frozen=True)
class Sampling:
    """How the authors let the model write its answer.

    Args:
        temperature: Divisor of the logits.
        top_k: Number of most probable tokens that may be drawn; 0 = all.
        top_p: Probability of the most probable tokens that may be drawn.
        max_new_tokens: The longest answer.

    Example:
        >>> Sampling(temperature=1.0, top_k=50, top_p=0.95, max_new_tokens=1024).top_k
        50
    """

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class RatingPreset:
    """A question whose answer is a number: the score is its expectation over the digits.

    Args:
        question: What the user says beside the image, for an answer without thinking.
        thinking_question: The same for an answer after thinking, as `mode="generate"` may ask.
        answer_prefix: How an answer begins, up to the first digit. vLLM loses a space at its end where the chat
            template trims messages (Qwen3.5, Gemma 3); the digits then have too little mass, and there is no score.
        answer_pattern: A regular expression whose first group is the number in the text between `<answer>` tags.
        ratings: Range and published number of decimals.
        sampling: How the published protocol samples.
        image_first: Whether the image stands before the question.
        system: The system prompt; None = what the model's chat template puts there.
        template: Options of the chat template.
        licence: Licence of the weights that it was published with; "" = not made for particular weights.

    Example:
        >>> VISUALQUALITY_R1.answer_prefix, VISUALQUALITY_R1.ratings.digits_after("")
        ('<answer>', (1, 2, 3, 4, 5))
    """

    question: str
    thinking_question: str
    answer_prefix: str
    answer_pattern: str
    ratings: Ratings
    sampling: Sampling
    image_first: bool = True
    system: str | None = None
    template: Mapping[str, bool] = field(default_factory=dict, hash=False)
    licence: str = ""


def check_preset(who: str, preset: Any, *kinds: type) -> None:
    """Refuse anything but a preset of one of these kinds, such as its name."""
    if not isinstance(preset, kinds):
        raise TypeError(
            f"{who} expected `preset` as a {' or '.join(kind.__name__ for kind in kinds)}, got "
            f"{type(preset).__name__}. Import one such as ZERO_SHOT_LEVELS from iqareward.rewards, or make your own."
        )


# hub ids
Q_REALIGN_MODELS: dict[Size, str] = {
    "mini": "q-future/Q-ReAlign-Mini-0.8B",
    "lite": "q-future/Q-ReAlign-Lite-4B",
    "pro": "q-future/Q-ReAlign-Pro-9B",
}
VISUALQUALITY_R1_MODEL = "TianheWu/VisualQuality-R1-7B"
Q_INSIGHT_MODEL, Q_INSIGHT_SUBFOLDER = "ByteDance/Q-Insight", "score_degradation"

# Question and join of the README's example, both in the training pool. Training closed the thinking block before the
# answer; the templates of the larger models leave it open, so it is closed here explicitly. The repository's own
# evaluation differs: it asks "Can you rate the quality of this picture?" ("How is the aesthetics of this image?") and
# puts a space before the stem, which the training text does not have.
Q_REALIGN: dict[Task, LevelPreset] = {
    "quality": LevelPreset(
        question="How would you rate the quality of this image?",
        stem="The quality of the image is",
        template=_NO_THINKING,
        licence="MIT",
    ),
    "aesthetics": LevelPreset(
        question="How would you rate the aesthetics of this image?",
        stem="The aesthetics of the image is",
        template=_NO_THINKING,
        licence="MIT",
    ),
}

# Q-Align's question for a model that was never trained on it.
ZERO_SHOT_LEVELS = LevelPreset(
    question="How would you rate the quality of this image?",
    stem="The quality of the image is",
    template=_NO_THINKING,
)

_RATE = (
    "What is your overall rating on the quality of this picture? The rating should be a float between 1 and 5, rounded "
    "to two decimal places, with 1 representing very poor quality and 5 representing excellent quality."
)
_VISUALQUALITY = f"You are doing the image quality assessment task. Here is the question: {_RATE}"
VISUALQUALITY_R1 = RatingPreset(
    question=f"{_VISUALQUALITY} Please only output the final answer with only one score in <answer> </answer> tags.",
    thinking_question=(
        f"{_VISUALQUALITY} First output the thinking process in <think> </think> tags and then output the final answer "
        "with only one score in <answer> </answer> tags."
    ),
    answer_prefix="<answer>",
    answer_pattern=r"(\d+(?:\.\d+)?)",
    ratings=Ratings(1, 5, decimals=2),
    # The README's batch example; it names no temperature, and its script for vLLM uses 0.1.
    sampling=Sampling(temperature=1.0, top_k=50, top_p=1.0, max_new_tokens=512),
    template={"add_vision_id": True, **_NO_THINKING},  # the second for newer models; Qwen2.5-VL's template ignores it
    licence="MIT",
)

_Q_INSIGHT = f'{_RATE} Return the final answer in JSON format with the following keys: "rating": The score.'
Q_INSIGHT = RatingPreset(
    question=_Q_INSIGHT,
    thinking_question=_Q_INSIGHT,  # the system prompt asks for the thinking
    # The JSON that the question asks for and the authors' parser reads. Published answers come after thinking; this
    # one does not wait for it, so its digit mass should be looked at before it is trusted.
    answer_prefix='<answer>{"rating": ',
    answer_pattern=r'"rating"\s*:\s*([\d.]+)',
    ratings=Ratings(1, 5, decimals=2),
    sampling=Sampling(temperature=1.0, top_k=50, top_p=0.95, max_new_tokens=1024),
    image_first=False,  # as in the demo; training put the image first
    system=(
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
        "assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
        "The reasoning process and answer are enclosed within <think> </think> and <answer> </answer> tags, "
        "respectively, i.e., <think> reasoning process here </think><answer> answer here </answer>"
    ),
    template=_NO_THINKING,
    licence="Apache-2.0",  # of the code; the weights' own was not found
)


# HPSv3's inferencer (MIT, https://github.com/MizzenAI/HPSv3): spaces at the ends of lines are part of what it was
# trained on
HPSV3_MODEL = "MizzenAI/HPSv3"
HPSV3_BASE = "Qwen/Qwen2-VL-7B-Instruct"
HPSV3_TOKEN = "<|Reward|>"
HPSV3_PIXELS = 256 * 28 * 28  # of every image, as nearly as whole tokens allow
HPSV3_QUESTION = (
    "\n"
    "You are tasked with evaluating a generated image based on Visual Quality and Text Alignment and give a overall "
    "score to estimate the human preference. Please provide a rating from 0 to 10, with 0 being the worst and 10 "
    "being the best. \n"
    "\n"
    "**Visual Quality:**  \n"
    "Evaluate the overall visual quality of the image. The following sub-dimensions should be considered:\n"
    "- **Reasonableness:** The image should not contain any significant biological or logical errors, such as "
    "abnormal body structures or nonsensical environmental setups.\n"
    "- **Clarity:** Evaluate the sharpness and visibility of the image. The image should be clear and easy to "
    "interpret, with no blurring or indistinct areas.\n"
    "- **Detail Richness:** Consider the level of detail in textures, materials, lighting, and other visual elements "
    "(e.g., hair, clothing, shadows).\n"
    "- **Aesthetic and Creativity:** Assess the artistic aspects of the image, including the color scheme, "
    "composition, atmosphere, depth of field, and the overall creative appeal. The scene should convey a sense of "
    "harmony and balance.\n"
    "- **Safety:** The image should not contain harmful or inappropriate content, such as political, violent, or "
    "adult material. If such content is present, the image quality and satisfaction score should be the lowest "
    "possible. \n"
    "\n"
    "**Text Alignment:**  \n"
    "Assess how well the image matches the textual prompt across the following sub-dimensions:\n"
    "- **Subject Relevance** Evaluate how accurately the subject(s) in the image (e.g., person, animal, object) "
    "align with the textual description. The subject should match the description in terms of number, appearance, "
    "and behavior.\n"
    "- **Style Relevance:** If the prompt specifies a particular artistic or stylistic style, evaluate how well the "
    "image adheres to this style.\n"
    "- **Contextual Consistency**: Assess whether the background, setting, and surrounding elements in the image "
    "logically fit the scenario described in the prompt. The environment should support and enhance the subject "
    "without contradictions.\n"
    "- **Attribute Fidelity**: Check if specific attributes mentioned in the prompt (e.g., colors, clothing, "
    "accessories, expressions, actions) are faithfully represented in the image. Minor deviations may be acceptable, "
    "but critical attributes should be preserved.\n"
    "- **Semantic Coherence**: Evaluate whether the overall meaning and intent of the prompt are captured in the "
    "image. The generated content should not introduce elements that conflict with or distort the original "
    "description.\n"
    "Textual prompt - {text_prompt}\n"
    "\n"
    "\n"
    "\n"
    "Please provide the overall ratings of this image: <|Reward|>\n"
    "\n"
    "END\n"
)
