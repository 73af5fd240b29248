"""The public names, which are imported when they are first used."""

from .advantages import RewardMemory as RewardMemory
from .advantages import combine_advantages as combine_advantages
from .advantages import group_advantages as group_advantages
from .difficulty import DifficultyMemory as DifficultyMemory
from .difficulty import reference_distance as reference_distance
from .images import to_images as to_images
from .monitor import HackingMonitor as HackingMonitor
from .rewards.batching import MicroBatched as MicroBatched
from .rewards.batching import Overlapped as Overlapped
from .rewards.cached import Cached as Cached
from .rewards.catalog import load as load
from .rewards.combine import AffineMap as AffineMap
from .rewards.combine import Calibrated as Calibrated
from .rewards.combine import CDFMap as CDFMap
from .rewards.combine import FidelityFloor as FidelityFloor
from .rewards.combine import LogisticMap as LogisticMap
from .rewards.combine import SoftMin as SoftMin
from .rewards.combine import WeightedSum as WeightedSum
from .rewards.combine import evaluate as evaluate
from .rewards.combine import load_map as load_map
from .rewards.combine import save_map as save_map
from .rewards.core import ImageReward as ImageReward
from .rewards.metric import FullReference as FullReference
from .rewards.metric import NoReference as NoReference
from .rewards.owl2.rewards import DeQAReward as DeQAReward
from .rewards.owl2.rewards import QAlignReward as QAlignReward
from .rewards.perceptual import DISTSReward as DISTSReward
from .rewards.perceptual import LPIPSReward as LPIPSReward
from .rewards.perceptual import PIQReward as PIQReward
from .rewards.pyiqa import PyIQAReward as PyIQAReward
from .rewards.vlm.rewards import LevelReward as LevelReward
from .rewards.vlm.rewards import QInsightReward as QInsightReward
from .rewards.vlm.rewards import QReAlignReward as QReAlignReward
from .rewards.vlm.rewards import RatingReward as RatingReward
from .rewards.vlm.rewards import VisualQualityR1Reward as VisualQualityR1Reward
from .rewards.vlm.rewards import zero_shot_level_reward as zero_shot_level_reward
from .serving.client import RemoteReward as RemoteReward
from .serving.judges import ServedVLMReward as ServedVLMReward
from .testing import check_reward as check_reward
from .types import Reward as Reward
from .weighting import AdaptiveWeighter as AdaptiveWeighter
from .weighting import LossWeights as LossWeights
from .weighting import mixed_loss as mixed_loss

__version__: str
