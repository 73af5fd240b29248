"""The maps to [0, 1] that ship with the package, fitted by `python -m benchmarks.fit_calibration`."""

import json
from functools import cache
from pathlib import Path

from iqareward.rewards.combine import Calibrated, ScoreMap, map_of
from iqareward.types import Reward

FILE = Path(__file__).with_name("calibrations.json")


@cache
def calibrations() -> dict[str, ScoreMap]:
    """Name of a reward -> its shipped map: of the images of the fit a tenth scores below 0.1, a tenth above 0.9.

    Example:
        >>> import torch
        >>> calibrations()["psnr"](torch.tensor([20.0, 30.0, 40.0]))
        tensor([0.0570, 0.5273, 0.9537])
    """
    return {name: map_of(fields) for name, fields in json.loads(FILE.read_text())["maps"].items()}


@cache
def uncalibrated() -> dict[str, str]:
    """Name of a reward whose scores leave [-1, 1] -> why no map of it ships."""
    return json.loads(FILE.read_text())["none"]


def calibrated(reward: Reward) -> Calibrated:
    """The reward with its shipped map, as `load("psnr[calibrated]")` makes it.

    Raises:
        ValueError: there is none.
    """
    score_map = calibrations().get(reward.name)
    if score_map is None:
        low, high = reward.bounds
        on_scale = low is not None and high is not None and -1 <= low < high <= 1
        reason = uncalibrated().get(
            reward.name, f"its scores lie in [{low:g}, {high:g}]" if on_scale else "none was fitted"
        )
        raise ValueError(
            f"{reward.name} has no shipped calibration: {reason}. Write the scores that become 0 and 1, as in "
            f"'{reward.name}[low, high]', or fit a map on your own images: Calibrated(reward, LogisticMap.fit(scores))."
        )
    return Calibrated(reward, score_map, name=f"{reward.name}[calibrated]")
