"""A judge that runs offline where the documentation says "qalign"."""

import pytest
from torch import Tensor

from iqareward import NoReference
from iqareward.rewards.catalog import CATALOG
from iqareward.types import Reward


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


@pytest.fixture
def qalign(monkeypatch: pytest.MonkeyPatch) -> Reward:
    """Mean brightness under the name and bounds of Q-Align, which `load("qalign")` gives until the test ends."""
    judge = NoReference(brightness, higher_is_better=True, name="qalign", bounds=(0.0, 1.0))
    monkeypatch.setitem(CATALOG, "qalign", CATALOG["niqe"]._replace(build=lambda: judge))
    return judge
