"""The training and held-out images of `iqareward train`."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from iqareward.cli.train_config import PRESETS, RunConfig
from iqareward.diffusion import FolderPairs, Subset, batches
from iqareward.diffusion.folders import READERS
from iqareward.diffusion.progress import progress_bar
from iqareward.rewards.core import UnscoredWarning
from iqareward.seeds import generator
from iqareward.types import Reward


class Data(NamedTuple):
    """A folder, parted by file into inputs to train on and held-out ones."""

    train: Subset
    held_out: Subset


def folder_pairs(config: RunConfig) -> FolderPairs:
    """All crops of the folder of the settings.

    Raises:
        ValueError: A folder is missing or holds no image, or a degraded image is missing.
    """
    return FolderPairs(
        config.folder, config.size, config.degradation, config.seed, config.degraded_folder, config.crops
    )


def unusable(pairs: FolderPairs, files: Sequence[int], *, shown: bool = True) -> dict[int, str]:
    """Read every file once, because a damaged one is better known now than after hours.

    Args:
        pairs: The crops.
        files: Places in `pairs.names`.
        shown: Show the progress on the error stream.

    Returns:
        place -> why no crop can be cut from the file, for those that cannot be used.
    """

    def problem(file: int) -> str:
        try:
            _ = pairs[file * pairs.crops]
        except ValueError as error:
            return str(error)
        return ""

    found: dict[int, str] = {}
    readers = ThreadPoolExecutor(READERS)
    try:
        with progress_bar("reading images", len(files), shown=shown) as advance:
            for file, text in zip(files, readers.map(problem, files), strict=True):
                if text:
                    found[file] = text
                advance({})
    finally:
        readers.shutdown(cancel_futures=True)  # so that Control-C does not wait for the whole folder
    return found


def split(config: RunConfig, pairs: FolderPairs, left_out: Collection[int] = ()) -> Data:
    """The crops without those of files that are left out, parted by the seed; a held-out file gives one crop.

    Raises:
        ValueError: There are too few files; the key is named.
    """
    crops = config.crops
    order = torch.randperm(len(pairs.names), generator=generator(config.seed)).tolist()
    usable = [file for file in order if file not in left_out]
    held_out, train = (
        sorted(part) for part in (usable[: config.validation.images], usable[config.validation.images :])
    )
    scratch = config.model in PRESETS and config.sft.updates > 0
    needed = max(config.train.inputs_per_update, config.sft.batch_size if scratch else 1)
    if len(train) * crops < needed:
        raise ValueError(
            f"`train.inputs_per_update` and `sft.batch_size` need {needed} crops, but {len(usable)} usable "
            f"images in {config.folder} without the {config.validation.images} of `validation.images` give "
            f"{len(train) * crops}. Lower them, raise `crops`, or bring more images."
        )
    ids = tuple(file * crops + crop for file in train for crop in range(crops))
    return Data(Subset(pairs, ids), Subset(pairs, tuple(file * crops for file in held_out)))


def check_rewards(rewards: Mapping[str, Reward], data: Data) -> None:
    """Score one crop with every reward, by key; ValueError for a reward that cannot score crops of this size."""
    (batch,) = batches(data.train, [0])
    for key, reward in rewards.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnscoredWarning)  # the error below says more
            scores = reward(batch.degraded, references=batch.references)
        if not scores.isfinite().all():
            raise ValueError(
                f"`{key}`: {reward.name} gives no score for crops of {batch.degraded.shape[-1]} pixels. Raise "
                "`size`, or choose another reward."
            )
