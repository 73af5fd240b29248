"""Numbers in the names of rewards, which tell rewards apart, also in a cache."""


def exact(number: float) -> str:
    """The shortest text that reads back as the same float64."""
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))
