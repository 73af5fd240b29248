"""Photographs of scikit-image that are free to use, and known damage to them."""

from collections.abc import Sequence
from typing import NamedTuple

import skimage.data
import torch
from PIL import Image
from torch import Tensor

import iqareward
from iqareward.diffusion import Degradation
from iqareward.types import Reward

PHOTOGRAPHS = ("chelsea", "astronaut", "coffee", "rocket")


class Damage(NamedTuple):
    """The option of `Degradation` that sets a strength, and five values from mild to strong."""

    option: str
    strengths: tuple[float, ...]


DAMAGES = {
    "blur": Damage("max_sigma", (0.6, 1.2, 2.0, 3.2, 5.0)),
    "noise": Damage("max_noise", (3, 8, 15, 28, 50)),
    "jpeg": Damage("min_quality", (80, 50, 30, 15, 7)),
    "resize": Damage("max_factor", (1.5, 2, 3, 4, 6)),
}


def load_photograph(name: str, short_side: int | None = None) -> Tensor:
    """Load a photograph of scikit-image as `[3, H, W]` in [0, 1], shrunk so that its shorter side fits `short_side`."""
    image = Image.fromarray(getattr(skimage.data, name)())
    if short_side is not None and short_side < min(image.size):
        scale = short_side / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    return iqareward.to_images(image)[0]


def damaged(photo: Tensor, kind: str, num_levels: int, *, seed: int = 0) -> Tensor:
    """Return the photograph and its damaged versions, `[num_levels + 1, 3, H, W]`, rounded to 8 bits."""
    option, strengths = DAMAGES[kind]
    versions = [photo[None]]
    for strength in strengths[:num_levels]:
        degradation = Degradation((kind,), **{option: strength})
        versions.append(degradation(photo[None], torch.ones(1), [seed]))
    return torch.cat(versions).mul(255).round() / 255


def score(rewards: Sequence[Reward], images: Tensor) -> dict[str, Tensor]:
    """Score all versions `[D, L + 1, 3, H, W]` of a photograph; `[D, L + 1]` by the name of the reward."""
    scores = {}
    for reward in rewards:
        rows = [reward(versions, references=versions[:1].expand_as(versions)) for versions in images]
        scores[reward.name] = torch.stack(rows)
    return scores
