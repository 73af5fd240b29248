"""Statistics of images that move when a model exploits its reward: saturation, sharpness, grids, seams of tiles."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from iqareward.functional._checks import check_images
from iqareward.functional._chunks import map_chunks
from iqareward.functional._fused import correlate
from iqareward.functional.color import luma
from iqareward.functional.filters import mean_of_map

_DARK = 0.1
_CLIPPED = 1 / 255  # a channel nearer to 0 or 1 than this is saturated
_LARGEST_BLOCK, _FEWEST_BLOCKS = 32, 8  # pixels of a block of a periodic grid, and blocks along the shorter side
_FAINT = 1e-3  # amplitudes below vote less: a step of one level in one pixel of a block has 4 / 255
_SEGMENT, _SEGMENTS = 32, 8  # pixels of a line that vote together, and the fewest votes of a line
_NEAR = 8  # lines on either side that a line is compared with
_FAINT_JUMP = 1e-4  # a fortieth of a level, averaged over a segment


def _saturation_share(images: Tensor) -> Tensor:
    return ((images <= _CLIPPED) | (images >= 1 - _CLIPPED)).any(1).float().flatten(1).mean(1)


def _colorfulness(images: Tensor) -> Tensor:
    return mean_of_map(images.amax(1) - images.amin(1))


def _dark_fraction(images: Tensor) -> Tensor:
    return (luma(images) < _DARK).float().flatten(1).mean(1)


def _edge_density(images: Tensor) -> Tensor:
    planes, across, along = luma(images), (-0.5, 0.0, 0.5), (0.25, 0.5, 0.25)  # Sobel
    slopes = [
        correlate(correlate(planes, across, is_vertical=is_vertical), along, is_vertical=not is_vertical)
        for is_vertical in (False, True)
    ]
    return mean_of_map(torch.hypot(*slopes))  # on a CPU a norm over two takes eighty times as long


def _high_frequency_share(images: Tensor) -> Tensor:
    planes = luma(images)
    planes = torch.where(planes.isfinite(), planes, 0.0)
    power = torch.fft.fft2(planes - mean_of_map(planes)[:, None, None]).abs().square()
    vertical, horizontal = (torch.fft.fftfreq(side, device=images.device).abs() for side in images.shape[2:])
    high = torch.maximum(vertical[:, None], horizontal[None]) > 0.25
    shown, total = mean_of_map(power * high), mean_of_map(power)
    # A flat image leaves rounding noise only, whose share says nothing.
    return torch.where(total < 1e-10 * planes.shape[1:].numel(), 0.0, shown / total)


def _grid(images: Tensor) -> Tensor:
    planes = luma(images)
    largest = _LARGEST_BLOCK
    while largest * _FEWEST_BLOCKS > min(planes.shape[1:]):
        largest //= 2
    if largest < 2:
        return torch.zeros_like(planes[:, 0, 0])
    middle = planes[:, 1:-1, 1:-1]  # the Laplacian has no gradient left, whose phase would be the same everywhere
    planes = 4 * middle - planes[:, :-2, 1:-1] - planes[:, 2:, 1:-1] - planes[:, 1:-1, :-2] - planes[:, 1:-1, 2:]
    found = [_agreement(planes, size) for size in sorted({largest * eighths // 8 for eighths in (5, 6, 7, 8)} - {1})]
    return torch.stack(found).amax(0)


def _agreement(planes: Tensor, size: int) -> Tensor:
    """Largest share of blocks in which a frequency with a whole number of cycles per block has one phase, `[B]`."""
    rows, columns = (side // size for side in planes.shape[1:])
    if rows * columns < 2:
        return torch.zeros_like(planes[:, 0, 0])
    blocks = planes[:, : rows * size, : columns * size].unflatten(2, (columns, size)).unflatten(1, (rows, size))
    waves = torch.view_as_real(torch.fft.rfft2(blocks, dim=(2, 4)))  # [B, rows, size, columns, frequencies, 2]
    votes = waves / (waves.square().sum(-1, keepdim=True).sqrt() + _FAINT)
    total = votes.sum(1).sum(2).square().sum(-1)  # [B, size, frequencies]; 1 per block by chance
    share = (total / (rows * columns) - 1) / (rows * columns - 1)
    share[:, 0, 0].zero_()
    return share.flatten(1).amax(1).clamp(min=0).sqrt()


def seam_strength(images: Tensor, *, period: int | None = None, offset: int = 0) -> Tensor:
    """How clearly whole rows or columns are borders of tiles: 0 or less by chance, towards 1 where all of a line jumps.

    Every line between two columns, and every one between two rows, is cut into segments of 32 pixels. A segment votes
    `(own - near) / (own + near)`, where `own` is the jump of mean luma across the line, beyond the gradient beside it,
    and `near` the mean of that on the 14 lines around. So every part of an image counts alike, however strong its
    texture. Borders that are blended over several pixels are not found.

    Args:
        images: `[B, 3, H, W]` in [0, 1].
        period: Pixels between borders; None = unknown.
        offset: Place of the first border; 0 counts the edge of the image as one.

    Returns:
        `[B]` in fp32 in [-1, 1]: the mean vote of the borders, or, where `period` is unknown, of the strongest line.
        NaN for an image with a pixel that is not finite; 0 for an unknown period in images below 16 pixels.

    Raises:
        ValueError: There is no border of that period that is far enough from the edges.

    Example:
        >>> tiled = torch.linspace(0.2, 0.8, 64).repeat(1, 3, 64, 1)
        >>> tiled[..., 32:] += 4 / 255  # seen by the column, not by the row
        >>> seam_strength(tiled, period=32).round(decimals=2)
        tensor([0.5000])
    """
    if period is not None and period < 2:
        raise ValueError(f"seam_strength expected period >= 2, got {period}.")
    return _statistic("seam_strength", partial(_seams, period=period, offset=offset), images)


def _seams(images: Tensor, *, period: int | None = None, offset: int = 0) -> Tensor:
    planes = luma(images)
    votes: list[Tensor] = []
    for turned in (planes, planes.mT):
        height, width = turned.shape[1:]
        near = min(_NEAR, (width - 3) // 6)
        if near < 2:
            continue
        size = max(1, min(_SEGMENT, height // _SEGMENTS))
        lines = turned[:, : height // size * size].unflatten(1, (-1, size)).mean(2)  # [B, segments, W]
        steps = lines.diff(dim=2)
        jumps = (steps[..., 1:-1] - (steps[..., :-2] + steps[..., 2:]) / 2).abs()
        around = F.avg_pool1d(jumps, 2 * near + 1, 1) * (2 * near + 1)
        inner = F.avg_pool1d(jumps, 3, 1)[..., near - 1 : 1 - near] * 3  # also jump where the middle one does
        around = (around - inner) / (2 * near - 2)
        own = jumps[..., near:-near]
        vote = ((own - around) / (own + around + _FAINT_JUMP)).mean(1)
        votes.append(vote if period is None else vote[:, (offset - 2 - near) % period :: period])
    if period is None:
        return torch.cat([*votes, images.new_zeros(len(images), not votes)], 1).amax(1)
    found = torch.cat([*votes, images.new_zeros(len(images), 0)], 1)
    if not found.shape[1]:
        height, width = images.shape[2:]
        raise ValueError(
            f"seam_strength expected a border of period {period} and offset {offset} that is at least {_NEAR + 2} "
            f"pixels from the edges, got images of {width} x {height}. Pass larger images."
        )
    return found.mean(1)


def _statistic(name: str, formula: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Apply a formula to the images in pieces; NaN for images with non-finite pixels."""

    def unless_broken(rows: Tensor) -> Tensor:
        extremes = rows.amax((1, 2, 3)) - rows.amin((1, 2, 3))  # not finite if any pixel is not, and no mask to fill
        return torch.where(extremes.isfinite(), formula(rows), torch.nan)

    return map_chunks(unless_broken, check_images(name, images, min_side=3))


STATISTICS: Mapping[str, Callable[[Tensor], Tensor]] = {
    name: partial(_statistic, name, formula)
    for name, formula in {
        "saturation_share": _saturation_share,
        "colorfulness": _colorfulness,
        "dark_fraction": _dark_fraction,
        "edge_density": _edge_density,
        "high_frequency_share": _high_frequency_share,
        "periodic_grid": _grid,
        "seams": _seams,
    }.items()
}
"""Image statistics by name; each maps images `[B, 3, H, W]` in [0, 1] with sides of at least 3 to `[B]` in fp32.

- `saturation_share`: share of pixels with a channel at 0 or 1 (burnt highlights, crushed shadows).
- `colorfulness`: mean difference between the largest and the smallest channel.
- `dark_fraction`: share of pixels with luma below 0.1.
- `edge_density`: mean length of the luma gradient, in grey levels per pixel; rises with sharpening, ringing and noise.
- `high_frequency_share`: share of the luma's variance above half the Nyquist frequency; rises with added noise and
  invented texture, 0 for flat images.
- `periodic_grid`: how coherent the strongest periodic pattern of luma is over the whole image, as left by decoders and
  by exploited rewards. Each block of 20, 24, 28 or 32 pixels votes with the phase of each frequency that has a whole
  number of cycles in it; the value is the square root of the excess share of votes that agree. 1 = one pattern
  everywhere, 0.13 to 0.35 by chance. Images below 256 pixels have smaller blocks, down to an eighth of their shorter
  side; below 16 pixels it is 0. The blocks of a JPEG are such a pattern too.
- `seams`: `seam_strength` of the strongest row or column, as left by tiled decoders; 0.15 to 0.5 in photographs.
"""
