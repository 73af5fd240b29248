"""What can only be seen on the published weights: run by hand with `IQAREWARD_VLM_WEIGHTS=1 pytest -m hub` (36 GB)."""

import os
from collections.abc import Callable

import pytest
from torch import Tensor

from iqareward.rewards.vlm.rewards import (
    LevelReward,
    QInsightReward,
    QReAlignReward,
    RatingReward,
    VisualQualityR1Reward,
)

pytestmark = [
    pytest.mark.hub,
    pytest.mark.skipif("IQAREWARD_VLM_WEIGHTS" not in os.environ, reason="set IQAREWARD_VLM_WEIGHTS=1"),
]


@pytest.mark.parametrize("build", [QReAlignReward, VisualQualityR1Reward, QInsightReward])
def test_published_weights(
    build: Callable[..., LevelReward | RatingReward], photographs: Tensor, degraded_photographs: Tensor
) -> None:
    """The models mean to answer as they are read, and find degraded photographs worse."""
    reward = build(scale="mos")
    mass = reward.mass(photographs) if isinstance(reward, LevelReward) else reward.reading(photographs).digit_mass
    assert (mass > 0.5).all(), f"{reward.name} goes on with a legal token with probability {mass.tolist()} only"
    assert (reward(photographs) > reward(degraded_photographs)).all()
