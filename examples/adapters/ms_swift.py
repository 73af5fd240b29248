"""A reward for ms-swift's GRPO (read at 006938b). Copy this file, edit `restored` and `REWARD`, and name it:

    swift rlhf --rlhf_type grpo --external_plugins ms_swift.py --reward_funcs image_quality ...

In ms-swift a completion without a reward counts as one with reward 0, and releases before its pull request 8125 lose
all advantages of a batch with `--scale_rewards gdpo`. An image that cannot be scored therefore gets the mean of the
others of its input here, which is no advantage. A process sees its own images only: without another one of the input,
the mean of all counts, and without any, training stops. Give each process whole groups, therefore: a multiple of
`--num_generations` as `--per_device_train_batch_size` times `--gradient_accumulation_steps`.

ms-swift logs `rewards/ImageQuality/mean`, after the name of the class.
"""

import io
import statistics
from collections.abc import Sequence
from typing import Any

from PIL import Image
from swift.rewards import orms  # pyright: ignore[reportMissingImports]
from torch import Tensor

import iqareward
from iqareward.adapters.trl import TRLReward

OPERATIONS = {"brighten": lambda image: image * 1.25, "darken": lambda image: image * 0.8}


def opened(image: Any) -> Image.Image:
    """An image of the dataset, which ms-swift hands over as a path, or as `{"bytes": ..., "path": ...}`."""
    if isinstance(image, dict):
        image = io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]
    return image if isinstance(image, Image.Image) else Image.open(image).convert("RGB")


def restored(completions: Sequence[str], images: Sequence[Any], **columns: Any) -> list[Tensor | None]:
    """The image that each completion leads to; None where it leads to none. `images` is the column of the prompts'."""
    found: list[Tensor | None] = []
    for text, (degraded,) in zip(completions, images, strict=True):
        image = iqareward.to_images(opened(degraded))[0]
        words = [word for word in text.split() if word in OPERATIONS]
        for word in words:
            image = OPERATIONS[word](image).clamp(0, 1)
        found.append(image if words else None)
    return found


REWARD = TRLReward("0.7*ssim + 0.3*haarpsi", restored, references="clean", no_image=0.0)


class ImageQuality:
    """`REWARD` for rows with a column `clean`, the path of the ground truth."""

    def __init__(self, args: Any = None) -> None:
        pass

    def __call__(self, completions: Sequence[str], clean: Sequence[str], **columns: Any) -> list[float]:
        rewards = REWARD(completions, clean=[opened(path) for path in clean], **columns)
        everywhere = [reward for reward in rewards if reward is not None]
        if not everywhere:
            raise ValueError(f"{REWARD.__name__} could not score any of {len(rewards)} images. Mend the images.")
        # By ground truth: ms-swift's own prompt_id is the same for all inputs with the same text.
        scored = {path: [r for r, other in zip(rewards, clean, strict=True) if other == path] for path in set(clean)}
        return [
            statistics.mean([r for r in scored[path] if r is not None] or everywhere) if reward is None else reward
            for reward, path in zip(rewards, clean, strict=True)
        ]


orms["image_quality"] = ImageQuality
