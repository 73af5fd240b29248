"""From images of any sizes to the logits of level words: what the mPLUG-Owl2 rewards have in common."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor

from iqareward.functional._chunks import rows_at_once
from iqareward.rewards.batches import Buckets, shape_buckets
from iqareward.rewards.loading import LazyModel, any_device_mode
from iqareward.rewards.mllm.loading import load_owl2, quantize_decoder
from iqareward.rewards.mllm.owl2 import Owl2
from iqareward.rewards.mllm.owl2.model import PromptState
from iqareward.rewards.mllm.owl2.static import StaticForward
from iqareward.rewards.mllm.preprocess import preprocess
from iqareward.rewards.mllm.prompts import LEVEL_IDS, Prompt
from iqareward.rewards.scoring import UnscoredWatch, sanitize
from iqareward.types import Images


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


@final
class LevelScorer:
    """Level logits of images under fixed prompts, by a network that is loaded at the first call.

    Args:
        name: The reward's name, for error messages.
        source: hub id or folder of a checkpoint, or a network, which is used as it is and frozen.
        prompts: what to ask about each image.
        device: None = CUDA if there is one, else the CPU (a network given stays where it is).
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
        self.name, self.prompts, self.batch_size, self.compile = name, prompts, batch_size, compile
        default = "stay" if isinstance(source, Owl2) else "cuda"
        self._check_device = partial(_check_device, name, compile)
        load = partial(_load, self._check_device, source, dtype, quant)
        self.loader = LazyModel(load, device, name=name, default=default)
        self.mode = partial(any_device_mode, differentiable=differentiable)
        self.watch = UnscoredWatch()

    def clip_logits(self, clips: Sequence[Tensor], prompts: tuple[Prompt, ...]) -> Tensor:
        """`[clips, prompts, 5]` float32 of clips `[F, 3, H, W]`: all frames of one in place of one image token."""
        counts = [_num_frames(self.name, index, clip) for index, clip in enumerate(clips)]
        if not counts:
            return torch.zeros(0, len(prompts), len(LEVEL_IDS), dtype=torch.float32)
        with self.mode():
            buckets, order = shape_buckets(self.name, [frame for clip in clips for frame in clip], None)
            model = self._ready(buckets)
            states = [self._state(prompt) for prompt in prompts]
            rows, valid = self._map(buckets, order, model, model.encode_images)
            clip_rows = [frames.flatten(0, 1) for frames in rows.split(counts)]
            # Clips of different lengths never share a batch: each is read at its own last position, without padding.
            logits: dict[int, Tensor] = {}
            for members in _same_length(counts, self.batch_size):
                batch = torch.stack([clip_rows[index] for index in members])
                found = torch.stack([model.level_logits(batch, state) for state in states], dim=1)
                logits.update(zip(members, found.unbind(0), strict=True))
            whole = torch.stack([frames.all() for frames in valid.split(counts)])
            return _masked(torch.stack([logits[index] for index in range(len(counts))]), whole, clips[0].device)

    def logits(self, images: Images) -> Tensor:
        """`[B, prompts, 5]` float32 on the images' device; NaN for images that cannot be scored."""
        with self.mode():
            buckets, order = shape_buckets(self.name, images, None)
            if not buckets:
                device = images.device if isinstance(images, Tensor) else None
                return torch.zeros(0, len(self.prompts), len(LEVEL_IDS), dtype=torch.float32, device=device)
            model = self._ready(buckets)
            values, valid = self._map(buckets, order, model, self._network(model))
            return _masked(values, valid, buckets[0][0].device)

    def _ready(self, buckets: Buckets) -> Owl2:
        model: Any = self.loader.ready(buckets[0][0])
        return model

    def _state(self, prompt: Prompt) -> PromptState:
        """The prompt's shared part, computed once."""
        return self.loader.derived(prompt, lambda model: model.prepare_prompt(*prompt, LEVEL_IDS))

    def _network(self, model: Owl2) -> Callable[[Tensor], Tensor]:
        states = tuple(self._state(prompt) for prompt in self.prompts)
        if not self.compile:
            return partial(model, states=states)
        self._check_device(self.loader.device)
        options = {"compile_layers": self.compile is True}
        return self.loader.derived("static", lambda model: StaticForward(model, states, self.batch_size, **options))

    def _map(
        self, buckets: Buckets, order: list[int] | None, model: Owl2, network: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Outputs of the network, and whether each image may be scored, in the order of the images."""
        valid: list[Tensor] = []
        pixels = _pixels(buckets, model, self.batch_size, valid)
        outputs = torch.cat([network(batch) for batch in _regroup(pixels, self.batch_size)])
        intact = torch.cat(valid)
        if order is None:
            return outputs, intact
        rows, flags = outputs.unbind(0), intact.unbind(0)  # views: restoring the order copies no index to the device
        return torch.stack([rows[i] for i in order]), torch.stack([flags[i] for i in order])


def _pixels(buckets: Buckets, model: Owl2, batch_size: int, valid: list[Tensor]) -> Iterator[Tensor]:
    """Preprocessed pixels in the network's dtype, one piece of a bucket at a time; appends to `valid` on the way."""
    weight = model.model.norm.weight
    for (bucket,) in buckets:
        side = max(bucket.shape[2:])  # images are padded to squares
        for piece in bucket.split(min(batch_size, rows_at_once((side, side), weight.device))):
            clean, intact = sanitize(piece.to(weight.device))
            valid.append(intact)
            yield preprocess(clean, model.config.image_size).to(weight.dtype)


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


def _masked(logits: Tensor, valid: Tensor, device: torch.device) -> Tensor:
    """NaN where an image could not be scored or the network overflowed, on the caller's device."""
    intact = valid & logits.isfinite().flatten(1).all(1)
    return torch.where(intact[:, None, None], logits.float(), torch.nan).to(device)


def _num_frames(name: str, index: int, clip: Tensor) -> int:
    if not isinstance(clip, Tensor) or clip.ndim != 4 or clip.shape[1] != 3 or clip.shape[0] < 1:
        found = list(clip.shape) if isinstance(clip, Tensor) else type(clip).__name__
        raise ValueError(f"{name} expected clips[{index}] as a tensor [F, 3, H, W] with F >= 1, got {found}.")
    return clip.shape[0]
