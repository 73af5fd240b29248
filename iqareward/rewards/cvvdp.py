"""ColorVideoVDP: what a viewer of a given display can see, in just-objectionable differences."""

import math
from functools import partial
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from iqareward.rewards.core import ImageReward
from iqareward.rewards.loading import LazyModel
from iqareward.types import Bounds


class _Display(NamedTuple):
    """A display in sRGB, in a lit room.

    Attributes:
        width, height: pixels.
        inches: its diagonal.
        metres: distance of the viewer.
        peak, black: luminance of white and black in cd/m^2.
        lux: light that falls on it, of which 0.5 % comes back to the viewer.
    """

    width: int
    height: int
    inches: float
    metres: float
    peak: float
    black: float
    lux: float = 250.0

    @property
    def pixels_per_degree(self) -> float:
        """At the centre of the display."""
        side = 0.0254 * self.inches / math.hypot(self.width, self.height)
        return 1 / (2 * math.degrees(math.atan(0.5 * side / self.metres)))


# Displays and parameters of the package cvvdp 0.5.7, by its names; licence: data/CVVDP-LICENSE.txt.
DISPLAYS = {
    "standard_4k": _Display(3840, 2160, 30.0, 0.7472, 200.0, 0.2),
    "standard_fhd": _Display(1920, 1080, 24.0, 0.6, 200.0, 0.2),
    "standard_phone": _Display(2400, 1080, 6.0, 0.4, 500.0, 0.05),
    "iphone_14_pro": _Display(2532, 1170, 6.1, 20 * 0.0254, 1025.0, 0.0004),
    "ipad_pro_12_9": _Display(2732, 2048, 12.9, 20 * 0.0254, 600.0, 0.37),
    "macbook_pro_16": _Display(3072, 1920, 16.0, 25 * 0.0254, 500.0, 0.37),
}
_SRGB_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))
_XYZ_TO_LMS = (
    (0.187596268556126, 0.585168649077728, -0.026384263306304),
    (-0.133397430663221, 0.405505777260049, 0.034502127690364),
    (0.000244379021663, -0.000542995890619, 0.019406849066323),
)
_LMS_TO_OPPONENT = ((1.0, 1.0, 0.0), (1.0, -2.311130179947035, 0.0), (-1.0, -1.0, 50.977571328718781))
_SENSITIVITY_DB = -0.2797423303127289
_CHANNEL_GAIN = (1.0, 1.45, 1.0)  # achromatic, red-green, violet-yellow
_MASK_EXPONENT, _MASK_CONTENT = 2.264355182647705, -0.7954971194267273
_MASK_SOURCE_EXPONENTS = (1.302622675895691, 2.8885908126831055, 3.6807713508605957)
_CROSS_MASKING = (  # log2 of the weight of the channel of a row in the masking of that of a column
    (-0.18950104713439941, -5.962151050567627, -4.31834602355957),
    (2.5655593872070312, 0.34406712651252747, -2.719646453857422),
    (3.8118371963500977, -1.0051705837249756, -0.5193376541137695),
)
_LARGEST_DIFFERENCE = 10**2.5642454624176025
_BASEBAND_WEIGHT = (0.0036334486212581396, 1.6627724170684814, 4.11874532699585)
_IMAGE_INTEGRATION, _JOD_SCALE, _JOD_EXPONENT = 0.577918291091919, 0.0439569391310215, 0.9302042722702026
_BLUR_SIGMA, _BLUR_RADIUS = 3, 6
_LOWEST_FREQUENCY, _BASEBAND_FREQUENCY, _NUM_BANDS = 0.2, 0.1, 15  # cycles per degree
_TINY = 1e-5  # keeps powers differentiable at 0


@final
class CVVDPReward(ImageReward):
    """Visible difference from the reference by ColorVideoVDP, in JOD: 10 = none, one less = seen by 75 % of people.

    A model of the eye whose parameters were fitted to human judgements; same figures as the cvvdp package for images.
    It sees contrast and little of brightness: an image that is brighter by 0.1 all over still has about 9.6. Scores are
    NaN where the reference is one flat colour and the image is not the same.

    Args:
        display: What the image is looked at on: `"standard_4k"`, `"standard_fhd"`, `"standard_phone"`,
            `"iphone_14_pro"`, `"ipad_pro_12_9"` or `"macbook_pro_16"`. It says how bright pixels are and how far away.
        differentiable: keep the graph from scores to pixels.
        device: where to compute; None = the GPU of the first images, else the current CUDA device if there is one,
            else the CPU.
        batch_size: images at once; None = as many as fit the budget of memory.

    Raises:
        ValueError: an unknown display.

    Example:
        >>> images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> CVVDPReward("standard_fhd", device="cpu")(images, references=images)
        tensor([10.])

    References:
        Mantiuk et al., "ColorVideoVDP: A visual difference predictor for image, video and display distortions", 2024,
        https://arxiv.org/abs/2401.11485
    """

    needs_references = True
    bounds: Bounds = (None, 10.0)
    min_side = 16  # below, hardly a frequency band is left

    def __init__(
        self,
        display: str = "standard_4k",
        *,
        differentiable: bool = False,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
    ) -> None:
        if display not in DISPLAYS:
            raise ValueError(f"CVVDPReward expected `display` to be one of {', '.join(DISPLAYS)}, got {display!r}.")
        self.name = "cvvdp" if display == "standard_4k" else f"cvvdp(display={display})"
        self.differentiable, self.batch_size = differentiable, batch_size
        self.bytes_per_pixel = 704 if differentiable else 288  # counted by tests/test_memory.py
        self.model_loader = LazyModel(partial(_build, display), device, name=self.name)

    def score_batch(self, images: Tensor, references: Tensor) -> Tensor:
        """The JOD of each pair."""
        scores = self._loader.ready(images)(images, references).clamp(max=10)
        flat = (references.amax((2, 3)) == references.amin((2, 3))).all(1)
        identical = (images == references).flatten(1).all(1)
        return torch.where(identical, 10.0, torch.where(flat, torch.nan, scores))


def _build(display: str, device: torch.device) -> nn.Module:
    return _CVVDP(DISPLAYS[display]).to(device)


@final
class _CVVDP(nn.Module):
    """Contrast in bands of an opponent colour space, weighted by sensitivity, masked, pooled."""

    def __init__(self, display: _Display) -> None:
        super().__init__()
        self.range = display.peak - display.black
        self.floor = display.black + display.lux / math.pi * 0.005
        to_opponent = np.array(_LMS_TO_OPPONENT) @ np.array(_XYZ_TO_LMS) @ np.array(_SRGB_TO_XYZ)
        half = display.pixels_per_degree / 2
        self.frequencies = [half, *(0.3228 * half / 2**band for band in range(_NUM_BANDS - 1))]
        with np.load(Path(__file__).with_name("data") / "cvvdp.npz") as file:
            luminances, grid, table = file["luminances"], file["frequencies"], file["log_sensitivities"]
        self.first, self.step = float(np.log10(luminances[0])), float(np.log10(luminances[1] / luminances[0]))
        log_grid = np.log10(grid)
        log_bands = np.log10([*self.frequencies, _BASEBAND_FREQUENCY])
        left = np.clip(np.searchsorted(log_grid, log_bands) - 1, 0, len(grid) - 2)
        share = (log_bands - log_grid[left]) / (log_grid[left + 1] - log_grid[left])
        bands = table[..., left] + share * (table[..., left + 1] - table[..., left])  # by channel, luminance and band
        self.to_opponent = _buffer(to_opponent.reshape(3, 3, 1, 1))
        self.sensitivity = _buffer(bands.transpose(2, 0, 1) + _SENSITIVITY_DB / 20)
        self.kernel = _buffer([0.05, 0.25, 0.4, 0.25, 0.05])
        offsets = np.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
        blur = np.exp(-0.5 * (offsets / _BLUR_SIGMA) ** 2)
        self.blur = _buffer(blur / blur.sum())
        self.gain = _buffer(np.reshape(_CHANNEL_GAIN, (3, 1, 1)))
        self.source_exponents = _buffer(np.reshape(_MASK_SOURCE_EXPONENTS, (3, 1, 1)))
        self.cross = _buffer(2 ** np.array(_CROSS_MASKING).T.reshape(3, 3, 1, 1))
        self.baseband_weight = _buffer(_BASEBAND_WEIGHT)

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """JOD `[B]` of pairs `[B, 3, H, W]` in [0, 1]."""
        pixels = torch.stack((images, references)).flatten(0, 1)
        linear = torch.where(pixels > 0.04045, ((pixels + 0.055) / 1.055) ** 2.4, pixels / 12.92)
        level = functional.conv2d(self.range * linear + self.floor, self.to_opponent)
        count = self._num_bands(*images.shape[2:])
        pooled = list[Tensor]()
        for band in range(count):
            coarse = self._reduced(level)
            around = self._expanded(coarse, level.shape[2:])
            adapted = around[:, :1].clamp(min=0.01)
            contrast = ((level - around) / adapted).clamp(max=1000) * (1 if band == 0 else 2)
            pooled.append(_norm(self._masked(contrast, self._sensitivity(adapted, band))))
            level = coarse
        adapted = level[:, :1].clamp(min=0.01).mean((2, 3), keepdim=True)
        test, truth = (level / adapted).clamp(max=1000).chunk(2)
        difference = (test - truth).abs() * self._sensitivity(adapted, -1)
        pooled.append(_norm(difference) * self.baseband_weight)
        bands = _power(torch.stack(pooled, -1), 4).sum(-1)
        channels = _power(_power(bands, 1 / 4), 4).sum(-1)
        quality = _power(channels, 1 / 4) * _IMAGE_INTEGRATION
        # linear up to 0.1, for a finite slope at no difference
        slope = _JOD_SCALE * 0.1 ** (_JOD_EXPONENT - 1)
        return 10 - torch.where(quality <= 0.1, slope * quality, _JOD_SCALE * quality.clamp(min=0.1) ** _JOD_EXPONENT)

    def _num_bands(self, height: int, width: int) -> int:
        """Bands beside the coarsest: as many as the image has, down to the lowest frequency."""
        low = next((band for band, at in enumerate(self.frequencies) if at <= _LOWEST_FREQUENCY), math.inf)
        return int(min(low + 1, math.floor(math.log2(min(height, width))) - 1))

    def _sensitivity(self, adapted: Tensor, band: int) -> Tensor:
        """Contrast sensitivity `[B, 3, h, w]` at the luminance of the references, linear between entries of a table."""
        table = self.sensitivity[band]
        place = ((adapted.chunk(2)[1].log10() - self.first) / self.step).clamp(0, table.shape[1] - 1)
        left = place.detach().long().clamp(max=table.shape[1] - 2)
        share = place - left
        low, high = table[:, left[:, 0]].transpose(0, 1), table[:, left[:, 0] + 1].transpose(0, 1)
        return 10 ** (low * (1 - share) + high * share)

    def _masked(self, contrast: Tensor, sensitivity: Tensor) -> Tensor:
        """Visible differences `[B, 3, h, w]`: less where both images have contrast, in this channel or another."""
        test, truth = contrast.chunk(2)
        test, truth = test * sensitivity * self.gain, truth * sensitivity * self.gain
        common = torch.minimum(test.abs(), truth.abs())
        if min(common.shape[2:]) > _BLUR_RADIUS:
            maps = functional.pad(common, [_BLUR_RADIUS] * 4, mode="reflect").flatten(0, 1)[:, None]
            maps = functional.conv2d(functional.conv2d(maps, self.blur.view(1, 1, -1, 1)), self.blur.view(1, 1, 1, -1))
            common = maps.view(common.shape)
        masking = functional.conv2d(_power(common * 10**_MASK_CONTENT, self.source_exponents), self.cross)
        difference = _power((test - truth).abs(), _MASK_EXPONENT) / (1 + masking)
        return _LARGEST_DIFFERENCE * difference / (_LARGEST_DIFFERENCE + difference)

    def _reduced(self, level: Tensor) -> Tensor:
        """The next level of the Gaussian pyramid."""
        odd = level.shape[2] % 2 == 1  # as published, the border of columns goes by the number of rows too
        return self._halved(self._halved(level.mT, odd).mT, odd)

    def _halved(self, level: Tensor, odd: bool) -> Tensor:
        """Every second column of a blur along rows; borders are continued by reflection."""
        maps = level.reshape(-1, 1, *level.shape[2:])
        halved = functional.conv2d(maps, self.kernel.view(1, 1, 1, -1), stride=(1, 2), padding=(0, 2))
        halved = halved.view(*level.shape[:3], -1)
        first = 0.25 * level[..., 0] + 0.05 * level[..., 1]
        last = 0.25 * level[..., -1] + 0.05 * level[..., -2] if odd else 0.05 * level[..., -1]
        halved[..., 0] += first
        halved[..., -1] += last
        return halved

    def _expanded(self, level: Tensor, size: torch.Size) -> Tensor:
        """A level of the pyramid at the size of the finer one."""
        maps = functional.pad(level, [1] * 4, mode="replicate").flatten(0, 1)[:, None]
        kernel = 4 * torch.outer(self.kernel, self.kernel)
        wide = functional.conv_transpose2d(maps, kernel.view(1, 1, 5, 5), stride=2)
        return wide[:, 0, 4 : 4 + size[0], 4 : 4 + size[1]].unflatten(0, level.shape[:2])


def _buffer(values: object) -> nn.Buffer:
    return nn.Buffer(torch.as_tensor(np.asarray(values), dtype=torch.float32, device="cpu"))


def _power(values: Tensor, exponent: float | Tensor) -> Tensor:
    return (values + _TINY) ** exponent - _TINY**exponent


def _norm(differences: Tensor) -> Tensor:
    """Root of the mean square over positions `[B, 3]`."""
    return _power(_power(differences, 2).mean((2, 3)), 1 / 2)
