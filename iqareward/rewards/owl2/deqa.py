"""DeQA-Score: mPLUG-Owl2 trained to predict the distribution of human scores."""

from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from iqareward.rewards.owl2 import Owl2
from iqareward.rewards.owl2.levels import Owl2Reward
from iqareward.rewards.owl2.prompts import prompt_ids
from iqareward.rewards.readout import SCALES, LevelDistribution, level_distribution
from iqareward.rewards.scoring import reward_mode
from iqareward.types import Images


@final
class DeQAReward(Owl2Reward):
    """How good DeQA-Score finds each image, in process: no second environment and no HTTP server.

    Needs neither transformers nor remote code. The weights (16 GB) are loaded at the first call.

    Args:
        model: hub id or folder of full weights or of a LoRA adapter (`zhiyuanyou/DeQA-Score-LoRA-Mix3`, merged while
            loading), or an `Owl2` network, which is frozen.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5]; `"flow_grpo"` is [0.2, 1], as Flow-GRPO's reward server answers
            (without its JPEG compression of the images).
        device: None = the GPU of the first images, else the current CUDA device if there is one, else the CPU.
        dtype: None = bfloat16 on CUDA, float32 on the CPU.
        differentiable: keep the graph to the pixels at their original size.
        batch_size: images per run of the network.
        compile: `"graph"` replays CUDA graphs of the network: a single image takes less than half the time. True also
            compiles its layers, which pays at every batch size; without CUDA it only does that. A graph exists for 1,
            2, 4, ... and `batch_size` images, to which other batches are padded, from the first call that needs it:
            that call takes a second longer, or some 10 s with compilation. The graphs share about 1 GiB for 32 images,
            given back by `offload` and `to`.
        quant: `"int8"` = decoder weights in int8, through the extra `quant`: less memory (8.7 instead of 15.7 GiB), but
            slower on an H100.

    Example:
        >>> reward = DeQAReward(scale="flow_grpo")  # nothing is loaded yet
        >>> reward.bounds
        (0.2, 1.0)

    References:
        You et al., "Teaching Large Language Models to Regress Accurate Image Quality Scores using Score Distribution",
        2025, https://arxiv.org/abs/2501.11561
    """

    def __init__(
        self,
        model: str | Path | Owl2 = "zhiyuanyou/DeQA-Score-Mix3",
        scale: Literal["unit", "mos", "flow_grpo"] = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 32,
        compile: bool | Literal["graph"] = False,
        *,
        quant: Literal["int8"] | None = None,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"DeQAReward expected `scale` one of {sorted(SCALES)}, got {scale!r}.")
        super().__init__(
            "deqa",
            model,
            (prompt_ids("quality"),),
            scale,
            device=device,
            dtype=dtype,
            differentiable=differentiable,
            batch_size=batch_size,
            compile=compile,
            quant=quant,
        )

    def logits(self, images: Images) -> Tensor:
        """Logits of excellent, good, fair, poor, bad: `[B, 5]` float32."""
        with reward_mode(differentiable=self.differentiable):
            return self._level_logits(images)[:, 0]

    def distribution(self, images: Images) -> LevelDistribution:
        """Level probabilities of each image, and the mean and standard deviation in levels of [1, 5]."""
        with reward_mode(differentiable=self.differentiable):
            return level_distribution(self.logits(images))
