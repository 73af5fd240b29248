"""Estimate how hard each input still is for the model: `[B]`, detached, larger = harder, NaN = unknown.

Each estimator gives every row the value of its *input*, the mean over that input's rollouts. A weight that differed
between rollouts of one input would change what is optimised: a rollout far from its reference would count more because
it is far, not because its input is hard.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from iqareward._gradients import root
from iqareward.groups import check_ids, check_rows, finite_or_nan, group_statistics
from iqareward.types import Groups, Images, Scores


def rmse(images: Tensor, references: Tensor) -> Tensor:
    """Compute the root mean squared error of each row; its gradient is 0 where it is 0.

    Args:
        images: `[B, ...]` pixels or latents.
        references: ground truth of the same shape.

    Returns:
        `[B]` >= 0, lower is better.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> rmse(torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)).item()
        0.5
    """
    if images.shape != references.shape or images.ndim < 2:
        raise ValueError(
            f"rmse expected `images` and `references` of one shape [B, ...], got {list(images.shape)} and "
            f"{list(references.shape)}. Repeat each reference for all rollouts of its input."
        )
    dtype = torch.float64 if torch.float64 in (images.dtype, references.dtype) else torch.float32
    return root((images.to(dtype) - references.to(dtype)).square().flatten(1).mean(1))


def reference_distance(
    images: Images,
    references: Images,
    metric: Callable[..., Tensor] = rmse,
    *,
    groups: Groups | None = None,
    best: float | None = None,
) -> Tensor:
    """Measure how far an input's rollouts are from their ground truth, as the mean of `|best - metric|`.

    Do not take the training reward as the metric: a hacked reward would call hard inputs easy.

    Args:
        images: `[B, 3, H, W]` rollouts; with the default metric any `[B, ...]`, such as latents.
        references: ground truth, one per row.
        metric: `metric(images, references) -> [B]`.
        groups: `[B]` integer ids of the inputs; without it every row is an input of its own.
        best: value of the metric for `images == references`: 0 for LPIPS or DISTS, 1 for SSIM. Not needed for rewards
            of this library that are bounded above, nor for the default.

    Returns:
        `[B]` >= 0, larger = harder; rollouts with a score that is not finite are left out, NaN where none remains.

    Raises:
        TypeError: `metric` is not callable, e.g. because `groups` was passed by position.
        ValueError: `best` is missing for a metric that does not declare an upper bound.

    Example:
        >>> photos = torch.full((2, 3, 8, 8), 0.5)
        >>> reference_distance(photos + 0.1, photos)
        tensor([0.1000, 0.1000])
    """
    if not callable(metric):
        raise TypeError(
            f"reference_distance expected `metric` to be callable, got {type(metric).__name__}. Pass ids of inputs by "
            "name: groups=..."
        )
    best = _best_value(metric) if best is None else best
    with torch.no_grad():
        scores = metric(images, references)
    scores = check_rows("reference_distance", scores)
    return _per_input((best - scores).abs(), groups)


def _best_value(metric: Callable[..., Tensor]) -> float:
    if metric is rmse:
        return 0.0
    bounds: Any = getattr(metric, "bounds", (None, None))
    if bounds[1] is None:
        name = getattr(metric, "name", getattr(metric, "__name__", type(metric).__name__))
        raise ValueError(
            f"reference_distance expected `best` with metric {name!r}, which declares no upper bound. Pass its value "
            "for a perfect image: best=0.0 for a distance such as LPIPS, best=1.0 for SSIM. PSNR has none: use the "
            "default, RMSE, which orders images alike."
        )
    return float(bounds[1])


def pass_rate(rewards: Scores, groups: Groups, *, threshold: float) -> Tensor:
    """Compute the share of an input's scored rollouts that reach `threshold`; here *smaller* = harder.

    Args:
        rewards: `[B]` scores, higher is better; for a distance pass its negative and the negative threshold.
        groups: `[B]` integer ids of the inputs.
        threshold: the score that counts as solved.

    Returns:
        `[B]` in [0, 1], larger = easier; NaN where no rollout was scored.

    Example:
        >>> pass_rate(torch.tensor([0.2, 0.9, 0.8]), torch.tensor([0, 0, 1]), threshold=0.5).tolist()
        [0.5, 0.5, 1.0]
    """
    rewards = check_rows("pass_rate", rewards)
    passed = torch.where(rewards.isfinite(), (rewards >= threshold).to(rewards.dtype), torch.nan)
    return group_statistics(passed, groups).mean


def blind_difficulty(degraded_scores: Scores, *, best: float, groups: Groups | None = None) -> Tensor:
    """Measure how bad the degraded input looks, `max(0, best - score)`, for data without ground truth.

    It describes the input and not the model, so weights made from it do not shift to SFT as the model learns.

    Args:
        degraded_scores: `[B]` no-reference scores of the *inputs*, higher is better.
        best: score of a flawless image by that metric, e.g. 5 for a MOS or 100 for MUSIQ.
        groups: `[B]` integer ids of the inputs.

    Returns:
        `[B]` >= 0, larger = harder; NaN where there is no score.

    Example:
        >>> blind_difficulty(torch.tensor([1.5, 4.5]), best=5.0).tolist()
        [3.5, 0.5]
    """
    scores = check_rows("blind_difficulty", degraded_scores)
    return finite_or_nan((best - _per_input(scores, groups)).clamp(min=0))


def _per_input(values: Tensor, groups: Groups | None) -> Tensor:
    return finite_or_nan(values) if groups is None else group_statistics(values, groups).mean


class DifficultyMemory:
    """Remember a running difficulty per input across epochs, trusting an entry less the longer ago it was seen.

    An entry's trust is 0.5^(age / half_life), its age counted in updates. A new value d makes the entry
    k * entry + (1 - k) * d with k = decay * trust; it is recalled as trust * entry + (1 - trust) * m, m being the mean
    of all entries weighted by their trust. In a distributed run give it the rows of `iqareward.groups.gather_rows`.

    Args:
        num_inputs: ids are integers in [0, num_inputs), e.g. the index in the dataset.
        decay: weight of a fresh entry against a new value, in [0, 1).
        half_life: number of updates after which an entry counts half, e.g. one or two epochs.

    Example:
        >>> memory = DifficultyMemory(100, half_life=50)
        >>> memory.update(torch.tensor([0.2]), torch.tensor([7]))
        >>> memory.recall(torch.tensor([7, 8]))
        tensor([0.2000,    nan])
    """

    def __init__(self, num_inputs: int, *, half_life: float, decay: float = 0.5) -> None:
        if not (0 <= decay < 1 and half_life > 0):
            raise ValueError(
                f"DifficultyMemory expected decay in [0, 1) and half_life > 0, got {decay} and {half_life}."
            )
        self.num_inputs, self.decay, self.half_life, self._step = num_inputs, decay, half_life, 0
        # The last entry is that of ids out of range on a device, see `check_ids`: never seen, and it stays so.
        self._values = torch.full((num_inputs + 1,), torch.nan, dtype=torch.float32, device="cpu")
        self._seen = torch.zeros(num_inputs + 1, dtype=torch.int64, device="cpu")

    def update(self, difficulty: Tensor, groups: Groups) -> None:
        """Remember the difficulties `[B]` of the inputs `groups` `[B]`; rows that are not finite change nothing.

        Raises:
            ValueError: an id is not in [0, num_inputs); on a device its row is left out instead.
        """
        difficulty = check_rows("DifficultyMemory", difficulty)
        ids = self._ids(groups, difficulty)
        self._step += 1
        new = group_statistics(difficulty, ids).mean.to(self._values.dtype)
        usable = new.isfinite() & (ids < self.num_inputs)
        old, keep = self._values[ids], self.decay * self._trust()[ids]
        blended = torch.where(old.isnan(), new, keep * old + (1 - keep) * new)
        self._values[ids] = torch.where(usable, blended, old)
        self._seen[ids] = torch.where(usable, self._step, self._seen[ids])

    def recall(self, groups: Groups) -> Tensor:
        """Return the difficulty `[B]` of the inputs `groups` `[B]`, old entries drawn to the mean; NaN if never seen.

        Raises:
            ValueError: an id is not in [0, num_inputs); on a device its row is NaN instead.
        """
        ids = self._ids(groups)
        trust = torch.where(self._values.isnan(), 0.0, self._trust())
        typical = (trust / trust.sum() * self._values.nan_to_num()).sum()
        return torch.lerp(typical.expand(ids.shape), self._values[ids], trust[ids])

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all entries and their ages."""
        return {"values": self._values[:-1].clone(), "seen": self._seen[:-1].clone(), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken; ValueError if it holds another number of inputs."""
        if state["values"].shape != (self.num_inputs,):
            got = f"{len(state['values'])}. Build the memory with the num_inputs of the saved one."
            raise ValueError(f"DifficultyMemory expected a state of {self.num_inputs} inputs, got {got}")
        values, seen, self._step = state["values"], state["seen"], state["step"]
        self._values = torch.cat([values.float(), values.new_full((1,), torch.nan, dtype=torch.float32)])
        self._seen = torch.cat([seen, seen.new_zeros(1)])

    def _ids(self, groups: Groups, rows: Tensor | None = None) -> Tensor:
        ids = check_ids("DifficultyMemory", groups, rows, size=self.num_inputs)
        self._values, self._seen = self._values.to(ids.device), self._seen.to(ids.device)
        return ids

    def _trust(self) -> Tensor:
        return torch.exp2((self._seen - self._step).float() / self.half_life)
