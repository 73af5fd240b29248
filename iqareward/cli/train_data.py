"""The images that `iqareward train` learns from and those that it is judged by."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from iqareward.cli.train_config import PRESETS, TrainConfig
from iqareward.diffusion.data.pairs import FolderPairs
from iqareward.diffusion.data.views import Subset
from iqareward.diffusion.noise import generator
from iqareward.image_files import open_image
from iqareward.rewards.scoring import UnscoredWarning
from iqareward.types import Reward


class Data(NamedTuple):
    """A folder, parted by file into inputs to train on and held-out ones."""

    train: Subset
    held_out: Subset


def split(config: TrainConfig) -> Data:
    """The folder of the settings, parted by the seed; a held-out file gives one crop.

    Raises:
        ValueError: a file is too small or unreadable, or there are too few; the key is named.
    """
    crops = config.crops
    pairs = FolderPairs(config.folder, config.size, config.degradation, config.seed, config.degraded_folder, crops)
    for name in pairs.names:
        _check_size(Path(config.folder) / name, config.size)
    order = torch.randperm(len(pairs.names), generator=generator(config.seed)).tolist()
    held_out, train = (sorted(part) for part in (order[: config.validation.images], order[config.validation.images :]))
    scratch = config.model in PRESETS and config.sft.updates > 0
    needed = max(config.optimization.inputs_per_update, config.sft.batch_size if scratch else 1)
    if len(train) * crops < needed:
        raise ValueError(
            f"`optimization.inputs_per_update` and `sft.batch_size` need {needed} crops, but {len(pairs.names)} images "
            f"in {config.folder} without the {config.validation.images} of `validation.images` give "
            f"{len(train) * crops}. Lower them, raise `crops`, or bring more images."
        )
    ids = tuple(file * crops + crop for file in train for crop in range(crops))
    return Data(Subset(pairs, ids), Subset(pairs, tuple(file * crops for file in held_out)))


def _check_size(path: Path, size: int) -> None:
    """Say now, not after hours, that a file cannot be used; only its header is read."""
    with open_image(path) as image:
        sides = image.size
    if min(sides) < size:
        raise ValueError(f"{path} is {sides[0]}x{sides[1]}, smaller than `size` {size}. Lower `size` or remove it.")


def check_rewards(rewards: Mapping[str, Reward], data: Data) -> None:
    """Score one crop with every reward, by key; ValueError for a reward that cannot score crops of this size."""
    degraded, references = data.train.batch([0])
    for key, reward in rewards.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnscoredWarning)  # the error below says more
            scores = reward(degraded, references=references)
        if not scores.isfinite().all():
            raise ValueError(
                f"`{key}`: {reward.name} gives no score for crops of {degraded.shape[-1]} pixels. Raise `size`, or "
                "choose another reward."
            )
