"""What a JPEG file of an image shows, for a batch in which each image has its own quality."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from iqareward.functional._checks import check_images
from iqareward.functional._chunks import constant, map_chunks

BLOCK, UNIT = 8, 16  # side of a block, and of the 2 x 2 blocks of luma that share one block of each chroma
# Weights of red, green and blue in luma and the two chroma planes (BT.601), as libjpeg counts them, in 1/65536.
YCC, YCC_ONE = ((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329)), 65536
# Tables K.1 and K.2 of the standard, for quality 50.
LUMA_STEPS = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMA_STEPS = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
    (99, 99, 99, 99, 99, 99, 99, 99),
)


def jpeg(images: Tensor, quality: Tensor) -> Tensor:
    """The round trip through a baseline JPEG file with halved chroma, as Pillow writes and reads it.

    Only what loses information is done: rounding to 8 bits, YCbCr, 4:2:0 chroma, quantised 8 x 8 cosine transforms. An
    image's result does not depend on its batch. It follows libjpeg's integers nearly everywhere (tested: PSNR between
    the two above 55 dB). Not differentiable.

    Args:
        images: `[B, 3, H, W]` in [0, 1]; clamped to it.
        quality: `[B]` as libjpeg and Pillow count, rounded and clamped to 1..100.

    Returns:
        `[B, 3, H, W]` float32 in [0, 1], multiples of 1/255.

    Raises:
        ValueError: a shape does not fit.
        TypeError: the images are not floating point.

    Example:
        >>> grey = torch.full((2, 3, 20, 30), 0.2)
        >>> jpeg(grey, torch.tensor([10, 90])).mul(255).amax((1, 2, 3))
        tensor([48., 51.])

    References:
        Digital compression and coding of continuous-tone still images, ITU-T Recommendation T.81, 1992,
        https://www.itu.int/rec/T-REC-T.81
        JPEG File Interchange Format (colours), ITU-T Recommendation T.871, 2011, https://www.itu.int/rec/T-REC-T.871
    """
    images = check_images("jpeg", images).detach().float()
    if quality.shape != images.shape[:1]:
        raise ValueError(
            f"jpeg expected `quality` of shape {[len(images)]}, one per image, got {list(quality.shape)}. "
            "Use torch.full for one quality."
        )
    return map_chunks(_jpeg, images, quality.to(images.device))


def _jpeg(images: Tensor, quality: Tensor) -> Tensor:
    height, width = images.shape[2:]
    levels = (images.clamp(0, 1) * 255).round()
    levels = F.pad(levels, (0, -width % UNIT, 0, -height % UNIT), mode="replicate")
    luma, blue, red = _to_ycc(levels)
    scale = _table_scale(quality)
    luma = _lossy(luma, LUMA_STEPS, scale)[..., :height, :width]
    chroma_size = (math.ceil(height / 2), math.ceil(width / 2))
    blue, red = (
        _double(_lossy(_halve(plane), CHROMA_STEPS, scale)[..., : chroma_size[0], : chroma_size[1]])
        for plane in (blue, red)
    )
    return _to_rgb(luma, blue[..., :height, :width], red[..., :height, :width]) / 255


def _table_scale(quality: Tensor) -> Tensor:
    """Size of the steps in percent `[B]`: the convention of the Independent JPEG Group."""
    quality = quality.float().round().clamp(1, 100)
    return torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)


def _lossy(planes: Tensor, steps: tuple[tuple[int, ...], ...], scale: Tensor) -> Tensor:
    """Planes `[B, H, W]` of levels 0..255 after their cosine transforms were rounded to steps of a table."""
    num, height, width = planes.shape
    table = constant(steps, torch.float32, planes.device)
    table = ((table * scale[:, None, None] + 50) / 100).floor().clamp(1, 255)[:, None, :, None, :]
    blocks = (planes - 128).reshape(num, height // BLOCK, BLOCK, width // BLOCK, BLOCK)
    basis = _cosines()
    # Rows, then columns, with two bits of fraction in between and three in the result: libjpeg's integers.
    frequencies = _combine(_quarters(_combine(blocks, basis, 4)), basis, 2).round() / 8
    # Halves go away from zero, as in libjpeg; torch.round would take them to even.
    coefficients = torch.copysign((frequencies.abs() / table + 0.5).floor(), frequencies) * table
    inverse = tuple(zip(*basis, strict=True))
    pixels = _combine(_quarters(_combine(coefficients, inverse, 2)), inverse, 4) / 8
    return (pixels.reshape(num, height, width) + 128.5).floor().clamp(0, 255)


def _quarters(values: Tensor) -> Tensor:
    return (values * 4).round() / 4


def _cosines() -> tuple[tuple[float, ...], ...]:
    """Rows of the cosine transform times sqrt(8): the first is exactly 1, so that means of blocks are exact."""
    rows = (
        tuple(math.sqrt(2) * math.cos((2 * place + 1) * order * math.pi / 16) for place in range(BLOCK))
        for order in range(1, BLOCK)
    )
    return ((1.0,) * BLOCK, *rows)


def _combine(blocks: Tensor, matrix: tuple[tuple[float, ...], ...], dim: int) -> Tensor:
    """`matrix` times the vectors along `dim`, added up one by one.

    A matrix product may add in another order in a batch of another size, and a sum near half a step would then round
    the other way.
    """
    shape = [1] * blocks.ndim
    shape[dim] = BLOCK
    columns = constant(matrix, torch.float32, blocks.device).unbind(1)
    parts = [blocks.narrow(dim, place, 1) * column.view(shape) for place, column in enumerate(columns)]
    total = parts[0]
    for part in parts[1:]:
        total = total.add_(part)
    return total


def _halve(planes: Tensor) -> Tensor:
    """Means of 2 x 2 pixels `[B, H/2, W/2]`, rounded down and up in turn along a row, as libjpeg does."""
    rows = planes[:, 0::2] + planes[:, 1::2]
    sums = rows[..., 0::2] + rows[..., 1::2]
    bias = 1 + torch.arange(sums.shape[-1], device=planes.device) % 2
    return ((sums + bias) / 4).floor()


def _double(planes: Tensor) -> Tensor:
    """Twice the size, 3/4 from the nearer and 1/4 from the farther neighbour: the default of libjpeg's decoder."""
    if planes.shape[-1] <= 2:  # too narrow for it: libjpeg repeats the pixels
        return planes.repeat_interleave(2, 1).repeat_interleave(2, 2)
    padded = F.pad(planes[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    middle = 3 * padded[:, 1:-1]
    rows = torch.stack((middle + padded[:, :-2], middle + padded[:, 2:]), 2).flatten(1, 2)
    middle = 3 * rows[..., 1:-1]
    # Sixteenths, rounded with 8 on the left and 7 on the right: libjpeg's way to have no drift.
    sums = torch.stack((middle + rows[..., :-2] + 8, middle + rows[..., 2:] + 7), 3)
    return (sums.flatten(2, 3) / 16).floor()


def _to_ycc(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Luma and the two chroma planes `[B, H, W]`, rounded to levels 0..255."""
    red, green, blue = levels.unbind(1)
    # Sums stay below 2^24, where float32 is exact. Halves go up in luma and down in chroma.
    sums = [red * weights[0] + green * weights[1] + blue * weights[2] for weights in YCC]
    luma, chroma_blue, chroma_red = ((total / YCC_ONE) for total in sums)
    return (luma + 0.5).floor(), (chroma_blue + 127.5).ceil(), (chroma_red + 127.5).ceil()


def _to_rgb(luma: Tensor, blue: Tensor, red: Tensor) -> Tensor:
    """RGB levels `[B, 3, H, W]`, rounded and clipped to 0..255."""
    blue, red = blue - 128, red - 128
    green = luma - 0.344136 * blue - 0.714136 * red
    return torch.stack((luma + 1.402 * red, green, luma + 1.772 * blue), 1).round().clamp(0, 255)
