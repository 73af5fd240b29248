"""Rewards with diffusers pipelines: scores of every sampling step, and the best of several candidates.

Images without a score are NaN in the results; sampling is never disturbed.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NamedTuple, Self, final

import numpy as np
import torch
from torch import Tensor, nn

from iqareward._gradients import clamp
from iqareward.adapters._core import Scorer
from iqareward.images import ImageLike, to_images
from iqareward.optional import require
from iqareward.rewards.specs import Spec
from iqareward.seeds import generator
from iqareward.types import Reward, Scores

__all__ = ["Best", "StepwiseRewards", "decode_latents", "generate_best"]


def decode_latents(pipeline: Any, latents: Tensor, *, height: int | None = None) -> Tensor:
    """Decode latents to images that are clamped to [0, 1], as pipelines return them.

    Args:
        pipeline: A pipeline with an autoencoder that `iqareward.diffusion.Autoencoder` takes.
        latents: `[B, C, h, w]`, scaled as in the pipeline, or packed `[B, T, C]` as in those of Flux and Qwen-Image.
        height: Of packed latents, in tokens.

    Returns:
        `[B, 3, H, W]` float32.

    Raises:
        ValueError: The autoencoder or the shape of the latents is another, or packed latents have no height.
    """
    from iqareward.diffusion.policies.autoencoders import Autoencoder
    from iqareward.diffusion.policies.tokens import from_tokens

    vae = getattr(pipeline, "vae", None)
    got = f"{list(latents.shape)} of {type(pipeline).__name__} with {type(vae).__name__}"
    unfit = ValueError(
        "decode_latents expected latents [B, C, h, w], or [B, T, C] with their height, of an autoencoder that "
        f"iqareward.diffusion.Autoencoder takes, got {got}. Pass decode=..., a function (pipeline, latents) -> images "
        "in [0, 1]."
    )
    if not isinstance(vae, nn.Module):
        raise unfit
    trained, training = [weight for weight in vae.parameters() if weight.requires_grad], vae.training
    config: Any = getattr(vae, "config", {})
    upcast = bool(config.get("force_upcast")) and vae.dtype == torch.float16  # it would overflow
    try:
        try:
            autoencoder = Autoencoder(vae.float() if upcast else vae, checkpointed=False)
        except TypeError as error:
            raise unfit from error
        if latents.ndim == 3 and height is not None:
            whole = latents.shape[2] == autoencoder.channels  # Flux2, whose latents are 2x2 patches already
            latents = latents.mT.unflatten(2, (height, -1)) if whole else from_tokens(latents, height)
        if latents.ndim != 4 or latents.shape[1] != autoencoder.channels:
            raise unfit
        return clamp(autoencoder.decode(latents), 0, 1)
    finally:  # `Autoencoder` freezes its weights
        for weight in trained:
            weight.requires_grad_(True)
        vae.train(training)
        if upcast:
            vae.half()


@final
class StepwiseRewards:
    """A `callback_on_step_end` that scores the noise-free image that the model predicts at each step.

    The predictions are the scheduler's own, after guidance and for every prediction type; to read them, its `step` is
    wrapped while the `with` block lasts. It works with schedulers that report `pred_original_sample` (DDIM, DDPM,
    Euler, ...) or `denoised` (LCM), with DPM-Solver++ and UniPC, and with flow matching (Euler), and unpacks the
    latents of Flux and Qwen-Image. Every step that is scored costs a decoding and a scoring.

    Args:
        pipeline: Any diffusers pipeline with `callback_on_step_end`.
        reward: A name or sum of the catalogue, or any reward.
        references: Ground truth, one image per generated image, for rewards that need it.
        inputs: The degraded images, one per generated image, for rewards that need them.
        prompts: One per generated image, for rewards that need them.
        every: Each `every`-th step is scored, and the last.
        decode: `decode(pipeline, latents) -> images [B, 3, H, W]` in [0, 1], for latents as the scheduler has them;
            None = `decode_latents`, with the height that the network was told.

    Raises:
        ValueError: The reward needs references or inputs and there are none; in a step: the scheduler does not report
            its prediction, or `decode_latents` refuses it.
        RuntimeError: The callback is used outside of its `with` block.
    """

    def __init__(
        self,
        pipeline: Any,
        reward: Spec | Reward,
        *,
        references: ImageLike | None = None,
        inputs: ImageLike | None = None,
        prompts: Sequence[str] | None = None,
        every: int = 1,
        decode: Callable[[Any, Tensor], Tensor] | None = None,
    ) -> None:
        if every < 1:
            raise ValueError(f"StepwiseRewards expected `every` >= 1, got {every}.")
        self._columns: dict[str, Any] = {"references": references, "inputs": inputs, "prompts": prompts}
        self._scorer = _scorer(reward, "StepwiseRewards", self._columns)
        self.pipeline, self.every, self.decode = pipeline, every, decode
        self._scheduler: Any = None  # while it is watched
        self._own_step: Any = None  # what another watcher left on it
        self._clean: Tensor | None = None
        self._places: Mapping[str, Any] = {}  # what the network was told about the places of its tokens
        self._hook: Any = None
        self._rows: list[tuple[Any, Scores]] = []

    def __enter__(self) -> Self:
        """Start to record the scheduler's predictions."""
        scheduler = self._scheduler = self.pipeline.scheduler
        self._own_step = vars(scheduler).get("step")
        original = scheduler.step

        @functools.wraps(original)  # pipelines look into its signature to decide whether to pass eta and generator
        def step(model_output: Tensor, timestep: Any, sample: Tensor, *args: Any, **options: Any) -> Any:
            as_dict = options.pop("return_dict", True)
            result = original(model_output, timestep, sample, *args, **options, return_dict=True)
            self._clean = _clean_prediction(scheduler, result, model_output, sample)
            return result if as_dict else result.to_tuple()

        scheduler.step = step
        if isinstance(network := getattr(self.pipeline, "transformer", None), nn.Module):
            self._hook = network.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def _note(self, network: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self._places = {name: named.get(name) for name in ("img_shapes", "img_ids")}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the scheduler its own `step` back."""
        del self._scheduler.step
        if self._own_step is not None:
            self._scheduler.step = self._own_step
        if self._hook is not None:
            self._hook.remove()
        self._scheduler = self._own_step = self._clean = self._hook = None
        self._places = {}

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Score the step that the pipeline has just made; changes nothing."""
        if self._clean is None:
            raise RuntimeError(
                "StepwiseRewards expected `with StepwiseRewards(pipeline, ...) as steps:` around the call."
            )
        if step_index == 0:
            self._rows = []
        if step_index % self.every == 0 or step_index + 1 == getattr(pipeline, "num_timesteps", None):
            with torch.no_grad():
                if self.decode is None:
                    images = decode_latents(pipeline, self._clean, height=_height(self._places, self._clean))
                else:
                    images = self.decode(pipeline, self._clean)
            self._rows.append((timestep, self._scorer(images, **self._columns).detach()))
        return {}

    @property
    def timesteps(self) -> list[float]:
        """The T timesteps that were scored in the last call of the pipeline."""
        return [float(timestep) for timestep, _ in self._rows]

    @property
    def scores(self) -> Scores:
        """`[T, B]` scores of every generated image at every scored timestep; NaN = not scored.

        Raises:
            RuntimeError: The pipeline has not called back.
        """
        if not self._rows:
            raise RuntimeError("StepwiseRewards was never called. Pass callback_on_step_end=steps to the pipeline.")
        return torch.stack([scores for _, scores in self._rows])


class Best(NamedTuple):
    """The result of `generate_best` for B inputs and N candidates.

    Attributes:
        images: B tensors `[3, H, W]` float32 in [0, 1] on the CPU, the best candidate of each input.
        scores: `[B, N]` float32 on the CPU; NaN = not scored.
        chosen: `[B]` index of the best candidate; -1 where none was scored, and the image is candidate 0.
    """

    images: list[Tensor]
    scores: Scores
    chosen: Tensor


def generate_best(
    pipeline: Any,
    reward: Spec | Reward,
    inputs: Mapping[str, Any],
    *,
    num_candidates: int,
    batch_size: int = 1,
    seed: int = 0,
    references: Sequence[ImageLike] | Tensor | None = None,
    show_progress: bool = True,
    **arguments: Any,
) -> Best:
    """Generate `num_candidates` images per input with an image-to-image pipeline and keep the best of each.

    Every candidate has a seed of its own, made of `seed`, the index of its input and its number, so it does not depend
    on the batch size or on the number of candidates. The choice favours what the reward overrates: look at the images,
    or combine the reward with a `FidelityFloor`.

    Args:
        pipeline: Called as `pipeline(generator=[...], output_type="pt", **batch_of_inputs, **arguments)`; returns an
            object with `.images`, one image in [0, 1] per row.
        reward: A name or sum of the catalogue, or any reward. `inputs["prompt"]` and `inputs["image"]` are the prompts
            and inputs of rewards that need them.
        inputs: Argument name -> B values, one per input, e.g. `{"image": degraded, "prompt": ["..."] * 8}`; lists,
            tensors or arrays. Inputs of different sizes never share a batch.
        num_candidates: N >= 1.
        batch_size: Rows per call of the pipeline, >= 1.
        seed: >= 0.
        references: Ground truth, one per input, for rewards that need it.
        show_progress: Show a bar on the error stream; `pipeline.set_progress_bar_config(disable=True)` hides the
            pipeline's own.
        arguments: Passed on unchanged, e.g. `num_inference_steps=20`.

    Returns:
        The best images with the scores of all candidates.

    Raises:
        ValueError: The inputs differ in number, the pipeline returns another number of images than rows, or the
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
    from rich.console import Console
    from rich.progress import track

    columns = {"references": references, "inputs": inputs.get("image"), "prompts": inputs.get("prompt")}
    scorer = _scorer(reward, "generate_best", columns)
    count = _count(inputs, references, num_candidates, batch_size)
    scores = torch.full((count, num_candidates), torch.nan)
    chosen = torch.full((count,), -1)
    best, kept = [-math.inf] * count, {}
    batches = list(_batches(inputs, count, num_candidates, batch_size))
    for batch in track(batches, "candidates", console=Console(stderr=True), disable=not show_progress):
        rows = [row for row, _ in batch]
        generators = [generator(seed, *pair) for pair in batch]
        call = {name: _take(values, rows) for name, values in inputs.items()}
        output = pipeline(generator=generators, output_type="pt", **call, **arguments)
        images = to_images(output, value_range=(0, 1))
        if len(images) != len(rows):
            raise ValueError(
                f"generate_best expected one image per row ({len(rows)}), got {len(images)}. "
                "Ask for more candidates with num_candidates, not with the pipeline's own argument."
            )
        found = scorer(images, **{name: _take(column, rows) for name, column in columns.items()}).tolist()
        for (row, candidate), image, value in zip(batch, images, found, strict=True):
            scores[row, candidate] = value
            if value > best[row]:  # never true for NaN
                best[row], chosen[row], kept[row] = value, candidate, image.cpu()
            kept.setdefault(row, image.cpu())  # the first, until one is scored
    return Best([kept[row] for row in range(count)], scores, chosen)


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
    if values is None:
        return None
    return values[list(rows)] if isinstance(values, Tensor | np.ndarray) else [values[row] for row in rows]


def _scorer(reward: Spec | Reward, who: str, sources: Mapping[str, object]) -> Scorer:
    return Scorer(reward, who=who, sources=sources, on_nan="nan", policies=("nan",))


def _height(places: Mapping[str, Any], latents: Tensor) -> int | None:
    """Height of packed latents in tokens, from what the pipeline told its network; None if it told nothing."""
    if places.get("img_shapes") is not None:  # Qwen-Image: (frames, height, width) of each image, the generated first
        shape = places["img_shapes"][0]
        return int(shape[1] if isinstance(shape[0], int) else shape[0][1])
    if places.get("img_ids") is not None and latents.ndim == 3:  # Flux: (image, row, column) of each token
        ids = places["img_ids"]
        return int(ids[..., : latents.shape[1], 1].max()) + 1
    return None


def _clean_prediction(scheduler: Any, result: Any, model_output: Tensor, sample: Tensor) -> Tensor:
    """The noise-free sample that the model predicted in the step that was just made."""
    for name in ("pred_original_sample", "denoised"):
        if getattr(result, name, None) is not None:
            return getattr(result, name)
    diffusers = require("diffusers", extra="diffusers", purpose="StepwiseRewards")
    if isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler):
        sigma = scheduler.sigmas[scheduler.step_index - 1].to(sample.device)
        return sample.float() - sigma * model_output.float()
    converts = scheduler.config.get("algorithm_type", "").endswith("dpmsolver++") or scheduler.config.get("predict_x0")
    if converts and isinstance(getattr(scheduler, "model_outputs", None), list):
        return scheduler.model_outputs[-1]  # these solvers store the prediction itself
    raise ValueError(
        f"StepwiseRewards expected a scheduler that reports its prediction, got {type(scheduler).__name__}. "
        "Use DDIM, DDPM, Euler, LCM, DPM-Solver++, UniPC or FlowMatchEuler, "
        "e.g. pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)."
    )
