"""Best-of-N with any image-to-image pipeline: generate candidates for each input and keep the one a reward prefers."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from iqareward.adapters._values import find_reward, score
from iqareward.images import ImageLike, to_images
from iqareward.types import Reward, Scores


class Best(NamedTuple):
    """What `generate_best` found for B inputs and N candidates.

    Attributes:
        images: B tensors `[3, H, W]` float32 in [0, 1] on the CPU, the best candidate of each input.
        scores: `[B, N]` float32 on the CPU; NaN = not scored.
        chosen: `[B]` the number of the best candidate; -1 where none was scored, and the image is candidate 0.
    """

    images: list[Tensor]
    scores: Scores
    chosen: Tensor


def generate_best(
    pipeline: Any,
    reward: str | Reward,
    inputs: Mapping[str, Any],
    *,
    num_candidates: int,
    batch_size: int = 1,
    seed: int = 0,
    references: Sequence[ImageLike] | Tensor | None = None,
    show_progress: bool = True,
    **arguments: Any,
) -> Best:
    """Generate `num_candidates` images per input and keep the best of each by the reward.

    A candidate is drawn from a seed of its own, made of `seed`, its input's place and its number: it does not depend on
    the batch size or on how many candidates there are. Choosing by a judge favours what the judge likes: look at the
    images, or guard the judge with `FidelityFloor`.

    Args:
        pipeline: called as `pipeline(generator=[...], output_type="pt", **batch_of_inputs, **arguments)`; answers with
            `.images`, one image in [0, 1] per row.
        reward: a name or sum of the catalogue, or any reward; `inputs["prompt"]` are its prompts.
        inputs: argument name -> B values, one per input, e.g. `{"image": degraded, "prompt": ["..."] * 8}`; lists,
            tensors or arrays. Inputs of different sizes never share a batch.
        num_candidates: N >= 1.
        batch_size: rows per call of the pipeline, >= 1.
        seed: >= 0.
        references: ground truth, one per input, for rewards that need it.
        show_progress: a bar on the error stream; `pipeline.set_progress_bar_config(disable=True)` silences its own.
        arguments: passed on unchanged, e.g. `num_inference_steps=20`.

    Returns:
        The best images with the scores of all candidates.

    Raises:
        ValueError: the inputs differ in number, the pipeline answers with another number of images than rows, or the
            reward needs references and there are none.

    Example:
        >>> from types import SimpleNamespace
        >>> def restore(image, generator, output_type):  # stands for a diffusers pipeline
        ...     noise = torch.stack([torch.rand(3, 32, 32, generator=g) for g in generator])
        ...     return SimpleNamespace(images=0.9 * image + 0.1 * noise)
        >>> clean = torch.full((2, 3, 32, 32), 0.5)
        >>> best = generate_best(
        ...     restore, "ssim", {"image": clean}, references=clean, num_candidates=4, show_progress=False
        ... )
        >>> best.scores.shape, bool((best.scores.argmax(1) == best.chosen).all())
        (torch.Size([2, 4]), True)
    """
    judge = find_reward(reward, references=references, who="generate_best")
    count = _count(inputs, references, num_candidates, batch_size)
    scores = torch.full((count, num_candidates), torch.nan)
    chosen = torch.full((count,), -1)
    best, kept = [-math.inf] * count, {}
    batches = list(_batches(inputs, count, num_candidates, batch_size))
    for batch in _progress(batches, show_progress):
        images, found = _run(pipeline, judge, batch, inputs, references, seed, arguments)
        for (row, candidate), image, value in zip(batch, images, found.tolist(), strict=True):
            scores[row, candidate] = value
            if value > best[row]:  # never true for NaN
                best[row], chosen[row], kept[row] = value, candidate, image
            kept.setdefault(row, image)  # the first, until one is scored
    return Best([kept[row] for row in range(count)], scores, chosen)


def _run(
    pipeline: Any,
    judge: Reward,
    batch: Sequence[tuple[int, int]],
    inputs: Mapping[str, Any],
    references: Any,
    seed: int,
    arguments: Mapping[str, Any],
) -> tuple[Sequence[Tensor], Scores]:
    """Images of a batch of (input, candidate) pairs, and their scores, on the CPU."""
    rows = [row for row, _ in batch]
    generators = [torch.Generator().manual_seed(_seed(seed, row, candidate)) for row, candidate in batch]
    chosen = {name: _take(values, rows) for name, values in inputs.items()}
    output = pipeline(generator=generators, output_type="pt", **chosen, **arguments)
    images = to_images(output, value_range=(0, 1))
    if len(images) != len(rows):
        raise ValueError(
            f"generate_best expected one image per row ({len(rows)}), got {len(images)}. "
            "Ask for more candidates with num_candidates, not with the pipeline's own argument."
        )
    truths = _take(references, rows) if judge.needs_references else None
    texts = chosen.get("prompt")
    scores = score(judge, images, value_range=(0, 1), references=truths, prompts=texts, on_nan="nan")
    return [image.cpu() for image in images], scores.detach().cpu()


def _count(inputs: Mapping[str, Any], references: Any, num_candidates: int, batch_size: int) -> int:
    counts = {name: len(values) for name, values in inputs.items() if not isinstance(values, str)}
    counts |= {} if references is None else {"references": len(references)}
    if len(set(counts.values())) != 1 or len(counts) < len(inputs) or 0 in counts.values():
        raise ValueError(
            f"generate_best expected as many values for every input, got {counts or sorted(inputs)}. "
            'Give one per image, e.g. {"image": images, "prompt": ["..."] * len(images)}.'
        )
    if num_candidates < 1 or batch_size < 1:
        raise ValueError(
            f"generate_best expected num_candidates and batch_size >= 1, got {num_candidates} and {batch_size}."
        )
    return next(iter(counts.values()))


def _batches(
    inputs: Mapping[str, Any], count: int, num_candidates: int, batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """(input, candidate) pairs in batches of inputs of one size."""
    rows = ((row, candidate) for row in range(count) for candidate in range(num_candidates))
    sizes = [[_size(values[row]) for values in inputs.values()] for row in range(count)]
    for _, same in itertools.groupby(rows, key=lambda pair: sizes[pair[0]]):
        pairs = list(same)
        yield from (pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size))


def _size(value: Any) -> Any:
    """What two values must share to be stacked: shape of a tensor or array, size of a PIL image."""
    return tuple(getattr(value, "shape", ())) or getattr(value, "size", None)


def _take(values: Any, rows: Sequence[int]) -> Any:
    return values[list(rows)] if isinstance(values, Tensor | np.ndarray) else [values[row] for row in rows]


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def _progress(batches: Sequence[Any], shown: bool) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import track

    yield from track(batches, "candidates", console=Console(stderr=True), disable=not shown)
