"""From images of any sizes to the logits of level words: what the mPLUG-Owl2 rewards have in common."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from iqareward.functional._chunks import rows_at_once
from iqareward.rewards.calls import Bucket, shape_buckets
from iqareward.rewards.core import ImageReward, in_order, masked
from iqareward.rewards.loading import LazyModel, as_current
from iqareward.rewards.owl2 import Owl2
from iqareward.rewards.owl2.loading import load_owl2, quantize_decoder
from iqareward.rewards.owl2.model import PromptState
from iqareward.rewards.owl2.preprocess import preprocess
from iqareward.rewards.owl2.prompts import LEVEL_IDS, Prompt
from iqareward.rewards.owl2.static import StaticForward
from iqareward.rewards.readout import SCALES, expected_value
from iqareward.rewards.scoring import reward_mode, sanitize
from iqareward.types import Images

DEFAULT_BATCH = 32


def _load(
    check: Callable[[torch.device], None],
    source: str | Path | Owl2,
    dtype: torch.dtype | None,
    quant: Literal["int8"] | None,
    device: Any,
) -> Owl2:
    if isinstance(source, Owl2):
        model = source.to(device=device, dtype=dtype)
    else:
        check(device)  # before 16 GB are read
        dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
        model = load_owl2(source, device=device, dtype=dtype)
    if quant is not None:
        quantize_decoder(model)
    return model


def _check_device(name: str, compile: bool | str, device: torch.device) -> None:
    if compile == "graph" and device.type != "cuda":
        raise ValueError(
            f'{name} expected a CUDA device for `compile="graph"`, got {device.type!r}, which has no CUDA graphs. Use '
            "compile=False, or compile=True, which compiles the layers on any device."
        )


class Owl2Reward(ImageReward):
    """A reward by level logits of images under fixed prompts.

    Args:
        name: The reward's name.
        source: hub id or folder of a checkpoint, or a network, which is used as it is and frozen.
        prompts: what to ask about each image; the score is the mean of the answers.
        scale: a key of `SCALES`.
        device: None = the GPU of the first images, else the current CUDA device if there is one, else the CPU (a
            network given stays where it is).
        dtype: None = bfloat16 on CUDA, float32 elsewhere (a network given keeps its own).
        differentiable: keep the graph to the pixels; layers are recomputed in the backward pass.
        batch_size: images per run of the network.
        compile: "graph" = replay CUDA graphs of the network; True = of its compiled layers, which run without graphs
            elsewhere.
        quant: "int8" = hold the decoder's weights in int8.
    """

    def __init__(
        self,
        name: str,
        source: str | Path | Owl2,
        prompts: tuple[Prompt, ...],
        scale: str,
        *,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        differentiable: bool,
        batch_size: int,
        compile: bool | Literal["graph"],
        quant: Literal["int8"] | None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"{name} expected `batch_size` >= 1, got {batch_size}.")
        if compile not in (False, True, "graph"):
            raise ValueError(f'{name} expected `compile` False, True or "graph", got {compile!r}.')
        if differentiable and compile:
            raise ValueError(
                f"{name} expected at most one of `differentiable` and `compile`: the graph is for scoring."
            )
        if quant not in (None, "int8"):
            raise ValueError(f'{name} expected `quant` None or "int8", got {quant!r}.')
        self.name, self.differentiable, self._compile = name, differentiable, compile
        self.batch_size = batch_size
        self._prompts, self.scale = prompts, scale
        self.bounds = min(SCALES[scale]), max(SCALES[scale])
        self._check_device = partial(_check_device, name, compile)
        load = partial(_load, self._check_device, source, dtype, quant)
        self.model_loader = LazyModel(load, device, name=name, is_built=isinstance(source, Owl2))

    @property
    def _run_size(self) -> int:
        """Images per run of the network, also if `batch_size` was changed since."""
        return self.batch_size or DEFAULT_BATCH

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

    def _clip_logits(self, clips: Sequence[Tensor], prompts: tuple[Prompt, ...]) -> Tensor:
        """`[clips, prompts, 5]` float32 of clips `[F, 3, H, W]`: all frames of one in place of one image token."""
        counts = [_num_frames(self.name, index, clip) for index, clip in enumerate(clips)]
        if not counts:
            return torch.zeros(0, len(prompts), len(LEVEL_IDS), dtype=torch.float32)
        call = self._call([frame for clip in clips for frame in clip])
        with reward_mode(differentiable=self.differentiable, device_type=clips[0].device.type):
            buckets, order = shape_buckets(self.name, call.images)
            with as_current(self._device(buckets[0].images)):
                model = self.model
                states = [self._state(prompt) for prompt in prompts]
                rows, valid = (in_order(found, order) for found in self._encoded(model.encode_images, buckets))
                clip_rows = [frames.flatten(0, 1) for frames in rows.split(counts)]
                # Clips of different lengths never share a batch: each is read at its own last position, unpadded.
                logits: dict[int, Tensor] = {}
                for members in _same_length(counts, self._run_size):
                    batch = torch.stack([clip_rows[index] for index in members])
                    found = torch.stack([model.level_logits(batch, state) for state in states], dim=1)
                    logits.update(zip(members, found.unbind(0), strict=True))
                whole = torch.stack([frames.all() for frames in valid.split(counts)])
                found = torch.stack([logits[index] for index in range(len(counts))])
                return masked(found, whole).to(clips[0].device)

    def _of_buckets(
        self, measure: Callable[..., Tensor], buckets: list[Bucket], device: torch.device, width: tuple[int, ...]
    ) -> Tensor:
        """The network takes one size, so images of all sizes share its batches."""
        return masked(*self._encoded(measure, buckets))

    def _encoded(self, measure: Callable[[Tensor], Tensor], buckets: list[Bucket]) -> tuple[Tensor, Tensor]:
        """What `measure` gives for preprocessed batches, and whether each image may be scored."""
        valid: list[Tensor] = []
        pixels = self._pixels(buckets, valid)
        outputs = torch.cat([measure(batch) for batch in _regroup(pixels, self._run_size)])
        return outputs, torch.cat(valid)

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
        if not self._compile:
            return self.model(pixels, states=states)
        self._check_device(self._loader.device)
        layers, size = self._compile != "graph", self._run_size
        return self._loader.derived(
            ("static", size), lambda model: StaticForward(model, states, size, compile_layers=layers)
        )(pixels)

    def _state(self, prompt: Prompt) -> PromptState:
        """The prompt's shared part, computed once."""
        return self._loader.derived(prompt, lambda model: model.prepare_prompt(*prompt, LEVEL_IDS))


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


def _same_length(counts: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices of clips with equally many frames, at most `size` at a time."""
    members: dict[int, list[int]] = {}
    for index, count in enumerate(counts):
        members.setdefault(count, []).append(index)
    for indices in members.values():
        yield from (indices[start : start + size] for start in range(0, len(indices), size))


def _num_frames(name: str, index: int, clip: Tensor) -> int:
    if not isinstance(clip, Tensor) or clip.ndim != 4 or clip.shape[1] != 3 or clip.shape[0] < 1:
        found = list(clip.shape) if isinstance(clip, Tensor) else type(clip).__name__
        raise ValueError(f"{name} expected clips[{index}] as a tensor [F, 3, H, W] with F >= 1, got {found}.")
    return clip.shape[0]
