"""Q-Align and DeQA-Score: the expected quality level of an image under mPLUG-Owl2."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from iqareward.functional._chunks import rows_at_once
from iqareward.rewards.calls import Bucket
from iqareward.rewards.core import ImageReward, masked, reward_mode, sanitize
from iqareward.rewards.loading import LazyModel
from iqareward.rewards.options import name_with
from iqareward.rewards.owl2.network import Owl2, PromptState, StaticForward
from iqareward.rewards.owl2.preprocess import LEVEL_IDS, PROMPTS, Prompt, Task, preprocess
from iqareward.rewards.readout import SCALES, LevelDistribution, expected_value, level_distribution
from iqareward.types import Images

_DEFAULT_BATCH = 32

Compiled = bool | Literal["graph"]


class _Owl2Reward(ImageReward):
    """A reward by the logits of level words under fixed prompts; the score is the mean over the prompts."""

    _published: str  # hub id

    def __init__(
        self,
        name: str,
        source: str | Path | Owl2 | None,
        tasks: tuple[Task, ...],
        scale: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        differentiable: bool,
        batch_size: int,
        compiled: Compiled,
        quant: Literal["int8"] | None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"{name} expected `batch_size` >= 1, got {batch_size}.")
        if compiled not in (False, True, "graph"):
            raise ValueError(f'{name} expected `compiled` False, True or "graph", got {compiled!r}.')
        if differentiable and compiled:
            raise ValueError(
                f"{name} expected at most one of `differentiable` and `compiled`: graphs have no gradient."
            )
        if quant not in (None, "int8"):
            raise ValueError(f'{name} expected `quant` None or "int8", got {quant!r}.')
        self.name = name_with(self, name, weights=source, scale=scale, dtype=dtype, quant=quant)
        self.differentiable, self.batch_size, self.scale = differentiable, batch_size, scale
        self.bounds = min(SCALES[scale]), max(SCALES[scale])
        self._prompts = tuple(PROMPTS[task] for task in tasks)
        self._compiled: Compiled = compiled
        load = partial(_load, name, self._published if source is None else source, dtype, quant, compiled)
        self.model_loader = LazyModel(load, device, name=name, is_built=isinstance(source, Owl2))

    @property
    def model(self) -> Owl2:
        """The network; loads it if need be."""
        model: Any = self._loader.get()
        return model

    def score_batch(self, images: Tensor) -> Tensor:
        """Expected levels of images that are preprocessed already."""
        return expected_value(masked(self._network_logits(images)), SCALES[self.scale]).mean(dim=1)

    def _level_logits(self, images: Images) -> Tensor:
        """`[B, prompts, 5]` float32 on the images' device; NaN for images that cannot be scored."""
        return self._rows(self._network_logits, self._call(images), len(self._prompts), len(LEVEL_IDS))

    @property
    def _run_size(self) -> int:
        """Images per run of the network, also if `batch_size` was changed since."""
        return self.batch_size or _DEFAULT_BATCH

    def _of_buckets(
        self, measure: Callable[..., Tensor], buckets: list[Bucket], device: torch.device, width: tuple[int, ...]
    ) -> Tensor:
        """The network takes one size, so images of all sizes share its batches."""
        valid: list[Tensor] = []
        batches = _regroup(self._pixels(buckets, valid), self._run_size)
        outputs = torch.cat([measure(batch) for batch in batches])
        return masked(outputs, torch.cat(valid))

    def _pixels(self, buckets: list[Bucket], valid: list[Tensor]) -> Iterator[Tensor]:
        """Preprocessed pixels in the network's dtype, one piece of a bucket at a time; appends to `valid`."""
        model = self.model
        weight = model.model.norm.weight
        for bucket in buckets:
            side = max(bucket.images.shape[2:])  # images are padded to squares
            for piece in bucket.split(min(self._run_size, rows_at_once((side, side), weight.device))):
                clean, intact = sanitize(piece.images.to(weight.device))
                valid.append(intact)
                yield preprocess(clean, model.config.image_size).to(weight.dtype)

    def _network_logits(self, pixels: Tensor) -> Tensor:
        """`[b, prompts, 5]` of preprocessed pixels."""
        states = tuple(self._state(prompt) for prompt in self._prompts)
        if not self._compiled:
            return self.model(pixels, states=states)
        _check_device(self.name, self._compiled, self._loader.device)
        layers, size = self._compiled != "graph", self._run_size
        return self._loader.derived(
            ("static", size), lambda model: StaticForward(model, states, size, compile_layers=layers)
        )(pixels)

    def _state(self, prompt: Prompt) -> PromptState:
        """The prompt's shared part, computed once."""
        return self._loader.derived(prompt, lambda model: model.prepare_prompt(*prompt, LEVEL_IDS))


@final
class QAlignReward(_Owl2Reward):
    """Q-Align: the expected quality level of each image, from "bad" to "excellent", by a large multimodal model.

    Needs neither transformers nor remote code. The weights (16 GB) are loaded at the first call.

    Args:
        weights: Hub id (`owner/name`, or `owner/name@revision`) or folder of a Q-Align checkpoint, or an `Owl2`
            network, which is frozen; None = q-future/one-align. One file is not enough, because it does not say how
            the network is built.
        task: What is rated; "aesthetic" is "aesthetics". With both tasks, the score is their mean, and the vision tower
            runs once.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5], as the model cards report.
        device: None = the GPU of the first images, else the current CUDA device if there is one, else the CPU.
        dtype: None = bfloat16 on CUDA, float32 on the CPU; a network given keeps its own.
        differentiable: Keep the graph to the pixels at their original size; layers are recomputed in the backward pass.
        batch_size: Images per run of the network.
        compiled: `"graph"` replays CUDA graphs of the network: a single image takes less than half the time. True also
            compiles its layers, which pays at every batch size; without CUDA it only does that. There is one graph for
            each of 1, 2, 4, ... and `batch_size` images, to which other batches are padded. The first call of a size
            takes a second longer, or some 10 s with compilation. The graphs share about 1 GiB for 32 images, which
            `offload` and `to` give back.
        quant: `"int8"` holds the decoder's weights in int8 (extra `quant`): less memory (8.7 instead of 15.7 GiB), but
            slower on an H100.

    Example:
        >>> reward = QAlignReward(scale="mos")  # nothing is loaded yet
        >>> reward.name, reward.bounds
        ('qalign(scale=mos)', (1.0, 5.0))

    References:
        Wu et al., "Q-Align: Teaching LMMs for Visual Scoring via Discrete Text-Defined Levels", 2024,
        https://arxiv.org/abs/2312.17090
    """

    _published = "q-future/one-align"

    def __init__(
        self,
        weights: str | Path | Owl2 | None = None,
        task: Task | Literal["aesthetic"] | tuple[Task | Literal["aesthetic"], ...] = "quality",
        scale: Literal["unit", "mos"] = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 32,
        compiled: Compiled = False,
        *,
        quant: Literal["int8"] | None = None,
    ) -> None:
        if scale not in ("unit", "mos"):
            raise ValueError(f'QAlignReward expected `scale` "unit" or "mos", got {scale!r}.')
        tasks = (task,) if isinstance(task, str) else tuple(task)
        self.tasks: tuple[Task, ...] = tuple("aesthetics" if each == "aesthetic" else each for each in tasks)
        if not self.tasks or len(set(self.tasks)) != len(self.tasks) or not set(self.tasks) <= set(PROMPTS):
            raise ValueError(f"QAlignReward expected one or two different tasks of {list(PROMPTS)}, got {task!r}.")
        name = "qalign" if self.tasks == ("quality",) else f"qalign_{'_'.join(self.tasks)}"
        super().__init__(name, weights, self.tasks, scale, device, dtype, differentiable, batch_size, compiled, quant)

    def scores_per_task(self, images: Images) -> Tensor:
        """`[B, tasks]` scores in the order of `task`."""
        with reward_mode(differentiable=self.differentiable):
            return expected_value(self._level_logits(images), SCALES[self.scale])

    def logits(self, images: Images) -> Tensor:
        """Logits of excellent, good, fair, poor, bad: `[B, 5]` float32; `[B, tasks, 5]` for several tasks."""
        with reward_mode(differentiable=self.differentiable):
            logits = self._level_logits(images)
            return logits[:, 0] if len(self.tasks) == 1 else logits


@final
class DeQAReward(_Owl2Reward):
    """DeQA-Score: the expected quality level of each image, in this process instead of behind an HTTP server.

    Needs neither transformers nor remote code. The weights (16 GB) are loaded at the first call. `device`, `dtype`,
    `differentiable`, `batch_size`, `compiled` and `quant` are those of `QAlignReward`.

    Args:
        weights: Hub id or folder of full weights or of a LoRA adapter (`zhiyuanyou/DeQA-Score-LoRA-Mix3`, merged while
            loading), or an `Owl2` network, which is frozen; None = zhiyuanyou/DeQA-Score-Mix3.
        scale: `"unit"` is [0, 1]; `"mos"` is [1, 5]; `"flow_grpo"` is [0.2, 1], as Flow-GRPO's reward server answers
            (without its JPEG compression of the images).

    Example:
        >>> reward = DeQAReward(scale="flow_grpo")  # nothing is loaded yet
        >>> reward.bounds
        (0.2, 1.0)

    References:
        You et al., "Teaching Large Language Models to Regress Accurate Image Quality Scores using Score Distribution",
        2025, https://arxiv.org/abs/2501.11561
    """

    _published = "zhiyuanyou/DeQA-Score-Mix3"

    def __init__(
        self,
        weights: str | Path | Owl2 | None = None,
        scale: Literal["unit", "mos", "flow_grpo"] = "unit",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        differentiable: bool = False,
        batch_size: int = 32,
        compiled: Compiled = False,
        *,
        quant: Literal["int8"] | None = None,
    ) -> None:
        if scale not in SCALES:
            raise ValueError(f"DeQAReward expected `scale` one of {sorted(SCALES)}, got {scale!r}.")
        super().__init__(
            "deqa", weights, ("quality",), scale, device, dtype, differentiable, batch_size, compiled, quant
        )

    def logits(self, images: Images) -> Tensor:
        """Logits of excellent, good, fair, poor, bad: `[B, 5]` float32."""
        with reward_mode(differentiable=self.differentiable):
            return self._level_logits(images)[:, 0]

    def distribution(self, images: Images) -> LevelDistribution:
        """Level probabilities of each image, and the mean and standard deviation in levels of [1, 5]."""
        with reward_mode(differentiable=self.differentiable):
            return level_distribution(self.logits(images))


def _load(
    name: str,
    source: str | Path | Owl2,
    dtype: torch.dtype | None,
    quant: Literal["int8"] | None,
    compiled: Compiled,
    device: Any,
) -> Owl2:
    if isinstance(source, Owl2):
        model = source.to(device=device, dtype=dtype)
    else:
        from iqareward.rewards.owl2.checkpoints import load_owl2

        _check_device(name, compiled, device)  # before 16 GB are read
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        model = load_owl2(source, device=device, dtype=dtype)
    if quant is not None:
        from iqareward.rewards.owl2.checkpoints import quantize_decoder

        quantize_decoder(model)
    return model


def _check_device(name: str, compiled: Compiled, device: torch.device) -> None:
    if compiled == "graph" and device.type != "cuda":
        raise ValueError(
            f'{name} expected a CUDA device for `compiled="graph"`, got {device.type!r}, which has no CUDA graphs. Use '
            "compiled=False, or compiled=True, which compiles the layers on any device."
        )


def _regroup(pieces: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """The same rows in batches of `size`, the last one shorter, so that images of different sizes share a batch."""
    held: list[Tensor] = []
    for piece in pieces:
        held.append(piece)
        while sum(rows.shape[0] for rows in held) >= size:
            rows = torch.cat(held)
            yield rows[:size]
            held = [rows[size:]]
    rows = torch.cat(held)
    if rows.shape[0]:
        yield rows
