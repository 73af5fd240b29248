"""Images without photographs: occluding leaves, 1/f textures, and a mixture of both to train and test on.

An image depends on its id and the seed only, to the last bit. Pixels are therefore made of additions, multiplications
and divisions alone, which round alike in a batch of any size; what needs more is computed one image at a time.

"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from iqareward.seeds import id_list, normal, uniform

_EXPONENTS = (0.8, 1.6)  # of the amplitude; natural images lie around 1 (Field 1987)
_RADII = (1 / 24, 1 / 2)  # of a leaf, in sides of the image
_NUM_LEAVES = 96  # about three times the area of the image
_NUM_FIELDS = 3  # textures that the leaves of an image share, each leaf at an offset of its own
# Colours vary most in brightness, less from orange to blue, least from green to magenta.
WARMTH, MAGENTA = (1.0, 0.0, -1.0), (0.5, -1.0, 0.5)
# Shares of the mixture: textures alone, then leaves that are nearly flat; the rest are textured leaves.
TEXTURES, FLAT, FLAT_TEXTURE = 0.15, 0.15, 0.2


class _Leaves(NamedTuple):
    """What is drawn per leaf, backmost first; every field is `[B, L, ...]`."""

    centers: Tensor  # (x, y) in pixels
    directions: Tensor  # unit vector along the long axis
    axes: Tensor  # (long, short) half axes in pixels
    colors: Tensor  # RGB
    shade: Tensor  # relative brightening from the middle to the edge, across the long axis
    contrast: Tensor  # relative, of the texture
    fields: Tensor  # which of the image's textures, int64
    shifts: Tensor  # (x, y) offset into it in pixels, int64


def synthetic_images(ids: Sequence[int] | Tensor, *, size: int, seed: int = 0) -> Tensor:
    """Images that need no download: mostly textured leaves, some flat ones, some 1/f textures, softly lit.

    Occluding ellipses with r^-3 radii have the occlusion and scaling of natural images, and noise whose amplitude falls
    as 1/f^a their spectrum. An image depends on its id and the seed only.

    Args:
        ids: `[B]` integers >= 0.
        size: Side in pixels.
        seed: Integer >= 0; another seed gives other images for the same ids.

    Returns:
        `[B, 3, size, size]` float32 in [0, 1] on the CPU.

    Example:
        >>> images = synthetic_images(range(8), size=32)
        >>> images.shape, images[3].equal(synthetic_images([3], size=32)[0])
        (torch.Size([8, 3, 32, 32]), True)

    References:
        Lee, Mumford, Huang, Occlusion Models for Natural Images: A Statistical Study of a Scale-Invariant Dead Leaves
        Model, 2001, https://doi.org/10.1023/A:1011109015675
        Achddou, Gousseau, Ladjal, Synthetic images as a regularity prior for image restoration neural networks, 2021,
        https://openreview.net/forum?id=vKT8fZFGcG (dead leaves as training data)
        Field, Relations between the statistics of natural images and the response properties of cortical cells, 1987,
        https://doi.org/10.1364/JOSAA.4.002379
    """
    ids = id_list("synthetic_images", ids)
    draws = uniform(ids, 4, seed=seed, purpose="scene")
    kinds = draws[:, 0].tolist()
    images = torch.empty(len(ids), 3, size, size, dtype=torch.float32, device="cpu")
    for low, high, make in (
        (0.0, TEXTURES, _power_law_textures),
        (TEXTURES, TEXTURES + FLAT, partial(_dead_leaves, texture=FLAT_TEXTURE)),
        (TEXTURES + FLAT, 1.0, _dead_leaves),
    ):
        rows = [row for row, kind in enumerate(kinds) if low <= kind < high]
        if rows:
            images[rows] = make([ids[row] for row in rows], size=size, seed=seed)
    ramp = (_pixels(size) / size - 0.5) * 2
    across, down = ((draws[:, 1:3] - 0.5)[..., None, None] * 0.7).unbind(1)
    light = 1 + across * ramp + down * ramp[:, None]
    return (images * light[:, None]).clamp(0, 1)


def _power_law_textures(ids: list[int], *, size: int, seed: int) -> Tensor:
    """Colour noise whose amplitude falls as 1/f^a: clouds, bark, gravel, with an exponent a of its own per image."""
    draws = uniform(ids, 6, seed=seed, purpose="texture")
    exponents = _between(draws[:, :1], *_EXPONENTS).expand(-1, 3)
    brightness, warmth, magenta = _fields(ids, exponents, size=size, seed=seed, purpose="texture fields").unbind(1)
    contrast = _between(draws[:, 1], 0.06, 0.14)[:, None, None]
    mean = _between(draws[:, 2], 0.35, 0.65)[:, None, None]
    tint = draws[:, 3:5, None, None] - 0.5
    chroma = _between(draws[:, 5], 0.1, 0.6)[:, None, None] * contrast
    return _rgb(
        mean + contrast * brightness,
        0.3 * tint[:, 0] + chroma * warmth,
        0.15 * tint[:, 1] + 0.5 * chroma * magenta,
    ).clamp(0, 1)


def _dead_leaves(ids: list[int], *, size: int, seed: int, texture: float = 1.0) -> Tensor:
    """Ellipses that hide one another, with radii distributed as r^-3; `texture` is the contrast of what is on them."""
    leaves = _draw_leaves(ids, size=size, seed=seed, texture=texture)
    exponents = _between(uniform(ids, _NUM_FIELDS, seed=seed, purpose="exponents"), *_EXPONENTS)
    return _paint(leaves, _fields(ids, exponents, size=size, seed=seed, purpose="leaf fields")).clamp(0, 1)


def _draw_leaves(ids: list[int], *, size: int, seed: int, texture: float) -> _Leaves:
    draws = uniform(ids, _NUM_LEAVES, 9, seed=seed, purpose="leaves")
    gauss = normal(ids, _NUM_LEAVES, 6, seed=seed, purpose="leaves")
    scene = normal(ids, 1, 3, seed=seed, purpose="palette")
    low, high = (side * size for side in _RADII)
    # Inverse of the distribution function of r^-3 between low and high.
    radii = (low**-2 - draws[..., 0] * (low**-2 - high**-2)).rsqrt()
    stretch = _between(draws[..., 1], 1.0, 1.6)
    axes = torch.stack((radii * stretch, radii / stretch), -1)
    axes[:, 0] = 8 * size  # the backmost leaf is the ground
    saturation = draws[..., 2].square() * 0.2
    colors = _rgb(
        (0.45 + 0.08 * scene[..., 0] + 0.18 * gauss[..., 0]).clamp(0.08, 0.85),
        0.05 * scene[..., 1] + saturation * gauss[..., 1],
        0.03 * scene[..., 2] + 0.6 * saturation * gauss[..., 2],
        dim=-1,
    )
    directions = gauss[..., 3:5]
    return _Leaves(
        centers=_between(draws[..., 3:5], -0.2 * size, 1.2 * size),
        directions=directions / directions.square().sum(-1, keepdim=True).sqrt(),
        axes=axes,
        colors=colors,
        shade=texture * (draws[..., 5] - 0.5) * 0.7,
        contrast=texture * 0.1 * gauss[..., 5],
        fields=(draws[..., 6] * _NUM_FIELDS).long(),
        shifts=(draws[..., 7:9] * size).long(),
    )


def _paint(leaves: _Leaves, fields: Tensor) -> Tensor:
    """Lay the leaves `[B, L]` over one another, the last on top; `[B, 3, S, S]`."""
    num_images, num_leaves = leaves.shade.shape
    size = fields.shape[-1]
    pixels, texels = _pixels(size), torch.arange(size, device="cpu")
    fields = fields.flatten(1)
    canvas = torch.zeros(num_images, 3, size, size, dtype=torch.float32, device="cpu")
    for index in range(num_leaves):
        leaf = _Leaves(*(field[:, index, ..., None, None] for field in leaves))
        x, y = (pixels - leaf.centers[:, 0]), (pixels[:, None] - leaf.centers[:, 1])
        (cosine, sine), (long, short) = leaf.directions.unbind(1), leaf.axes.unbind(1)
        along, across = (x * cosine + y * sine) / long, (y * cosine - x * sine) / short
        # 1 - (radius)^2 falls by 2 / short per pixel at the end of the short axis: an edge one pixel wide there.
        cover = (0.5 + (1 - along * along - across * across) * (short / 2)).clamp(0, 1)
        columns, rows = (texels + leaf.shifts[:, 0]) % size, (texels[:, None] + leaf.shifts[:, 1]) % size
        texels_read = (leaf.fields * size + rows) * size + columns
        texture = fields.gather(1, texels_read.flatten(1)).view_as(cover)
        light = 1 + leaf.shade * across + leaf.contrast * texture
        canvas = canvas + cover[:, None] * (leaf.colors * light[:, None] - canvas)
    return canvas


def _fields(ids: list[int], exponents: Tensor, *, size: int, seed: int, purpose: str) -> Tensor:
    """Periodic 1/f^a noise `[B, N, S, S]` of mean 0 and deviation 1, with the amplitude exponents `[B, N]`."""
    noise = normal(ids, exponents.shape[1], size, size, seed=seed, purpose=purpose)
    down, across = torch.fft.fftfreq(size, device="cpu"), torch.fft.rfftfreq(size, device="cpu")
    frequency = torch.hypot(down[:, None], across)
    frequency[0, 0] = torch.inf  # amplitude 0: the mean is left out
    # One image at a time: a library's transform and power may round differently in a batch of another size.
    rows = [
        torch.fft.irfft2(torch.fft.rfft2(row) * frequency.pow(-exponent[:, None, None]), s=(size, size))
        for row, exponent in zip(noise, exponents, strict=True)
    ]
    return torch.stack([row / row.std((1, 2), keepdim=True) for row in rows])


def _rgb(brightness: Tensor, warmth: Tensor, magenta: Tensor, *, dim: int = 1) -> Tensor:
    channels = zip(WARMTH, MAGENTA, strict=True)
    return torch.stack([brightness + warmth * red_blue + magenta * green for red_blue, green in channels], dim)


def _between(share: Tensor, low: float, high: float) -> Tensor:
    return share * (high - low) + low


def _pixels(size: int) -> Tensor:
    """Centres of the pixels along a side."""
    return torch.arange(size, dtype=torch.float32, device="cpu") + 0.5
