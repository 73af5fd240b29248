"""Published degradations for blind restoration: Real-ESRGAN's of second order, and that of face restoration.

Every strength is a quantile of its published distribution, from the mildest value at 0 to the strongest at 1. The
quantiles are drawn independently, which is what is published, or are all equal to a severity.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from iqareward.diffusion.degradations import checked, jpeg
from iqareward.seeds import normal, uniform

_SIZES = range(7, 22, 2)  # of a blur kernel, in pixels
_KINDS = ("plain", "generalised", "plateau")
_MODES = ("area", "bilinear", "bicubic")
_PHOTONS = 256  # per pixel at white, at a Poisson scale of 1: the levels of an 8-bit image
_FACE_KERNEL = 41
_T = TypeVar("_T")


@dataclass(frozen=True)
class DegradationOrder:
    """The ranges of one order of `RealESRGANDegradation`: blur, resize, noise and JPEG, each (mildest, strongest).

    Args:
        blur: Probability that there is a blur.
        sigma: Standard deviations of the blur in pixels.
        resize: Factors of the size, (largest, smallest).
        enlarge: Probability of a factor above 1.
        keep: Probability of a factor of 1; the rest are below 1.
        gaussian: Standard deviation of Gaussian noise in steps of 1/255.
        poisson: Scale of Poisson noise, relative to 256 photons per pixel at white.
        quality: Quality of JPEG.
    """

    blur: float = 1.0
    sigma: tuple[float, float] = (0.2, 3.0)
    resize: tuple[float, float] = (1.5, 0.15)
    enlarge: float = 0.2
    keep: float = 0.1
    gaussian: tuple[float, float] = (1.0, 30.0)
    poisson: tuple[float, float] = (0.05, 3.0)
    quality: tuple[float, float] = (95.0, 30.0)

    def factor(self, quantile: float) -> float:
        """Factor of the size: first those above 1, then 1, then those below, each uniform."""
        largest, smallest = self.resize
        reduced = quantile - self.enlarge - self.keep
        if quantile < self.enlarge:
            return _between(quantile / self.enlarge, (largest, 1.0))
        return 1.0 if reduced < 0 else _between(reduced / (1 - self.enlarge - self.keep), (1.0, smallest))


SECOND_ORDER = DegradationOrder(
    blur=0.8, sigma=(0.2, 1.5), resize=(1.2, 0.3), enlarge=0.3, keep=0.3, gaussian=(1.0, 25.0), poisson=(0.05, 2.5)
)


@dataclass(frozen=True)
class RealESRGANDegradation:
    """The second-order degradation of Real-ESRGAN, with the published ranges, made from an id and a seed.

    Each of two orders blurs (Gaussian, generalised Gaussian, plateau or sinc kernel), resizes (area, bilinear or
    bicubic), adds Gaussian or Poisson noise, of one colour or grey, and compresses with JPEG. The last JPEG comes after
    or before a resize to the final size and a sinc filter, whose ringing and overshoot real images show. Which of them
    happens is the id's, at every severity. Borders are repeated.

    Args:
        scale: How many times smaller the result is; 1 keeps the size.
        first: Ranges of the first order.
        second: Ranges of the second order.
        ringing: Probability of the sinc filter at the end.

    Raises:
        ValueError: `scale` is below 1; in a call, the sides of the images are not multiples of `scale`.

    Example:
        >>> images = torch.full((2, 3, 64, 64), 0.5)
        >>> RealESRGANDegradation()(images, None, [0, 1]).shape  # as published: every step draws its own strength
        torch.Size([2, 3, 16, 16])
        >>> _ = RealESRGANDegradation()(images, torch.tensor([0.1, 0.9]), [0, 1])  # one mild, one severe

    References:
        Wang, Xie, Dong, Shan, Real-ESRGAN: Training Real-World Blind Super-Resolution with Pure Synthetic Data, 2021,
        https://arxiv.org/abs/2107.10833
    """

    scale: int = 4
    first: DegradationOrder = DegradationOrder()
    second: DegradationOrder = SECOND_ORDER
    ringing: float = 0.8

    def __post_init__(self) -> None:
        if self.scale < 1:
            raise ValueError(f"RealESRGANDegradation expected scale >= 1, got {self.scale}.")

    def __call__(
        self, images: Tensor, severity: Tensor | None, ids: Sequence[int] | Tensor, *, seed: int = 0
    ) -> Tensor:
        """Degrade each image; the result depends on its own image, severity and id, never on its batch.

        Args:
            images: `[B, 3, H, W]` in [0, 1].
            severity: `[B]`; clamped to [0, 1]: the quantile of all strengths. None: every strength draws its own.
            ids: `[B]` integers >= 0.
            seed: Seed of all random numbers, >= 0.

        Returns:
            `[B, 3, H / scale, W / scale]` float32 in [0, 1], multiples of 1/255, on the device of the images.
        """
        images, ids, quantiles = checked("RealESRGANDegradation", images, severity, ids, 11, seed=seed)
        if images.shape[2] % self.scale or images.shape[3] % self.scale:
            raise ValueError(
                f"RealESRGANDegradation expected sides that are multiples of {self.scale}, got {list(images.shape)}. "
                "Crop the images."
            )
        draws = uniform(ids, 28, seed=seed, purpose="choices")
        rows = zip(images.split(1), quantiles.tolist(), draws.tolist(), ids, strict=True)
        return torch.cat(
            [self._one(image, own, choices, i, seed, severity is not None) for image, own, choices, i in rows]
        )

    def _one(
        self, image: Tensor, quantiles: list[float], draws: list[float], input_id: int, seed: int, driven: bool
    ) -> Tensor:
        height, width = (side // self.scale for side in image.shape[2:])
        final, size = (height, width), (float(image.shape[2]), float(image.shape[3]))
        for place, order in enumerate((self.first, self.second)):
            strong, chosen = quantiles[5 * place : 5 * place + 5], draws[12 * place : 12 * place + 12]
            image = _blurred(image, order, strong[0], strong[1], chosen, driven=driven)
            by = order.factor(strong[2])
            image = _resized(image, (size[0] * by, size[1] * by), chosen[7])
            image = _noisy(image, order, strong[3], chosen[8:10], input_id, seed, f"noise {place}").clamp(0, 1)
            quality = torch.tensor([_between(strong[4], order.quality)])
            if place == 0:
                image, size = jpeg(image, quality), (float(height), float(width))
                continue
            late, mode, rings, tap = draws[24:28]
            if late >= 0.5:
                image = jpeg(image, quality)
            image = _resized(image, final, mode)
            if rings < self.ringing:
                image = convolved(image, _sinc(quantiles[10], tap))
            if late < 0.5:
                image = jpeg(image, quality)
        return (image.clamp(0, 1) * 255).round() / 255


@dataclass(frozen=True)
class FaceDegradation:
    """The degradation of blind face restoration: blur, smaller, noise, JPEG, and back to the size of the ground truth.

    The defaults are the settings of GFPGAN v1, without its changes of colour. CodeFormer's last stage has
    `sigma=(0.1, 10)`, `factor=(1, 12)`, `gaussian=(0, 15)`. Half of the blurs are anisotropic.

    Args:
        sigma: Standard deviations of the blur in pixels, (mildest, strongest).
        factor: How many times smaller.
        gaussian: Standard deviation of the noise in steps of 1/255.
        quality: Quality of JPEG.

    Example:
        >>> faces = torch.full((2, 3, 64, 64), 0.5)
        >>> FaceDegradation()(faces, None, [0, 1]).shape
        torch.Size([2, 3, 64, 64])

    References:
        Wang, Li, Zhang, Shan, Towards Real-World Blind Face Restoration with Generative Facial Prior, 2021,
        https://arxiv.org/abs/2101.04061
        Zhou, Chan, Li, Loy, Towards Robust Blind Face Restoration with Codebook Lookup Transformer, 2022,
        https://arxiv.org/abs/2206.11253
    """

    sigma: tuple[float, float] = (0.1, 10.0)
    factor: tuple[float, float] = (0.8, 8.0)
    gaussian: tuple[float, float] = (0.0, 20.0)
    quality: tuple[float, float] = (100.0, 60.0)

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
            severity: `[B]`; clamped to [0, 1]: the quantile of all strengths. None: every strength draws its own.
            ids: `[B]` integers >= 0.
            seed: Seed of all random numbers, >= 0.

        Returns:
            `[B, 3, H, W]` float32 in [0, 1], multiples of 1/255, on the device of the images.
        """
        images, ids, quantiles = checked("FaceDegradation", images, severity, ids, 5, seed=seed)
        draws = uniform(ids, 3, seed=seed, purpose="choices")
        height, width = images.shape[2:]
        rows: list[Tensor] = []
        for image, (long, short, by, noise, quality), (anisotropic, turn, share), input_id in zip(
            images.split(1), quantiles.tolist(), draws.tolist(), ids, strict=True
        ):
            widths = _widths(self.sigma, long, short, share, anisotropic < 0.5, driven=severity is not None)
            image = convolved(image, gaussian_kernel(_FACE_KERNEL, *widths, math.tau * turn))
            factor = _between(by, self.factor)
            image = _resized(image, (height / factor, width / factor), 0.5)
            pattern = normal([input_id], *image.shape[1:], seed=seed, purpose="noise").to(image.device)
            image = (image + pattern * (_between(noise, self.gaussian) / 255)).clamp(0, 1)
            image = _resized(jpeg(image, torch.tensor([_between(quality, self.quality)])), (height, width), 0.5)
            rows.append((image.clamp(0, 1) * 255).round() / 255)
        return torch.cat(rows)


def gaussian_kernel(
    size: int, sigma_x: float, sigma_y: float, angle: float, *, kind: str = "plain", beta: float = 1.0
) -> Tensor:
    """A blur kernel `[size, size]` fp32 that sums to 1, of a Gaussian that is turned by `angle` in radians.

    With d the squared distance in standard deviations, "plain" is exp(-d / 2), "generalised" exp(-d^beta / 2), and
    "plateau" 1 / (1 + d^beta).
    """
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    x, y = places, places[:, None]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    distance = (along / sigma_x).square() + (across / sigma_y).square()
    shaped = distance if kind == "plain" else distance.pow(beta)
    kernel = 1 / (1 + shaped) if kind == "plateau" else torch.exp(-0.5 * shaped)
    return (kernel / kernel.sum()).float()


def sinc_kernel(size: int, cutoff: float) -> Tensor:
    """The kernel `[size, size]` fp32 of the ideal circular low-pass filter, in radians per pixel; it sums to 1."""
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    radius = torch.hypot(places, places[:, None])
    kernel = cutoff * torch.special.bessel_j1(cutoff * radius) / (math.tau * radius)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)  # the limit
    return (kernel / kernel.sum()).float()


def convolved(images: Tensor, kernel: Tensor) -> Tensor:
    """Each colour of `images` `[B, 3, H, W]` filtered with a symmetric kernel of odd size; borders are repeated."""
    around = kernel.shape[-1] // 2
    padded = F.pad(images, [around] * 4, mode="replicate")
    size = padded.shape[-2:]
    # In double precision, because the last digit depends on the number of threads, and is rounded away here.
    spectrum = torch.fft.rfft2(kernel.to(padded.device, torch.float64), s=size)
    return torch.fft.irfft2(torch.fft.rfft2(padded.double()) * spectrum, s=size)[
        ..., 2 * around :, 2 * around :
    ].float()


def _blurred(
    image: Tensor, order: DegradationOrder, long: float, short: float, draws: list[float], *, driven: bool
) -> Tensor:
    blurs, sinc, tap, kind, anisotropic, shape, turn = draws[:7]
    if blurs >= order.blur:
        return image
    if sinc < 0.1:
        return convolved(image, _sinc(long, tap))
    # Gaussian 0.7, generalised 0.15, plateau 0.15; of the first 9 in 25 are anisotropic, of the others 1 in 5.
    place = 0 if kind < 0.7 else 1 if kind < 0.85 else 2
    is_anisotropic = anisotropic < (25 / 70 if place == 0 else 0.2)
    widths = _widths(order.sigma, long, short, draws[10], is_anisotropic, driven=driven)
    # Half of the shapes are below 1, as in the published training; a plateau's are at least 1.
    low, high = (0.5, 4.0) if place == 1 else (1.0, 2.0)
    beta = _between(2 * shape, (low, 1.0)) if shape < 0.5 else _between(2 * shape - 1, (1.0, high))
    kernel = gaussian_kernel(_choice(_SIZES, tap), *widths, math.tau * turn, kind=_KINDS[place], beta=beta)
    return convolved(image, kernel)


def _widths(
    sigma: tuple[float, float], long: float, short: float, share: float, anisotropic: bool, *, driven: bool
) -> tuple[float, float]:
    """Both standard deviations of a kernel. Where one severity drives both, the id decides how elongated it is."""
    first = _between(long, sigma)
    if not anisotropic:
        return first, first
    return first, _between(share * short if driven else short, sigma)


def _sinc(quantile: float, tap: float) -> Tensor:
    size = _choice(_SIZES, tap)
    return sinc_kernel(size, _between(quantile, (math.pi, math.pi / (3 if size < 13 else 5))))


def _resized(image: Tensor, size: tuple[float, float], mode: float) -> Tensor:
    """The image in another size, rounded to whole pixels, not antialiased, as published."""
    height, width = (max(1, round(side)) for side in size)
    if image.shape[2:] == (height, width):
        return image
    name = _choice(_MODES, mode)
    corners = {} if name == "area" else {"align_corners": False}
    # Bilinear numbers depend on the number of threads in their last digit, and in double precision not when rounded.
    return F.interpolate(image.double(), size=(height, width), mode=name, **corners).float().clamp(0, 1)


def _noisy(
    image: Tensor, order: DegradationOrder, quantile: float, draws: list[float], input_id: int, seed: int, purpose: str
) -> Tensor:
    """With Gaussian or Poisson noise, in two of five images the same in all colours."""
    poisson, grey = draws[0] >= 0.5, draws[1] < 0.4
    base = (image.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1) * image).sum(1, keepdim=True) if grey else image
    pattern = normal([input_id], *base.shape[1:], seed=seed, purpose=purpose).to(image.device)
    if not poisson:
        return image + pattern * (_between(quantile, order.gaussian) / 255)
    # At 256 photons a Poisson number is a rounded Gaussian one of the same variance, and that is drawn with less
    # trouble: its random numbers do not depend on the image.
    counts = _PHOTONS * base.clamp(0, 1)
    noise = ((counts + pattern * counts.sqrt()).round() - counts) / _PHOTONS
    return image + noise * _between(quantile, order.poisson)


def _choice(options: Sequence[_T], draw: float) -> _T:
    return options[int(draw * len(options))]


def _between(share: float, ends: tuple[float, float]) -> float:
    return ends[0] + share * (ends[1] - ends[0])
