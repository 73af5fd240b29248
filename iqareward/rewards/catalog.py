"""Every reward that has a name, in one literal table; `load` builds them and their weighted sums."""

from collections.abc import Callable
from typing import NamedTuple

from iqareward.types import Reward


class Entry(NamedTuple):
    """A row of the catalogue.

    Attributes:
        build: `build(differentiable=...)` gives the reward.
        licence: of the metric's code and weights as we use them.
        extra: the extra of this package that it needs; "" = none.
        summary: what a score says.
    """

    build: Callable[..., Reward]
    licence: str
    extra: str
    summary: str


CATALOG: dict[str, Entry] = {}
