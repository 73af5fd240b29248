"""ms-swift's GRPO, as far as a reward function can notice: how it is chosen, called, and read."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def chosen(orms: dict[str, Callable], names: Sequence[str]) -> list[Callable]:
    """The reward functions of `--reward_funcs`, built with the trainer's arguments."""
    for name in names:
        if name not in orms:
            raise ValueError(f"reward_function {name} is not implemented in swift.rewards")
    return [orms[name](args=object()) for name in names]


def score(functions: Sequence[Callable], rows: Sequence[dict[str, Any]], completions: Sequence[str]) -> Tensor:
    """`[rows, functions]`: the columns of all rows by name, and the completions by position."""
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    messages: dict[str, str] = {}  # one id for each text of a prompt, whatever its images are
    columns["prompt_id"] = [messages.setdefault(row["messages"], f"prompt_{len(messages)}") for row in rows]
    answers = [function(list(completions), trainer_state=None, **columns) for function in functions]
    answers = [[torch.nan if value is None else value for value in answer] for answer in answers]
    return torch.tensor(answers, dtype=torch.float32).T


def advantages(rewards: Tensor, weights: Tensor, generations: int, scale: str) -> Tensor:
    """`[rows]` advantages, also of the GDPO before its mean and deviation left NaN out (`old gdpo`)."""
    if scale in ("gdpo", "old gdpo"):
        groups = rewards.view(-1, generations, rewards.shape[1])
        if scale == "old gdpo":
            parts = (groups - groups.mean(1, True)) / (groups.std(1, keepdim=True) + 1e-8)
        else:
            mean, count = groups.nanmean(1, True), groups.isfinite().sum(1, True)
            deviation = ((groups - mean).square().nansum(1, True) / (count - 1)).sqrt()
            parts = ((groups - mean) / (deviation + 1e-8)).nan_to_num(nan=0.0)
        total = (parts.view(rewards.shape) * weights).sum(1)
        return (total - total.mean()) / (total.std() + 1e-8)
    total = (rewards * weights).nansum(1)
    groups = total.view(-1, generations)
    found = total - groups.mean(1).repeat_interleave(generations)
    if scale == "none":
        return found
    spread = total.std() if scale == "batch" else groups.std(1).repeat_interleave(generations)
    return found / (spread + 1e-4)
