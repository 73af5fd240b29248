"""Image-quality rewards and difficulty-adaptive weighting for training diffusion models with reinforcement learning.

Everything a user needs is a name of this package. Names are imported when they are first used, so that
`import iqareward` is instant and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iqareward.images import to_images as to_images
    from iqareward.rewards.calibration import AffineMap as AffineMap
    from iqareward.rewards.calibration import Calibrated as Calibrated
    from iqareward.rewards.calibration import CDFMap as CDFMap
    from iqareward.rewards.calibration import LogisticMap as LogisticMap
    from iqareward.rewards.calibration import load_map as load_map
    from iqareward.rewards.calibration import save_map as save_map
    from iqareward.rewards.catalog import load as load
    from iqareward.rewards.compose import Chunked as Chunked
    from iqareward.rewards.compose import SoftMin as SoftMin
    from iqareward.rewards.compose import WeightedSum as WeightedSum
    from iqareward.rewards.compose import evaluate as evaluate
    from iqareward.rewards.fidelity import FidelityFloor as FidelityFloor
    from iqareward.rewards.metric import FullReference as FullReference
    from iqareward.rewards.metric import NoReference as NoReference
    from iqareward.testing import check_reward as check_reward
    from iqareward.types import Reward as Reward

__version__ = "0.1.0"

_HOME = {
    "to_images": "images",
    "AffineMap": "rewards.calibration",
    "Calibrated": "rewards.calibration",
    "CDFMap": "rewards.calibration",
    "LogisticMap": "rewards.calibration",
    "load_map": "rewards.calibration",
    "save_map": "rewards.calibration",
    "load": "rewards.catalog",
    "Chunked": "rewards.compose",
    "SoftMin": "rewards.compose",
    "WeightedSum": "rewards.compose",
    "evaluate": "rewards.compose",
    "FidelityFloor": "rewards.fidelity",
    "FullReference": "rewards.metric",
    "NoReference": "rewards.metric",
    "check_reward": "testing",
    "Reward": "types",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
