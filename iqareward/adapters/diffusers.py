"""Rewards during sampling with diffusers: how good the image is that the model has in mind after every step.

- Read: diffusers 0.42; any pipeline with `callback_on_step_end`.
- Range: decoded latents, converted from the autoencoder's [-1, 1] and clamped, as pipelines do.
- References: yours, for rewards that need them.
- Failure: NaN in the table of scores; sampling is never disturbed.
"""

import functools
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, final

import torch
from torch import Tensor

from iqareward._gradients import clamp
from iqareward.adapters._values import find_reward, score
from iqareward.images import ImageLike
from iqareward.optional import require
from iqareward.types import Reward, Scores


def decode_latents(pipeline: Any, latents: Tensor) -> Tensor:
    """Images `[B, 3, H, W]` float32 of latents `[B, C, h, w]`, clamped to [0, 1], as pipelines return them.

    Args:
        pipeline: with an `AutoencoderKL`.
        latents: as the pipeline scales them.

    Raises:
        ValueError: the latents are packed (Flux) or normalised per channel, or the autoencoder overflows in float16.
    """
    config = pipeline.vae.config
    dtype = next(pipeline.vae.parameters()).dtype
    if latents.ndim != 4 or getattr(config, "latents_mean", None) is not None:
        raise ValueError(
            f"decode_latents expected latents [B, C, h, w] of an AutoencoderKL, got {list(latents.shape)} of "
            f"{type(pipeline).__name__}. Pass decode=..., a function (pipeline, latents) -> images in [0, 1]."
        )
    if dtype == torch.float16 and getattr(config, "force_upcast", False):
        raise ValueError(
            "decode_latents expected an autoencoder that decodes in float16, but this one says force_upcast. "
            "Load it in float32 or bfloat16."
        )
    shift = getattr(config, "shift_factor", None) or 0.0
    decoded = pipeline.vae.decode((latents / config.scaling_factor + shift).to(dtype)).sample
    return clamp((decoded.float() + 1) / 2, 0, 1)


@final
class StepwiseRewards:
    """Scores the noise-free image that the model predicts at each step: a `callback_on_step_end` that only watches.

    The predictions are the scheduler's own (after guidance, for every prediction type), so that its `step` is wrapped
    while the `with` block lasts. Works with schedulers that report `pred_original_sample` (DDIM, DDPM, Euler, ...) or
    `denoised` (LCM), with DPM-Solver++ and UniPC, and with flow matching (Euler). Every watched step costs a decoding
    and a scoring.

    Args:
        pipeline: any diffusers pipeline with `callback_on_step_end`.
        reward: a name or sum of the catalogue, or any reward.
        references: ground truth, one image per generated image, for rewards that need it.
        prompts: one per generated image, for rewards that need them.
        every: watch each `every`-th step, and the last.
        decode: `decode(pipeline, latents) -> images [B, 3, H, W]` in [0, 1].

    Raises:
        ValueError: the reward needs references and there are none; in a step: the scheduler tells no prediction.
        RuntimeError: the callback is used outside of its `with` block.
    """

    def __init__(
        self,
        pipeline: Any,
        reward: str | Reward,
        *,
        references: ImageLike | None = None,
        prompts: Sequence[str] | None = None,
        every: int = 1,
        decode: Callable[[Any, Tensor], Tensor] = decode_latents,
    ) -> None:
        if every < 1:
            raise ValueError(f"StepwiseRewards expected `every` >= 1, got {every}.")
        self.reward = find_reward(reward, references=references, who="StepwiseRewards")
        self.pipeline, self.references, self.prompts = pipeline, references, prompts
        self.every, self.decode = every, decode
        self._scheduler: Any = None  # while it is watched
        self._own_step: Any = None  # what another watcher left on it
        self._clean: Tensor | None = None
        self._rows: list[tuple[Any, Scores]] = []

    def __enter__(self) -> Self:
        """Start to note the scheduler's predictions."""
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
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the scheduler its own `step` back."""
        del self._scheduler.step
        if self._own_step is not None:
            self._scheduler.step = self._own_step
        self._scheduler = self._own_step = self._clean = None

    def __call__(
        self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What the pipeline calls after each step; changes nothing."""
        if self._clean is None:
            raise RuntimeError(
                "StepwiseRewards expected `with StepwiseRewards(pipeline, ...) as steps:` around the call."
            )
        if step_index == 0:
            self._rows = []
        if step_index % self.every == 0 or step_index + 1 == getattr(pipeline, "num_timesteps", None):
            with torch.no_grad():
                images = self.decode(pipeline, self._clean)
            scores = score(
                self.reward,
                images,
                value_range=(0, 1),
                references=self.references if self.reward.needs_references else None,
                prompts=self.prompts,
                on_nan="nan",
            )
            self._rows.append((timestep, scores.detach()))
        return {}

    @property
    def timesteps(self) -> list[float]:
        """The timesteps that were watched in the last call of the pipeline, T of them."""
        return [float(timestep) for timestep, _ in self._rows]

    @property
    def scores(self) -> Scores:
        """`[T, B]`, the score of every generated image at every watched step; NaN = not scored.

        Raises:
            RuntimeError: the pipeline has not called back.
        """
        if not self._rows:
            raise RuntimeError("StepwiseRewards was never called. Pass callback_on_step_end=steps to the pipeline.")
        return torch.stack([scores for _, scores in self._rows])


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
        f"StepwiseRewards expected a scheduler that tells its prediction, got {type(scheduler).__name__}. "
        "Use DDIM, DDPM, Euler, LCM, DPM-Solver++, UniPC or FlowMatchEuler, "
        "e.g. pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config)."
    )
