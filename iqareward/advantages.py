"""Advantages: how much better each rollout is than the others of its input, `[B]` and detached."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from iqareward.groups import (
    batch_statistics,
    check_ids,
    check_rows,
    group_index,
    group_statistics,
    group_sum,
    place_in_group,
)
from iqareward.types import Groups, Scores

# TRL's and DDPO's, added to the standard deviation, outside the root.
_STD_EPSILON, _MEMORY_EPSILON = 1e-4, 1e-6


class Advantages(NamedTuple):
    """Advantages, and which of them say anything.

    Attributes:
        values: `[B]` advantages, 0 where there is no signal.
        has_signal: `[B]` bool; False for rows without a score and for groups without spread.

    Example:
        >>> group_advantages(torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1])).has_signal
        tensor([ True,  True, False, False])
    """

    values: Tensor
    has_signal: Tensor


def group_advantages(
    rewards: Scores,
    groups: Groups,
    *,
    scale: Literal["group", "batch", "none"] = "batch",
    std_floor: float = 0.0,
) -> Advantages:
    """Subtract the mean reward of the input's rollouts, and divide by a standard deviation + 1e-4 (GRPO).

    With "group" the sum of squares is the same for every input, so a spread of 0.001 MOS counts as much as one of 1.0:
    set `std_floor` to the reward's test-retest noise. "batch", the default, keeps the size of the differences.

    Args:
        rewards: `[B]`, higher is better; rows that are not finite are left out and get 0.
        groups: `[B]` integer ids of the inputs.
        scale: divide by the standard deviation of the group, of the whole batch, or by nothing.
        std_floor: groups whose rewards spread no more than this get 0 and have no signal.

    Returns:
        `Advantages` of `[B]`. In a distributed run gather the rows first, with `iqareward.groups.gather_rows`.

    Raises:
        ValueError: `scale` is unknown, or shapes do not fit.

    Example:
        >>> rewards, groups = torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor([0, 0, 1, 1])
        >>> group_advantages(rewards, groups, scale="none").values.tolist()
        [-1.0, 1.0, 0.0, 0.0]

    References:
        Shao et al., DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models, 2024,
        https://arxiv.org/abs/2402.03300. Epsilon, Bessel's correction and the three scales as in TRL's GRPOTrainer.
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"group_advantages expected scale 'group', 'batch' or 'none', got {scale!r}.")
    rewards = check_rows("group_advantages", rewards)
    statistics = group_statistics(rewards, check_ids("group_advantages", groups, rewards))
    divisor = torch.ones_like(rewards)
    if scale == "group":
        divisor = statistics.std + _STD_EPSILON
    elif scale == "batch":
        divisor = batch_statistics(rewards).std + _STD_EPSILON
    has_signal = rewards.isfinite() & (statistics.std > std_floor)
    return _where_finite((rewards - statistics.mean) / divisor, has_signal)


def rank_advantages(rewards: Scores, groups: Groups, *, std_floor: float = 0.0) -> Advantages:
    """Rank each rollout among those of its input, from -1 (worst) to 1 (best), with ties at their mean rank.

    An outlier, such as the score of a hacked reward, counts no more than any best rollout; the spacing of honest
    rewards is lost too.

    Args:
        rewards: `[B]`, higher is better; rows that are not finite are left out and get 0.
        groups: `[B]` integer ids of the inputs.
        std_floor: groups whose rewards spread no more than this get 0 and have no signal.

    Returns:
        `Advantages` of `[B]` in [-1, 1].

    Example:
        >>> rank_advantages(torch.tensor([0.1, 99.0, 0.2]), torch.tensor([5, 5, 5])).values.tolist()
        [-1.0, 1.0, 0.0]
    """
    rewards = check_rows("rank_advantages", rewards)
    ids = check_ids("rank_advantages", groups, rewards)
    std = group_statistics(rewards, ids).std
    return _where_finite(2 * win_rates(rewards, ids) - 1, rewards.isfinite() & (std > std_floor))


def win_rates(scores: Scores, groups: Groups, *, margin: float = 0.0) -> Tensor:
    """How often each rollout beats another one of its input, from 0 (never) to 1 (always), where a tie counts half.

    Args:
        scores: `[B]`, higher is better; rows that are not finite neither win nor lose.
        groups: `[B]` integer ids of the inputs.
        margin: Differences that are not larger than this are ties.

    Returns:
        `[B]` in [0, 1], NaN where a score is not finite or no other one of its input is.

    Raises:
        ValueError: a shape or dtype does not fit.

    Example:
        >>> win_rates(torch.tensor([0.1, 99.0, 0.2, 7.0]), torch.tensor([5, 5, 5, 6]), margin=0.15)
        tensor([0.2500, 1.0000, 0.2500,    nan])
    """
    scores = check_rows("win_rates", scores)
    index = group_index(check_ids("win_rates", groups, scores))
    finite = scores.isfinite()
    count = scores.shape[0]
    # Each row asks twice how many scores of its group come before: before itself less the margin, which are its wins,
    # and before itself plus the margin, which are all but its losses. In double precision, so that of two rows one wins
    # exactly if the other loses. Scores that are not finite lie behind all others and are not counted.
    known = torch.where(finite, scores, torch.inf).double()
    order = torch.argsort(torch.cat([known - margin, known, known + margin]), stable=True)
    order = order[torch.argsort(index.repeat(3)[order], stable=True)]
    is_score = torch.cat([torch.zeros_like(finite), finite, torch.zeros_like(finite)])
    before = torch.empty_like(order).scatter_(0, order, is_score[order].cumsum(0))
    wins, not_lost = before[:count], before[2 * count :]
    in_other_groups = torch.full_like(index, 3 * count).scatter_reduce(0, index, wins, "amin").gather(0, index)
    num_scored = group_sum(finite.long(), index)
    balance = wins + not_lost - 2 * in_other_groups - num_scored  # wins less losses
    rates = (0.5 + balance / (2 * (num_scored - 1))).to(scores.dtype)
    return torch.where(finite & (num_scored > 1), rates, torch.nan)


def combine_advantages(
    rewards: Tensor,
    groups: Groups,
    *,
    weights: Sequence[float],
    order: Literal["normalize_then_sum", "sum_then_normalize"] = "normalize_then_sum",
    scale: Literal["group", "batch", "none"] = "batch",
    std_floor: float = 0.0,
) -> Advantages:
    """Combine several rewards into one advantage, normalising each before they are added (GDPO) or only their sum.

    Normalising first makes weights mean the same for a 5-point and a 100-point reward. It also amplifies a nearly
    constant reward: set `std_floor` for that.

    A missing score never helps a rollout. "normalize_then_sum" counts it as the mean of the input's other rollouts.
    A sum without it could not be compared with theirs, so "sum_then_normalize" leaves out a rollout that lacks a score
    that another rollout of its input has. A reward that scored no rollout of an input is left out for that input.

    Args:
        rewards: `[B, N]`, one column per reward, higher is better; NaN = not scored by that reward.
        groups: `[B]` integer ids of the inputs.
        weights: one number per column; columns with weight 0 are ignored.
        order: "normalize_then_sum": sum of weight * group advantage, then standardised over the batch;
            "sum_then_normalize": `group_advantages` of the weighted sum.
        scale: as in `group_advantages`.
        std_floor: as in `group_advantages`; per reward with "normalize_then_sum".

    Returns:
        `Advantages` of `[B]`; rows without any score, and rows that are left out, get 0 and have no signal.

    Raises:
        ValueError: the number of weights is not that of columns, all are 0, one is not finite in float32, or an option
            is unknown.

    Example:
        >>> mos = torch.tensor([[1.0, 10.0], [3.0, 10.0], [1.0, 10.0], [3.0, 30.0]])
        >>> combine_advantages(mos, torch.tensor([0, 0, 1, 1]), weights=[1.0, 1.0]).values
        tensor([-0.5155,  0.5155, -1.1109,  1.1109])

    References:
        GDPO: Group reward-Decoupled Normalization Policy Optimization for Multi-reward RL Optimization, 2026,
        https://arxiv.org/abs/2601.05242. Formulas as in TRL's GRPOTrainer, whose sum counts a missing score as 0.
    """
    if rewards.ndim != 2 or rewards.shape[1] != len(weights):
        got = list(rewards.shape)
        raise ValueError(f"combine_advantages expected `rewards` [B, {len(weights)}], a column per weight, got {got}.")
    if not all(abs(weight) <= torch.finfo(torch.float32).max for weight in weights):
        raise ValueError(f"combine_advantages expected weights that are finite in float32, got {list(weights)}.")
    if not any(weights):
        raise ValueError(f"combine_advantages expected at least one weight that is not 0, got {list(weights)}.")
    if order not in ("normalize_then_sum", "sum_then_normalize"):
        raise ValueError(f"combine_advantages expected one of the two orders in its documentation, got {order!r}.")
    options: dict[str, Any] = {"scale": scale, "std_floor": std_floor}
    rewards = rewards.detach().to(torch.promote_types(rewards.dtype, torch.float32))
    columns = [(weight, column) for weight, column in zip(weights, rewards.unbind(1), strict=True) if weight != 0]
    ids = check_ids("combine_advantages", groups, rewards[:, 0])
    scored = torch.stack([column.isfinite() for _, column in columns])
    if order == "sum_then_normalize":
        known = torch.stack([group_statistics(column, ids).num_scored > 0 for _, column in columns])
        total = torch.stack([torch.where(column.isfinite(), weight * column, 0.0) for weight, column in columns]).sum(0)
        comparable = (scored == known).all(0) & scored.any(0)
        return group_advantages(torch.where(comparable, total, torch.nan), ids, **options)
    parts = [(weight, group_advantages(column, ids, **options)) for weight, column in columns]
    total = torch.stack([weight * part.values for weight, part in parts]).sum(0)
    _, mean, std = batch_statistics(torch.where(scored.any(0), total, torch.nan))
    has_signal = torch.stack([part.has_signal for _, part in parts]).any(0)
    return _where_finite((total - mean) / (std + _STD_EPSILON), has_signal)


class RewardMemory:
    """Remember the last rewards of each input across epochs, for advantages against the input's own history (DDPO).

    Inputs with fewer than `length` rewards so far are measured against the batch. Call `update` before `advantages`:
    the history includes the current rewards. In a distributed run give it the rows of `iqareward.groups.gather_rows`.

    Args:
        num_inputs: ids are integers in [0, num_inputs), e.g. the index in the dataset.
        length: rewards remembered per input.
        clip: largest absolute advantage.
        std_floor: histories that spread no more than this give 0.

    Example:
        >>> memory = RewardMemory(100, length=2)
        >>> rewards, inputs = torch.tensor([1.0, 3.0]), torch.tensor([42, 42])
        >>> memory.update(rewards, inputs)
        >>> memory.advantages(rewards, inputs).values
        tensor([-1.0000,  1.0000])

    References:
        Black et al., Training Diffusion Models with Reinforcement Learning, 2023, https://arxiv.org/abs/2305.13301
        (statistics per prompt). arXiv 2511.01645 draws such a memory per input; the details are ours.
    """

    def __init__(self, num_inputs: int, *, length: int = 16, clip: float = 5.0, std_floor: float = 0.0) -> None:
        self.num_inputs, self.length, self.clip, self.std_floor = num_inputs, length, clip, std_floor
        # The last row takes what is not to be remembered, so that shapes do not depend on values.
        self._rewards = torch.full((num_inputs + 1, length), torch.nan, dtype=torch.float32, device="cpu")
        self._counts = torch.zeros(num_inputs + 1, dtype=torch.int64, device="cpu")

    def update(self, rewards: Scores, groups: Groups) -> None:
        """Remember `rewards` `[B]` of the inputs `groups` `[B]`; rows that are not finite are left out.

        Raises:
            ValueError: an id is not in [0, num_inputs); on a device its row is left out instead.
        """
        rewards, ids = self._prepare(rewards, groups)
        inputs = torch.where(rewards.isfinite(), ids, self.num_inputs)
        index = group_index(inputs)
        place, ones = place_in_group(index), torch.ones_like(index)
        # Of more rollouts than there are slots the last ones stay.
        kept = place >= group_sum(ones, index) - self.length
        slots = (self._counts[inputs] + place) % self.length
        kept &= inputs < self.num_inputs
        self._rewards[torch.where(kept, inputs, self.num_inputs), slots] = torch.where(kept, rewards, torch.nan)
        self._counts.index_add_(0, inputs, ones)

    def advantages(self, rewards: Scores, groups: Groups) -> Advantages:
        """Compute `(reward - mean) / (std + 1e-6)` with the input's history, clipped; returns `Advantages` of `[B]`.

        Raises:
            ValueError: an id is not in [0, num_inputs); on a device its row gets 0 instead and has no signal.
        """
        rewards, ids = self._prepare(rewards, groups)
        first = self._rewards[ids, 0]
        history = self._rewards[ids] - first[:, None]  # differences, so that equal rewards have no spread at all
        full = self._counts[ids] >= self.length
        num_scored, batch_mean, batch_std = batch_statistics(rewards)
        mean = torch.where(full, first + history.mean(1), batch_mean)
        std = torch.where(full, history.std(1, correction=0), batch_std * (1 - 1 / num_scored).sqrt())
        has_signal = rewards.isfinite() & (std > self.std_floor) & (ids < self.num_inputs)
        values, has_signal = _where_finite((rewards - mean) / (std + _MEMORY_EPSILON), has_signal)
        return Advantages(values.clamp(-self.clip, self.clip), has_signal)

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the histories."""
        return {"rewards": self._rewards.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken; ValueError if sizes differ."""
        if state["rewards"].shape != self._rewards.shape:
            got = f"{list(state['rewards'].shape)}. Build the memory with the options of the saved one."
            raise ValueError(f"RewardMemory expected rewards of shape {list(self._rewards.shape)}, got {got}")
        self._rewards, self._counts = state["rewards"].clone(), state["counts"].clone()

    def _prepare(self, rewards: Scores, groups: Groups) -> tuple[Tensor, Tensor]:
        # In fp32 like the history, so that a reward that is infinite there is not taken for finite.
        rewards = check_rows("RewardMemory", rewards).float()
        ids = check_ids("RewardMemory", groups, rewards, size=self.num_inputs)
        self._rewards, self._counts = self._rewards.to(rewards.device), self._counts.to(rewards.device)
        return rewards, ids


def _where_finite(values: Tensor, has_signal: Tensor) -> Advantages:
    has_signal = has_signal & values.isfinite()  # finite rewards near the end of their range overflow
    return Advantages(torch.where(has_signal, values, 0.0), has_signal)
