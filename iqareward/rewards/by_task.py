"""A reward for models of several tasks: each image is scored by the reward of its task."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from iqareward.rewards.core import check_names
from iqareward.types import Bounds, Images, Reward, Scores


class ByTask:
    """Score each image by the reward of its task, for all-in-one restoration models.

    The trainer hands over the tasks of its data set. A wrapper such as `MicroBatched` would not pass them on, so wrap
    the rewards inside instead.

    Args:
        rewards: The reward of each task by its name. Scores should be on one scale, because logs average over tasks.
        name: Name of the result; by default made of the tasks and their rewards.

    Raises:
        TypeError: One of them is no reward.
        ValueError: There is no reward.

    Example:
        >>> import iqareward
        >>> reward = ByTask({"deblur": iqareward.load("ssim"), "denoise": iqareward.load("haarpsi")})
        >>> images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reward(images, references=images, tasks=["denoise", "deblur"])
        tensor([1., 1.])
    """

    def __init__(self, rewards: Mapping[str, Reward], *, name: str | None = None) -> None:
        self.rewards = dict(rewards)
        unique = list({id(reward): reward for reward in self.rewards.values()}.values())
        check_names("ByTask", unique)
        self.name = name or ", ".join(f"{task}: {reward.name}" for task, reward in self.rewards.items())
        self.needs_references = any(reward.needs_references for reward in unique)
        self.needs_prompts = any(reward.needs_prompts for reward in unique)
        self.needs_inputs = any(getattr(reward, "needs_inputs", False) for reward in unique)
        self.differentiable = all(reward.differentiable for reward in unique)
        lows, highs = zip(*(reward.bounds for reward in unique), strict=True)
        self.bounds: Bounds = (
            None if None in lows else min(lows),
            None if None in highs else max(highs),
        )

    def __call__(
        self,
        images: Images,
        references: Images | None = None,
        *,
        inputs: Images | None = None,
        prompts: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        **ignored: Any,
    ) -> Scores:
        """Score each image by the reward of its task.

        Args:
            images: `[B, 3, H, W]`, or a sequence of `[3, H, W]`, in [0, 1].
            references: Ground truth, one per image.
            inputs: Degraded images, one per image.
            prompts: One per image.
            tasks: The task of each image.
            ignored: Columns that no reward here takes.

        Returns:
            `[B]` fp32, higher is better, NaN where not scored.

        Raises:
            ValueError: There are no tasks, another number of them than images, or an unknown one.
        """
        if tasks is None or len(tasks) != len(images):
            got = "none" if tasks is None else f"{len(tasks)}"
            raise ValueError(f"ByTask expected one task per image ({len(images)}), got {got}. Pass tasks=[...].")
        rows: dict[str, list[int]] = {}
        for row, task in enumerate(tasks):
            rows.setdefault(task, []).append(row)
        if unknown := sorted(set(rows) - set(self.rewards)):
            raise ValueError(f"ByTask expected tasks among {list(self.rewards)}, got {unknown}.")
        scores: list[Tensor] = []
        for task, mine in rows.items():
            columns: dict[str, Any] = {"references": references, "inputs": inputs}
            given = {name: _rows(column, mine) for name, column in columns.items() if column is not None}
            own = None if prompts is None else [prompts[row] for row in mine]
            scores.append(self.rewards[task](_rows(images, mine), **given, prompts=own))
        order = {row: place for place, row in enumerate(row for mine in rows.values() for row in mine)}
        return torch.cat(scores)[[order[row] for row in range(len(images))]]


def _rows(images: Images, rows: list[int]) -> Images:
    return images[rows] if isinstance(images, Tensor) else [images[row] for row in rows]
