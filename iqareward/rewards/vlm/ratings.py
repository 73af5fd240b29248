"""Which digits a numeric rating may have, what a started rating is worth, and how to read one from text."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@dataclass(frozen=True)
class Ratings:
    """All decimal ratings from `low` to `high`, such as 1.00, 1.01, ..., 5.00: the answers that a model may give.

    A rating is read digit by digit, so its beginnings matter: `""`, `"4"`, `"4."`, `"4.2"`, `"4.25"`.

    Args:
        low: lowest rating, one digit.
        high: highest rating, one digit.
        decimals: digits after the point.

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
        """Digits that may follow this beginning; after the highest whole number these are zeros only.

        Args:
            start: `""`, or a beginning that ends in the point or in a decimal that is not the last.

        Raises:
            ValueError: no rating begins like this, or no digit comes next.
        """
        found = tuple(digit for digit in range(10) if self._span(f"{start}{digit}") is not None)
        if not found:
            raise ValueError(f"no digit follows {start!r} in a rating of {self}.")
        return found

    def mean(self, start: str) -> float:
        """Mean of all ratings that begin like this: what a beginning is worth whose further digits were not read.

        Args:
            start: `""`, a digit, or a beginning with some or all decimals.

        Raises:
            ValueError: no rating begins like this.
        """
        span = self._span(start)
        if span is None:
            raise ValueError(f"no rating of {self} begins with {start!r}.")
        return float(sum(span, Fraction(0)) / 2)

    def _span(self, start: str) -> tuple[Fraction, Fraction] | None:
        """Lowest and highest rating that begin like this, exactly."""
        if start == "":
            return Fraction(self.low), Fraction(self.high)
        match = re.fullmatch(r"([0-9])(?:\.([0-9]*))?", start)
        if match is None or len(match[2] or "") > self.decimals:
            return None
        read = match[2] or ""
        lowest = Fraction(int(match[1] + read), 10 ** len(read))
        unread = Fraction(10 ** (self.decimals - len(read)) - 1, 10**self.decimals)
        highest = min(lowest + unread, Fraction(self.high))
        return None if lowest < self.low or lowest > highest else (lowest, highest)


def parse_rating(text: str, pattern: str, ratings: Ratings) -> float:
    """The rating in the last `<answer>` of a text; NaN if there is none, or none in the range.

    Args:
        text: what a model wrote.
        pattern: regular expression whose first group is the number, searched for in the answer.
        ratings: the range; its number of decimals is not enforced.

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
