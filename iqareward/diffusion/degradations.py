"""Degradations of known strength: blur, lost resolution, noise and JPEG, from hardly visible to severe."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from iqareward.functional._checks import check_images
from iqareward.functional._chunks import rows_at_once
from iqareward.functional.resize import pillow_resize
from iqareward.seeds import id_list, normal, uniform


class DegradationModel(Protocol):
    """How the degraded image of a pair is made from the ground truth."""

    @property
    def scale(self) -> int:
        """How many times smaller the degraded image is."""
        ...

    def __call__(
        self, images: Tensor, severity: Tensor | None, ids: Sequence[int] | Tensor, *, seed: int = 0
    ) -> Tensor:
        """Degrade each image by its own image, severity, id and the seed alone.

        Args:
            images: `[B, 3, H, W]` in [0, 1].
            severity: `[B]`, clamped to [0, 1]: how strong every step is, from its mildest to its strongest. None: every
                step draws its own strength.
            ids: `[B]` integers >= 0; an id has the same random choices at every severity.
            seed: Seed of all random numbers, >= 0.

        Returns:
            `[B, 3, H / scale, W / scale]` float32 in [0, 1].
        """
        ...


TASKS = ("blur", "resize", "noise", "jpeg")
# The mildest setting of each task; the strongest are options.
MIN_SIGMA, MIN_FACTOR, MIN_NOISE, MAX_QUALITY = 0.5, 1.0, 2.0, 95.0
_TAPS_PER_SIGMA = 3  # beyond it a Gaussian is below 1 % of its peak


@dataclass(frozen=True)
class Degradation:
    """Degrade images, one task after the other, each image as much as its severity says.

    At severity u in [0, 1] every task has the share u of its way from mild to strong: blur of 0.5 to `max_sigma`
    pixels, resolution lost 1 to `max_factor` times, noise of 2 to `max_noise` steps of 1/255, JPEG quality 95 down to
    `min_quality`. A single task gives deblurring, super-resolution, denoising or artifact removal.

    Args:
        tasks: Any of "blur", "resize", "noise", "jpeg", in the order in which they are applied.
        max_sigma: Blur at severity 1 in pixels, at least 0.5.
        max_factor: Loss of resolution at severity 1, at least 1.
        max_noise: Noise at severity 1 in steps of 1/255, at least 2.
        min_quality: JPEG quality at severity 1, in [1, 95].

    Raises:
        ValueError: An unknown or repeated task, or an option out of its range.

    Example:
        >>> grey = torch.full((2, 3, 32, 32), 0.5)
        >>> noisy = Degradation(tasks=("noise",))(grey, torch.tensor([0.0, 1.0]), [0, 1])
        >>> (noisy - grey).std((1, 2, 3)).mul(255).round()
        tensor([ 2., 30.])
    """

    tasks: tuple[str, ...] = TASKS
    max_sigma: float = 3.0
    max_factor: float = 4.0
    max_noise: float = 30.0
    min_quality: float = 25.0

    def __post_init__(self) -> None:
        requirements = {
            f"tasks as a tuple of different names out of {TASKS}": isinstance(self.tasks, tuple)
            and 0 < len(set(self.tasks)) == len(self.tasks)
            and set(self.tasks) <= set(TASKS),
            f"max_sigma >= {MIN_SIGMA:g}": self.max_sigma >= MIN_SIGMA,
            f"max_factor >= {MIN_FACTOR:g}": self.max_factor >= MIN_FACTOR,
            f"max_noise >= {MIN_NOISE:g}": self.max_noise >= MIN_NOISE,
            f"min_quality in [1, {MAX_QUALITY:g}]": 1 <= self.min_quality <= MAX_QUALITY,
        }
        for requirement, met in requirements.items():
            if not met:
                raise ValueError(f"Degradation expected {requirement}, got {self}. Change that option.")

    @property
    def scale(self) -> int:
        """1, because the degraded image has the size of its ground truth."""
        return 1

    def __call__(
        self, images: Tensor, severity: Tensor | None, ids: Sequence[int] | Tensor, *, seed: int = 0
    ) -> Tensor:
        """Degrade each image; the result depends on its own image, severity and id, never on its batch.

        Args:
            images: `[B, 3, H, W]` in [0, 1].
            severity: `[B]`; clamped to [0, 1]. None: every task draws its own, uniform in [0, 1).
            ids: `[B]` integers >= 0; an id has the same noise pattern at every severity.
            seed: Seed of the noise, >= 0.

        Returns:
            `[B, 3, H, W]` float32 in [0, 1], on the device of the images.
        """
        images, ids, shares = checked("Degradation", images, severity, ids, len(self.tasks), seed=seed)
        size = rows_at_once(images.shape[2:], images.device)
        parts = [slice(start, start + size) for start in range(0, len(ids), size)]
        return torch.cat([self._damaged(images[part], shares[part], ids[part], seed=seed) for part in parts])

    def _damaged(self, images: Tensor, shares: Tensor, ids: Sequence[int], *, seed: int) -> Tensor:
        steps: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "blur": lambda rows, share: blur(rows, MIN_SIGMA + (self.max_sigma - MIN_SIGMA) * share),
            "resize": lambda rows, share: lower_resolution(rows, MIN_FACTOR + (self.max_factor - MIN_FACTOR) * share),
            "noise": lambda rows, share: add_noise(
                rows, MIN_NOISE + (self.max_noise - MIN_NOISE) * share, ids, seed=seed
            ),
            "jpeg": lambda rows, share: jpeg(rows, MAX_QUALITY - (MAX_QUALITY - self.min_quality) * share),
        }
        for task, share in zip(self.tasks, shares.unbind(1), strict=True):
            images = steps[task](images, share)
        return images.clamp(0, 1)


def checked(
    caller: str,
    images: Tensor,
    severity: Tensor | None,
    ids: Sequence[int] | Tensor,
    steps: int,
    *,
    seed: int,
) -> tuple[Tensor, list[int], Tensor]:
    """Images, ids, and how strong each of the steps is, `[B, steps]` in [0, 1]: all as the severity, or drawn."""
    images, ids = check_images(caller, images).detach().float(), id_list(caller, ids)
    if len(ids) != len(images) or (severity is not None and severity.shape != images.shape[:1]):
        raise ValueError(
            f"{caller} expected one severity and one id for each of {len(images)} images, got "
            f"{None if severity is None else list(severity.shape)} and {len(ids)}. Use torch.full for one severity."
        )
    if severity is None:
        return images, ids, uniform(ids, steps, seed=seed, purpose="strengths").to(images.device)
    return images, ids, severity.to(images.device).float().clamp(0, 1)[:, None].expand(-1, steps)


def blur(images: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur with its own `sigma` `[B]` in pixels for each image; borders are repeated."""
    radius = math.ceil(_TAPS_PER_SIGMA * float(sigma.max()))
    offsets = torch.arange(-radius, radius + 1, dtype=torch.float64, device=sigma.device)
    sigma = sigma.double()[:, None]
    # Cut at each image's own width, so that the widest blur of the batch changes no other. In double precision, because
    # the last digit of an exponential may depend on the place in the batch, and is rounded away here.
    inside = offsets.abs() <= (_TAPS_PER_SIGMA * sigma).ceil()
    taps = torch.where(inside, torch.exp(-0.5 * (offsets / sigma).square()), 0.0)
    taps = (taps / taps.sum(1, keepdim=True)).float()[:, :, None, None, None]
    for dim in (2, 3):
        length = images.shape[dim]
        padding = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        padded = F.pad(images, padding, mode="replicate")
        images = padded.narrow(dim, 0, length) * taps[:, 0]
        for place in range(1, 2 * radius + 1):
            images = images + padded.narrow(dim, place, length) * taps[:, place]
    return images


def lower_resolution(images: Tensor, factor: Tensor) -> Tensor:
    """Shrink each image by its own `factor` `[B]` and enlarge it again, bicubic in 8 bits, as Pillow does."""
    height, width = images.shape[2:]
    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, by in enumerate(factor.tolist()):
        small = (max(1, round(height / by)), max(1, round(width / by)))
        rows_of.setdefault(small, []).append(row)
    degraded = torch.empty_like(images)
    for small, rows in rows_of.items():  # images of one small size are resized together
        degraded[rows] = pillow_resize(pillow_resize(images[rows], small), (height, width))
    return degraded


def add_noise(images: Tensor, sigma: Tensor, ids: Sequence[int], *, seed: int = 0) -> Tensor:
    """Add white Gaussian noise, independent per colour, with `sigma` `[B]` in steps of 1/255; not clamped."""
    pattern = normal(ids, *images.shape[1:], seed=seed, purpose="noise").to(images.device)
    return images + pattern * (sigma / 255)[:, None, None, None]


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """Write each image as a JPEG file with its own `quality` `[B]` and chroma 4:2:0, and read it again, with Pillow."""
    pixels = (images.clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
    files = [_jpeg(image, each) for image, each in zip(pixels, quality.round().clamp(1, 100).tolist(), strict=True)]
    return torch.from_numpy(np.stack(files)).movedim(-1, 1).to(images.device, torch.float32) / 255


def _jpeg(pixels: np.ndarray, quality: float) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=int(quality), subsampling="4:2:0")
    return np.asarray(Image.open(file))
