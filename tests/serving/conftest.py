"""A running chat server of known distribution, and rewards that ask it."""

import pytest

from iqareward.rewards.vlm.presets import ZERO_SHOT_LEVELS
from iqareward.serving.judges import ServedVLMReward
from tests.vlm.chat_double import serve


@pytest.fixture
def double():
    """The server."""
    pytest.importorskip("httpx2", reason="needs the extra serve")
    with serve() as running:
        yield running


@pytest.fixture
def make(double):
    """Rewards of the double, closed at the end."""
    made = []

    def build(preset=ZERO_SHOT_LEVELS, *, url: str | list[str] = "", **options) -> ServedVLMReward:
        made.append(ServedVLMReward(url or double.url, "judge", preset, **options))
        return made[-1]

    yield build
    for reward in made:
        reward.close()
