"""Q-Align (OneAlign): a 7B multimodal model that rates quality or aesthetics with level words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from iqareward.rewards.owl2 import Owl2
from iqareward.rewards.owl2.levels import Owl2Reward
from iqareward.rewards.owl2.prompts import Task, Variant, prompt_ids
from iqareward.rewards.readout import SCALES, expected_value
from iqareward.rewards.scoring import reward_mode
from iqareward.types import Images, Scores


@final
class QAlignReward(Owl2Reward):
    """How good a large multimodal model finds each image: its expected level between "bad" and "excellent".

    Needs neither transformers nor remote code. The weights (16 GB) are loaded at the first call.

    Args:
        model: hub id or folder of a Q-Align checkpoint, or an `Owl2` network, which is frozen.
        task: what is rated. With both, the score is their mean, and the vision tower runs once.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5], as the model cards report.
        device: None = the GPU of the first images, else the current CUDA device if there is one, else the CPU.
        dtype: None = bfloat16 on CUDA, float32 on the CPU.
        differentiable: keep the graph to the pixels at their original size.
        batch_size: images per run of the network.
        compile: `"graph"` replays CUDA graphs of the network: a single image takes less than half the time. True also
            compiles its layers, which pays at every batch size; without CUDA it only does that. A graph exists for 1,
            2, 4, ... and `batch_size` images, to which other batches are padded, from the first call that needs it:
            that call takes a second longer, or some 10 s with compilation. The graphs share about 1 GiB for 32 images,
            given back by `offload` and `to`.
        prompt: `"hub"` = as published scores; `"paper"` = the evaluation script's wording.
        quant: `"int8"` = decoder weights in int8, through the extra `quant`: less memory (8.7 instead of 15.7 GiB), but
            slower on an H100.

    Example:
        >>> reward = QAlignReward(scale="mos")  # nothing is loaded yet
        >>> reward.bounds
        (1.0, 5.0)

    References:
        Wu et al., "Q-Align: Teaching LMMs for Visual Scoring via Discrete Text-Defined Levels", 2024,
        https://arxiv.org/abs/2312.17090
    """

    def __init__(
        self,
        model: str | Path | Owl2 = "q-future/one-align",
        task: Task | tuple[Task, ...] = "quality",
        scale: Literal["unit", "mos"] = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 32,
        compile: bool | Literal["graph"] = False,
        *,
        prompt: Variant = "hub",
        quant: Literal["int8"] | None = None,
    ) -> None:
        if scale not in ("unit", "mos"):
            raise ValueError(f'QAlignReward expected `scale` "unit" or "mos", got {scale!r}.')
        self.tasks: tuple[Task, ...] = (task,) if isinstance(task, str) else tuple(task)
        if not self.tasks or len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"QAlignReward expected one or two different tasks, got {task!r}.")
        self._video_prompts = tuple(prompt_ids(task, variant=prompt, video=True) for task in self.tasks)
        super().__init__(
            f"qalign_{'_'.join(self.tasks)}",
            model,
            tuple(prompt_ids(task, variant=prompt) for task in self.tasks),
            scale,
            device=device,
            dtype=dtype,
            differentiable=differentiable,
            batch_size=batch_size,
            compile=compile,
            quant=quant,
        )

    def scores_per_task(self, images: Images) -> Tensor:
        """`[B, tasks]` scores in the order of `task`."""
        with reward_mode(differentiable=self.differentiable):
            return expected_value(self._level_logits(images), SCALES[self.scale])

    def logits(self, images: Images) -> Tensor:
        """Logits of excellent, good, fair, poor, bad: `[B, 5]` float32; `[B, tasks, 5]` for several tasks."""
        with reward_mode(differentiable=self.differentiable):
            logits = self._level_logits(images)
            return logits[:, 0] if len(self.tasks) == 1 else logits

    def video(self, clips: Sequence[Tensor]) -> Scores:
        """Score clips as a whole; a clip's score does not depend on the lengths of the others.

        Args:
            clips: each `[F, 3, H, W]` in [0, 1], about one frame per second; F may differ. The network was trained with
                a context of 2048 positions, that is 31 frames.

        Returns:
            `[clips]` float32, on the scale of the reward; NaN for clips with a frame that cannot be scored.
        """
        with reward_mode(differentiable=self.differentiable):
            logits = self._clip_logits(clips, self._video_prompts)
            scores = expected_value(logits, SCALES[self.scale]).mean(dim=1)
            self._watch.look(self.name, scores, [frame for clip in clips for frame in clip])
            return scores
