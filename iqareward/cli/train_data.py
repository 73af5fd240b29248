"""The training and held-out inputs of `iqareward train`."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from iqareward.cli.train_config import RunConfig, make_data
from iqareward.diffusion import FolderPairs, Pairs, Subset, batches
from iqareward.diffusion.folders import READERS
from iqareward.diffusion.progress import progress_bar
from iqareward.diffusion.rollouts import scored
from iqareward.rewards.core import UnscoredWarning
from iqareward.seeds import generator
from iqareward.types import Reward, needs


class Data(NamedTuple):
    """A data set, parted into inputs to train on and held-out ones; files are parted as a whole."""

    train: Pairs
    held_out: Pairs


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


def split(config: RunConfig, pairs: Pairs, left_out: Collection[int] = ()) -> Data:
    """The inputs without those of files that are left out, parted by the seed; a held-out file gives one crop.

    Raises:
        ValueError: There are too few; the key is named.
    """
    crops = pairs.crops if isinstance(pairs, FolderPairs) else 1
    order = torch.randperm(len(pairs) // crops, generator=generator(config.seed)).tolist()
    usable = [file for file in order if file not in left_out]
    own = config.validation.data
    images = config.validation.images if own is None else 0
    held_out, train = sorted(usable[:images]), sorted(usable[images:])
    needed = max(config.train.inputs_per_update, config.sft.batch_size if config.sft_updates else 1)
    if len(train) * crops < needed:
        raise ValueError(
            f"`train.inputs_per_update` and `sft.batch_size` need {needed} inputs, but {len(usable)} usable images "
            f"of `data` without the {images} of `validation.images` give {len(train) * crops}. Lower them, raise "
            "`data.crops`, or bring more images."
        )
    if own is not None:
        separate = make_data(own, "validation.data", seed=config.seed)
        kept = Subset(separate, tuple(range(min(config.validation.images, len(separate)))))
    else:
        kept = Subset(pairs, tuple(file * crops for file in held_out))
    return Data(Subset(pairs, tuple(file * crops + crop for file in train for crop in range(crops))), kept)


def check_rewards(rewards: Mapping[str, Reward], data: Data) -> None:
    """Score one input with every reward, by key; ValueError for a reward that cannot score it."""
    batch = batches(data.train, [0])[0].repeat(2)  # some rewards compare rollouts
    images = batch.degraded if batch.references is None else batch.references
    for key, reward in rewards.items():
        if batch.references is None and needs(reward, "references"):
            raise ValueError(
                f"`{key}`: {reward.name} compares with ground truth, which `data` does not have. Choose a no-reference "
                "reward, or QualityGain."
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnscoredWarning)  # the error below says more
            scores = scored(reward, images, batch)()
        if not scores.isfinite().all():
            height, width = images.shape[-2:]
            raise ValueError(
                f"`{key}`: {getattr(reward, 'name', key)} gives no score for images of {width} x {height} pixels. "
                "Raise `data.size`, or choose another reward."
            )
