"""Image-quality rewards and difficulty-adaptive weighting for training diffusion models with reinforcement learning.

Everything a user needs is a name of this package. Names are imported when they are first used, so that
`import iqareward` is instant and loads no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iqareward.advantages import RewardMemory as RewardMemory
    from iqareward.advantages import combine_advantages as combine_advantages
    from iqareward.advantages import group_advantages as group_advantages
    from iqareward.difficulty import DifficultyMemory as DifficultyMemory
    from iqareward.difficulty import reference_distance as reference_distance
    from iqareward.images import to_images as to_images
    from iqareward.rewards.batching import MicroBatched as MicroBatched
    from iqareward.rewards.batching import Overlapped as Overlapped
    from iqareward.rewards.cached import Cached as Cached
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
    from iqareward.rewards.lpips_dists import DISTSReward as DISTSReward
    from iqareward.rewards.lpips_dists import LPIPSReward as LPIPSReward
    from iqareward.rewards.metric import FullReference as FullReference
    from iqareward.rewards.metric import NoReference as NoReference
    from iqareward.rewards.owl2.deqa import DeQAReward as DeQAReward
    from iqareward.rewards.owl2.qalign import QAlignReward as QAlignReward
    from iqareward.rewards.piq_metrics import PIQReward as PIQReward
    from iqareward.rewards.pyiqa import PyIQAReward as PyIQAReward
    from iqareward.rewards.vlm.level import LevelReward as LevelReward
    from iqareward.rewards.vlm.published import QInsightReward as QInsightReward
    from iqareward.rewards.vlm.published import QReAlignReward as QReAlignReward
    from iqareward.rewards.vlm.published import VisualQualityR1Reward as VisualQualityR1Reward
    from iqareward.rewards.vlm.published import zero_shot_level_reward as zero_shot_level_reward
    from iqareward.rewards.vlm.rating import RatingReward as RatingReward
    from iqareward.serving.remote import RemoteReward as RemoteReward
    from iqareward.serving.served import ServedVLMReward as ServedVLMReward
    from iqareward.testing import check_reward as check_reward
    from iqareward.types import Reward as Reward
    from iqareward.weighting import AdaptiveWeighter as AdaptiveWeighter
    from iqareward.weighting import LossWeights as LossWeights
    from iqareward.weighting import mixed_loss as mixed_loss

__version__ = "0.1.0"

_HOME = {
    "DifficultyMemory": "difficulty",
    "reference_distance": "difficulty",
    "RewardMemory": "advantages",
    "combine_advantages": "advantages",
    "group_advantages": "advantages",
    "to_images": "images",
    "LossWeights": "weighting",
    "mixed_loss": "weighting",
    "MicroBatched": "rewards.batching",
    "Cached": "rewards.cached",
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
    "DISTSReward": "rewards.lpips_dists",
    "LPIPSReward": "rewards.lpips_dists",
    "FullReference": "rewards.metric",
    "NoReference": "rewards.metric",
    "DeQAReward": "rewards.owl2.deqa",
    "QAlignReward": "rewards.owl2.qalign",
    "LevelReward": "rewards.vlm.level",
    "QInsightReward": "rewards.vlm.published",
    "QReAlignReward": "rewards.vlm.published",
    "VisualQualityR1Reward": "rewards.vlm.published",
    "zero_shot_level_reward": "rewards.vlm.published",
    "RatingReward": "rewards.vlm.rating",
    "ServedVLMReward": "serving.served",
    "Overlapped": "rewards.batching",
    "PIQReward": "rewards.piq_metrics",
    "PyIQAReward": "rewards.pyiqa",
    "RemoteReward": "serving.remote",
    "check_reward": "testing",
    "Reward": "types",
    "AdaptiveWeighter": "weighting",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
