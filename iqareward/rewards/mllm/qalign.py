"""Q-Align (OneAlign): a 7B multimodal model that rates quality or aesthetics with level words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from iqareward.rewards.mllm.levels import LevelScorer
from iqareward.rewards.mllm.owl2 import Owl2
from iqareward.rewards.mllm.prompts import Task, Variant, prompt_ids
from iqareward.rewards.mllm.readout import SCALES, expected_value
from iqareward.types import Bounds, Images, Scores


@final
class QAlignReward:
    """How good a large multimodal model finds each image: its expected level between "bad" and "excellent".

    Needs neither transformers nor remote code. The weights (16 GB) are loaded at the first call.

    Args:
        model: hub id or folder of a Q-Align checkpoint, or an `Owl2` network, which is frozen.
        task: what is rated. With both, the score is their mean, and the vision tower runs once.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5], as the model cards report.
        device: None = the current CUDA device if there is one, else the CPU.
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

    needs_references = False
    needs_prompts = False

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
        self.scale, self.differentiable = scale, differentiable
        self.name = f"qalign_{'_'.join(self.tasks)}"
        self.bounds: Bounds = (min(SCALES[scale]), max(SCALES[scale]))
        self._video_prompts = tuple(prompt_ids(task, variant=prompt, video=True) for task in self.tasks)
        self._scorer = LevelScorer(
            self.name,
            model,
            tuple(prompt_ids(task, variant=prompt) for task in self.tasks),
            device=device,
            dtype=dtype,
            differentiable=differentiable,
            batch_size=batch_size,
            compile=compile,
            quant=quant,
        )

    @property
    def model(self) -> Owl2:
        """The network; loads it if need be."""
        model: Any = self._scorer.loader.get()
        return model

    def __call__(
        self,
        images: Images,
        references: Images | None = None,
        prompts: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """Score each image; `[B]` float32, higher is better, NaN = not scored. Only `images` is used."""
        with self._scorer.mode():
            scores = self.scores_per_task(images).mean(dim=1)
            self._scorer.watch.look(self.name, scores, images)
            return scores

    def scores_per_task(self, images: Images) -> Tensor:
        """`[B, tasks]` scores in the order of `task`."""
        with self._scorer.mode():
            return expected_value(self._scorer.logits(images), SCALES[self.scale])

    def logits(self, images: Images) -> Tensor:
        """Logits of excellent, good, fair, poor, bad: `[B, 5]` float32; `[B, tasks, 5]` for several tasks."""
        with self._scorer.mode():
            logits = self._scorer.logits(images)
            return logits[:, 0] if len(self.tasks) == 1 else logits

    def video(self, clips: Sequence[Tensor]) -> Scores:
        """Score clips as a whole; a clip's score does not depend on the lengths of the others.

        Args:
            clips: each `[F, 3, H, W]` in [0, 1], about one frame per second; F may differ. The network was trained with
                a context of 2048 positions, that is 31 frames.

        Returns:
            `[clips]` float32, on the scale of the reward; NaN for clips with a frame that cannot be scored.
        """
        with self._scorer.mode():
            logits = self._scorer.clip_logits(clips, self._video_prompts)
            scores = expected_value(logits, SCALES[self.scale]).mean(dim=1)
            self._scorer.watch.look(self.name, scores, [frame for clip in clips for frame in clip])
            return scores

    def to(self, device: torch.device | str) -> "QAlignReward":
        """Move the weights, or choose where they will be loaded; returns the reward itself."""
        self._scorer.loader.to(device)
        return self

    def offload(self) -> None:
        """Give the weights' memory on the device back, such as while the model trains; calls fail until `onload`."""
        self._scorer.loader.offload()

    def onload(self) -> None:
        """Bring the weights back from host memory to where they were before `offload`."""
        self._scorer.loader.onload()
