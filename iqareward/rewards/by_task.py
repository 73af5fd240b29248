"""A reward for models of several tasks: each image is scored by the reward of its task."""

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch

from iqareward.rewards.calls import Call
from iqareward.rewards.core import BaseReward, check_names
from iqareward.types import Reward, Scores


@final
class ByTask(BaseReward):
    """Score each image by the reward of its task, for all-in-one restoration models.

    The trainer hands over the tasks of its data set.

    Args:
        rewards: The reward of each task by its name. Scores should be on one scale, because logs average over tasks.
        name: Name of the result; by default made of the tasks and their rewards.

    Raises:
        TypeError: `rewards` is no mapping, or one of them is no reward.
        ValueError: There is no reward. When scoring: a task has none.

    Example:
        >>> import iqareward
        >>> reward = ByTask({"deblur": iqareward.load("ssim"), "denoise": iqareward.load("haarpsi")})
        >>> images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> reward(images, references=images, tasks=["denoise", "deblur"])
        tensor([1., 1.])
    """

    def __init__(self, rewards: Mapping[str, Reward], *, name: str | None = None) -> None:
        if not isinstance(rewards, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"ByTask expected a mapping of tasks to rewards, got {rewards!r}.")
        self.rewards = dict(rewards)
        self._unique = list({id(reward): reward for reward in self.rewards.values()}.values())
        check_names("ByTask", self._unique)
        self.name = name or ", ".join(f"{task}: {reward.name}" for task, reward in self.rewards.items())
        self._take_facts(self._unique)
        self.needs_tasks = True
        lows, highs = zip(*(reward.bounds for reward in self._unique), strict=True)
        self.bounds = None if None in lows else min(lows), None if None in highs else max(highs)

    def score_call(self, call: Call) -> Scores:
        call.check(self.name)
        assert call.tasks is not None
        rows: dict[str, list[int]] = {}
        for row, task in enumerate(call.tasks):
            rows.setdefault(task, []).append(row)
        if unknown := sorted(set(rows) - set(self.rewards)):
            raise ValueError(f"ByTask expected tasks among {list(self.rewards)}, got {unknown}.")
        if not rows:
            return torch.zeros(0, device=call.device)
        # a view of each score: an index would have to be copied to the device
        scores = {
            row: score
            for task, mine in rows.items()
            for row, score in zip(mine, call.rows(mine).score(self.rewards[task]).unbind(), strict=True)
        }
        return torch.stack([scores[row] for row in range(len(call))])

    def _moved(self) -> Iterable[Any]:
        return self._unique
