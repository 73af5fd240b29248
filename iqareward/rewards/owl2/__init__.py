"""mPLUG-Owl2 in plain torch: vision tower, abstractor and the modality-adaptive LLaMA-2 decoder."""

from iqareward.rewards.owl2.config import Owl2Config
from iqareward.rewards.owl2.model import Owl2

__all__ = ["Owl2", "Owl2Config"]
