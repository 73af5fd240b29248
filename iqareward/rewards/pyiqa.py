"""Any metric of the pyiqa package as a reward that survives training."""

import logging
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from iqareward.images import drop_broken_gradients
from iqareward.rewards.core import ImageReward
from iqareward.rewards.loading import LazyModel, plain_defaults
from iqareward.rewards.pyiqa_build import build_metric, check_request, network_of
from iqareward.rewards.pyiqa_facts import (
    BYTES_PER_PIXEL,
    CEILING,
    FLAT_REFERENCE_UNDEFINED,
    METRICS,
    MIN_SIDE,
    NEEDS_FACE,
    ONE_IMAGE_PER_CALL,
    PAD_TO_MULTIPLE,
    bounds_of,
)
from iqareward.types import Bounds

_LOGGER = logging.getLogger(__name__)
_PROBE_SIDE = 256
# what metrics raise on images that they cannot score; LinAlgError is one of these in torch and in numpy
_IMAGE_ERRORS = (RuntimeError, AssertionError, ValueError, IndexError, ArithmeticError)


@final
class PyIQAReward(ImageReward):
    """A metric of pyiqa 0.1.16 by its name there, higher is better, one score per image whatever the batch holds.

    pyiqa's code and weights are under PolyForm Noncommercial 1.0.0 and similar terms: not for commercial use. The
    first use in a process logs this as a warning (through `logging`, because no change to the caller's code would
    avoid it).

    pyiqa unpickles its downloads, which can run code, and checks no hash: use `weights` with a file that you trust,
    which is refused unless it holds tensors only. The qrealign metrics change transformers for the whole process.

    Args:
        metric: pyiqa's name, e.g. `"musiq"`, `"topiq_nr"`, `"clipiqa+"`. Metrics of image sets are refused.
        normalize: map scores to [0, 1], 1 = best: linear over the range that pyiqa states, and constant beyond it; for
            a metric without a limit on one side, d / (d + half), d the distance from the limit that it has.
        differentiable: keep the graph from scores to pixels. An image whose gradient is not finite gets a zero one.
        device: where the weights live; None = the GPU of the first images, else the current CUDA device if there is
            one, else the CPU.
        batch_size: images per run of the network; None = as many as fit the budget of memory.
        weights: file with the metric's own weights, for metrics that can read one (pyiqa's `pretrained_model_path`).
            Backbones may still be downloaded.
        **options: of the metric in pyiqa, e.g. `test_y_channel=False` for ssim.

    Raises:
        ValueError: unknown or refused metric, an option that is not a metric's, or no gradient to be had.
        ImportError: pyiqa or a package that a metric needs is not installed (at the first use).
        OSError: weights cannot be downloaded (at the first use).

    Example:
        >>> reward = PyIQAReward("musiq", normalize=True)  # nothing is loaded yet
        >>> reward.name, reward.needs_references, reward.bounds
        ('pyiqa:musiq', False, (0.0, 1.0))
    """

    def __init__(
        self,
        metric: str,
        *,
        normalize: bool = False,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        weights: str | Path | None = None,
        **options: Any,
    ) -> None:
        check_request(metric, differentiable, device, options)
        self.metric = metric
        self.name = f"pyiqa:{metric}"
        self.normalize = normalize
        self.needs_references = METRICS[metric].needs_references
        self.differentiable = differentiable
        self.batch_size = 1 if metric in ONE_IMAGE_PER_CALL else batch_size
        self.bounds: Bounds = (0.0, 1.0) if normalize else bounds_of(metric)
        self.bytes_per_pixel = BYTES_PER_PIXEL.get(metric, BYTES_PER_PIXEL[""])[differentiable]
        self.min_side = MIN_SIDE.get(metric, 1)
        self.model_loader = LazyModel(partial(_build, self.name, metric, weights, options), device, name=self.name)
        self._reported: set[str] = set()

    @property
    def model(self) -> nn.Module:
        """pyiqa's metric object; loads it if need be."""
        return self._loader.get()

    def score_batch(self, images: Tensor, references: Tensor | None = None) -> Tensor:
        """Pyiqa's value of each image, higher is better."""
        images = drop_broken_gradients(images)  # FSIM has no derivative at a constant image
        batch = [images] if references is None else [images, references]
        facts, multiple = METRICS[self.metric], PAD_TO_MULTIPLE.get(self.metric, 1)
        padding = (0, -images.shape[3] % multiple, 0, -images.shape[2] % multiple)
        if any(padding):
            batch = [nn.functional.pad(tensor, padding, mode="replicate") for tensor in batch]
        with (
            plain_defaults(self.name),
            self._loader.lock,
        ):  # metrics keep state between layers
            values = self._measure(self._loader.ready(images), *batch)
        signed = values if facts.higher_is_better else torch.neg(values)
        scores = facts.normalized(values) if self.normalize else signed
        if self.metric in FLAT_REFERENCE_UNDEFINED:
            undefined = (batch[1].amax((2, 3)) == batch[1].amin((2, 3))).all(1)
            undefined |= values > CEILING.get(self.metric, torch.inf)
            identical = (batch[0] == batch[1]).flatten(1).all(1)
            scores = torch.where(identical, 1.0, torch.where(undefined, torch.nan, scores))
        return scores

    def _measure(self, model: nn.Module, *batch: Tensor) -> Tensor:
        """The metric's values; where it fails on an image but not on an ordinary one, NaN for that image alone."""
        count = batch[0].shape[0]
        try:
            return _per_image(self.name, network_of(model)(*batch), count)
        except torch.OutOfMemoryError:
            raise
        except _IMAGE_ERRORS as error:
            if self.metric not in NEEDS_FACE and not self._works(model, *batch):
                raise
            if count == 1:
                self._report(error, batch[0])
                return batch[0].new_full((1,), torch.nan)
        rows = zip(*(tensor.split(1) for tensor in batch), strict=True)
        return torch.cat([self._measure(model, *row) for row in rows])

    def _works(self, model: nn.Module, *batch: Tensor) -> bool:
        """Whether the metric scores an ordinary image, so that a failure is the image's own."""
        side, rng = _PROBE_SIDE, torch.Generator(device="cpu").manual_seed(0)
        coarse = torch.rand(1, 3, side // 8, side // 8, generator=rng, dtype=torch.float32, device="cpu")
        noise = torch.rand(1, 3, side, side, generator=rng, dtype=torch.float32, device="cpu")
        image = (0.8 * nn.functional.interpolate(coarse, size=(side, side)) + 0.2 * noise).to(batch[0].device)
        try:
            with torch.no_grad():
                return bool(_per_image(self.name, network_of(model)(*[image] * len(batch)), 1).isfinite())
        except _IMAGE_ERRORS:
            return False

    def _report(self, error: Exception, image: Tensor) -> None:
        if type(error).__name__ not in self._reported:
            self._reported.add(type(error).__name__)
            _LOGGER.warning(
                "%s could not score an image of %d x %d pixels and answers NaN: %s: %s (further ones are not logged)",
                self.name, *image.shape[2:], type(error).__name__, error,
            )  # fmt: skip


def _build(name: str, *arguments: Any) -> nn.Module:
    with plain_defaults(name):
        return build_metric(*arguments)


def _per_image(name: str, output: Any, count: int) -> Tensor:
    """`[count]` float32 from (B,), (B, 1), (B, 1, 1, 1), a 0-d tensor, a float, or a tuple that starts with one."""
    first = output[0] if isinstance(output, tuple | list) else output
    values = torch.as_tensor(first)
    if values.numel() != count:
        raise RuntimeError(
            f"{name} expected one number per image from pyiqa ({count}), got shape {list(values.shape)}."
        )
    return values.reshape(count).float()
