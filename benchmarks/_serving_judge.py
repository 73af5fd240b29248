"""The reward that bench_serving serves: Q-Align on a small mPLUG-Owl2 with seeded weights, built where it is used."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.bench_qalign import MEDIUM, TINY, random_model
from iqareward.rewards.mllm.qalign import QAlignReward
from iqareward.types import Images, Scores

# `wide` has few tokens and large matrices: an image alone waits for the weights to be read; a batch reads them once.
# So does a 7B on a GPU. `medium` has the tokens of the real network; one image is enough work for a CPU.
CONFIGS = {
    "wide": dataclasses.replace(
        MEDIUM, hidden=2048, ffn=5504, heads=16, kv_heads=16, layers=4, num_queries=1, image_size=56, vision_layers=2
    ),
    "medium": MEDIUM,
    "tiny": dataclasses.replace(TINY, image_size=56, num_queries=4),
}


class Judge:
    """Scores with a network of one of `CONFIGS`, on so many threads, in whichever process it is called."""

    name, bounds = "judge", (0.0, 1.0)
    needs_references = needs_prompts = differentiable = False

    def __init__(self, config: str, threads: int, batch_size: int) -> None:
        self.config, self.threads, self.batch_size = config, threads, batch_size
        self._reward: QAlignReward | None = None

    def __call__(
        self, images: Images, references: Any = None, prompts: Sequence[str] | None = None, **ignored: Any
    ) -> Scores:
        """Build at the first call, then score."""
        if self._reward is None:
            torch.set_num_threads(self.threads)
            model = random_model(CONFIGS[self.config], torch.device("cpu"), torch.float32)
            self._reward = QAlignReward(model, batch_size=self.batch_size)
        return self._reward(images)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_reward": None}
