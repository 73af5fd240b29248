"""Further rewards, and what is needed to write one, imported when they are first used."""

from .catalog import CATALOG as CATALOG
from .clip import CLIPIQAReward as CLIPIQAReward
from .clip import CLIPScoreReward as CLIPScoreReward
from .clip import HPSv2Reward as HPSv2Reward
from .clip import LAIONAestheticReward as LAIONAestheticReward
from .clip import PickScoreReward as PickScoreReward
from .clip import RALIReward as RALIReward
from .core import Combined as Combined
from .core import ImageReward as ImageReward
from .core import UnscoredWarning as UnscoredWarning
from .core import Wrapper as Wrapper
from .core import collect_reasons as collect_reasons
from .cvvdp import CVVDPReward as CVVDPReward
from .loading import LazyModel as LazyModel
from .perceptual import STLPIPSReward as STLPIPSReward
from .rank import PairsInGroup as PairsInGroup
from .rank import RankInGroup as RankInGroup
from .vlm.presets import Q_INSIGHT as Q_INSIGHT
from .vlm.presets import Q_REALIGN as Q_REALIGN
from .vlm.presets import VISUALQUALITY_R1 as VISUALQUALITY_R1
from .vlm.presets import ZERO_SHOT_LEVELS as ZERO_SHOT_LEVELS
from .vlm.presets import LevelPreset as LevelPreset
from .vlm.presets import RatingPreset as RatingPreset
from .vlm.presets import Ratings as Ratings
from .vlm.presets import Sampling as Sampling
from .vlm.rewards import HPSv3Reward as HPSv3Reward
