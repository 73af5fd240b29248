"""The preprocessing experiment compares with pixels that are exact."""

import pytest
import torch

from benchmarks.jpeg_transport import rollouts
from benchmarks.preprocessing import WAYS, compare


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, float]]:
    chance = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 24, 32, generator=chance)
    photograph = torch.nn.functional.interpolate(coarse, (300, 400), mode="bilinear")[0]
    return compare(rollouts(photograph, chance))


def test_ours_is_pillow(found: dict[str, dict[str, float]]) -> None:
    """Pillow's own pixels differ by rounding of the normalisation only, and change no order."""
    assert found["Pillow itself"]["largest"] < 1e-3
    assert found["Pillow itself"]["piqe_tau"] == found["Pillow itself"]["niqe_tau"] == pytest.approx(1)


def test_shortcuts_are_not_exact(found: dict[str, dict[str, float]]) -> None:
    """Every shortcut moves some pixel by at least half a level; leaving rounding out moves more than doing it last."""
    assert all(found[way]["largest"] > 0.5 for way in WAYS if way != "Pillow itself")
    assert found["torch bicubic, antialiased"]["mean"] > found["torch bicubic, antialiased, rounded"]["mean"]
