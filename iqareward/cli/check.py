"""Test a reward that the command line names."""

import importlib
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from iqareward.image_files import find_images
from iqareward.images import to_images
from iqareward.rewards.catalog import CATALOG, load
from iqareward.testing import Report, check_reward
from iqareward.types import Reward

NUM_IMAGES = 4


def find_reward(spec: str) -> Reward:
    """The reward behind `module:object` (a class is called without arguments), or behind a name of the catalogue.

    Raises:
        ValueError: neither.
        ImportError: the module cannot be imported.
    """
    if spec in CATALOG or spec.startswith("pyiqa:") or ":" not in spec:
        return load(spec)
    module, _, name = spec.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        if part not in vars(found):
            raise ValueError(f"{spec!r}: there is no {part!r} in {module}.")
        found = vars(found)[part]
    return cast(Reward, found() if isinstance(found, type) else found)  # what it is, check_reward tells


def run_check(reward: Reward, folder: Path | None, size: int) -> Report:
    """`check_reward` on photographs or generated pictures, with coarse and noisy versions of them as worse ones."""
    images = _generated(size) if folder is None else _from_folder(folder, size)
    rng = torch.Generator().manual_seed(0)
    near = (images + 0.01 * torch.randn(images.shape, generator=rng)).clamp(0, 1)
    coarse = interpolate(images, size=(size // 4, size // 4), mode="area")
    coarse = interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    degraded = (coarse + 0.1 * torch.randn(images.shape, generator=rng)).clamp(0, 1)
    if getattr(reward, "needs_references", False):  # check_reward refuses what is no reward
        return check_reward(reward, near, images, degraded=degraded)
    return check_reward(reward, images, degraded=degraded)


def _from_folder(folder: Path, size: int) -> Tensor:
    """The first photographs of a folder, cut to the centre."""
    files = list(find_images([folder]).files)[:NUM_IMAGES]
    rows = [to_images(file, value_range=(0, 1))[0] for file in files]
    for file, row in zip(files, rows, strict=True):
        if min(row.shape[1:]) < size:
            raise ValueError(f"{file} is {row.shape[2]}x{row.shape[1]}, smaller than --size {size}.")
    tops = [((row.shape[1] - size) // 2, (row.shape[2] - size) // 2) for row in rows]
    return torch.stack([row[:, t : t + size, s : s + size] for row, (t, s) in zip(rows, tops, strict=True)])


def _generated(size: int) -> Tensor:
    """Dead leaves: overlapping discs of random size and colour, with the edges and scales of photographs.

    References:
        Lee, Mumford and Huang, "Occlusion Models for Natural Images", IJCV 2001,
        https://doi.org/10.1023/A:1011109015675
    """
    rng = torch.Generator().manual_seed(0)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    images = torch.rand(NUM_IMAGES, 3, 1, 1, generator=rng).expand(-1, -1, size, size).clone()
    for _ in range(300):
        center = torch.rand(NUM_IMAGES, 2, 1, 1, generator=rng) * size
        # radii with density r^-3, which makes the picture look alike at every scale
        radius = (4.0**-2 - torch.rand(NUM_IMAGES, 1, 1, generator=rng) * (4.0**-2 - (size / 4) ** -2)) ** -0.5
        inside = (rows - center[:, 0]).square() + (columns - center[:, 1]).square() < radius.square()
        color = torch.rand(NUM_IMAGES, 3, 1, 1, generator=rng)
        images = torch.where(inside[:, None], color, images)
    texture = 0.03 * torch.randn(images.shape, generator=rng)
    return (images * 0.9 + 0.05 + texture).clamp(0, 1)
